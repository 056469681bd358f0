"""The state of simulators that can be saved: those of Gymnasium's classic control, whose whole state lies open.

That is their `state`, a random stream, and the steps that a time limit has counted. Environments that keep state
elsewhere (in a physics engine or an emulator) would go on wrongly with a part of it, and ALE's vector environment gives
none out: both begin new games instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from gala_mpi.learning.vector_env import SerialVectorEnv

SAVABLE = "gymnasium.envs.classic_control."
PLAIN_WRAPPERS = (TimeLimit, OrderEnforcing, PassiveEnvChecker)
# Of angles, positions and velocities of classic control: Acrobot comes to 9 pi a second, the others to less.
LARGEST_STATE = 30.0

Arrays = dict[str, npt.NDArray[Any]]


def save(vector_env: VectorEnv[Any, Any, Any]) -> Arrays | None:
    """All state by names, or None if it cannot be saved."""
    envs = _open_ones(vector_env)
    found: Arrays = {}
    for index, env in enumerate(envs):
        stream = env.unwrapped.np_random.bit_generator.state
        words = [stream["state"]["state"], stream["state"]["inc"]]
        halves = [half for word in words for half in (word >> 64, word & (2**64 - 1))]
        found[f"{index}.state"] = np.array(env.unwrapped.state)
        found[f"{index}.stream"] = np.array([*halves, stream["has_uint32"], stream["uinteger"]], np.uint64)
        found[f"{index}.elapsed"] = np.array([limit._elapsed_steps for limit in _time_limits(env)], np.int64)
    return found or None


def restore(vector_env: VectorEnv[Any, Any, Any], state: Mapping[str, npt.NDArray[Any]]) -> None:
    """Take over what `save` gave of the same environments, after a reset. Raises ValueError if it is of others."""
    now = save(vector_env)
    if now is None or _kinds(now) != _kinds(state):
        raise ValueError("the state is not one of these simulators")
    for name, values in state.items():
        if name.endswith(".state") and not (np.abs(values) <= LARGEST_STATE).all():
            raise ValueError(f"{name} is out of range")
    for index, env in enumerate(_open_ones(vector_env)):
        words = [int(word) for word in state[f"{index}.stream"]]
        stream: dict[str, Any] = {"bit_generator": "PCG64"}
        stream["state"] = {"state": words[0] << 64 | words[1], "inc": words[2] << 64 | words[3]}
        stream["has_uint32"], stream["uinteger"] = words[4] & 1, words[5] & (2**32 - 1)
        env.unwrapped.np_random.bit_generator.state = stream
        env.unwrapped.state = state[f"{index}.state"].copy()
        for limit, steps in zip(_time_limits(env), state[f"{index}.elapsed"], strict=True):
            limit._elapsed_steps = int(steps)


def _kinds(state: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[Any, str]]:
    return {name: (values.shape, values.dtype.kind) for name, values in state.items()}


def _open_ones(vector_env: VectorEnv[Any, Any, Any]) -> list[Any]:
    """The environments one by one, if their whole state lies open; else none."""
    spec = vector_env.spec
    if not isinstance(vector_env, SerialVectorEnv) or spec is None or not str(spec.entry_point).startswith(SAVABLE):
        return []
    envs: list[Any] = list(vector_env.envs)
    # Others may have a state of their own: statistics by which observations are normalised, say.
    if any(type(wrapper) not in PLAIN_WRAPPERS for env in envs for wrapper in _wrappers(env)):
        return []
    kinds = {env.unwrapped.np_random.bit_generator.state["bit_generator"] for env in envs}
    return envs if kinds == {"PCG64"} else []


def _time_limits(env: gymnasium.Env[Any, Any]) -> list[Any]:
    """The wrappers of `env` that count its steps."""
    return [wrapper for wrapper in _wrappers(env) if isinstance(wrapper, TimeLimit)]


def _wrappers(env: gymnasium.Env[Any, Any]) -> list[Any]:
    """All wrappers of `env`, the outermost first."""
    found: list[Any] = []
    while isinstance(env, gymnasium.Wrapper):
        found.append(env)
        env = env.env
    return found
