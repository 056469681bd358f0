"""N Gymnasium environments that step one after the other, as one vector environment that resets in the same step.

Gymnasium's own one joins the infos of all simulators, and fails where their types or shapes differ; nobody reads them
here, and none is kept. What an environment gives is copied at once, as it may give the same array again and again, and
looked at: what does not have the shape and the type that its space says is told with the simulator's number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from gala_mpi.user_code import SimulatorError, summary, user_code

FLAGS, NUMBERS = "biu", "biuf"
# What Gymnasium's methods give.
RESET, STEP = ("observation", "info"), ("observation", "reward", "terminated", "truncated", "info")

Array = npt.NDArray[Any]


class SerialVectorEnv(VectorEnv[Any, Any, Any]):
    """The environments that `makers` make, which must have the same spaces: a Box to see, and Discrete actions.

    `step` gives observations (N, ...) of the space's type, rewards (N,) float64, flags (N,), and infos with nothing but
    `final_obs`: for each simulator whose episode ended the last observation of it, None for the others.

    Raises SimulatorError if an environment cannot be made or reset, gives something else, or has other spaces.
    """

    def __init__(self, makers: Sequence[Callable[[], gymnasium.Env[Any, Any]]]) -> None:
        self.envs: list[gymnasium.Env[Any, Any]] = []
        try:
            self._take_spaces(self._make(makers))
        except BaseException:
            # Their threads and windows would outlive what is refused.
            with contextlib.suppress(Exception):
                self.close_extras()
            raise
        self.spec = self.envs[0].spec
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def _make(self, makers: Sequence[Callable[[], gymnasium.Env[Any, Any]]]) -> list[tuple[Any, Any]]:
        """Make the environments; the spaces of each, to see and to act."""
        try:
            with user_code(lambda: f"making simulator {len(self.envs)} of this rank"):
                for make in makers:
                    self.envs.append(make())
                return [(env.observation_space, env.action_space) for env in self.envs]
        except SimulatorError:
            raise
        except Exception as error:
            number = len(self.envs)
            raise SimulatorError(f"simulator {number} of this rank cannot be made ({summary(error)})") from error

    def _take_spaces(self, spaces: list[tuple[Any, Any]]) -> None:
        """Set this environment's spaces. Raises SimulatorError if those of its environments differ."""
        for index, others in enumerate(spaces):
            if others != spaces[0]:
                raise SimulatorError(f"simulator {index} of this rank has other spaces than simulator 0: {others}")
        self.num_envs = len(spaces)
        self.single_observation_space, self.single_action_space = spaces[0]
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Begin an episode in every environment, seeded by `seed` and its successors."""
        seeds = [seed + index for index in range(self.num_envs)] if isinstance(seed, int) else seed
        observations, index = self._room(), 0
        try:
            with user_code(lambda: f"simulator {index} of this rank"):
                for index, env in enumerate(self.envs):
                    found = env.reset(seed=seeds[index] if seeds else None, options=options)
                    self._keep(observations, index, "reset", _parts(found, index, "reset", RESET)[0])
        except SimulatorError:
            raise
        except Exception as error:
            raise SimulatorError(f"simulator {index} of this rank cannot be reset ({summary(error)})") from error
        return observations, {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Take `actions` (N,), and begin a new episode where one ends."""
        count, index = self.num_envs, 0
        observations, rewards = self._room(), np.zeros(count)
        terminated, truncated = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        finals: Array | None = None
        with user_code(lambda: f"simulator {index} of this rank"):
            for index, env in enumerate(self.envs):
                seen, reward, ended, cut, _ = _parts(env.step(actions[index]), index, "step", STEP)
                self._keep(observations, index, "step", seen)
                rewards[index] = reward if type(reward) is float else _scalar("a reward", reward, index, NUMBERS)
                terminated[index] = ended if type(ended) is bool else _flag("terminated", ended, index)
                truncated[index] = cut if type(cut) is bool else _flag("truncated", cut, index)
                if terminated[index] or truncated[index]:
                    if finals is None:
                        finals = np.full(count, None)
                    finals[index] = observations[index].copy()
                    self._keep(observations, index, "reset", _parts(env.reset(), index, "reset", RESET)[0])
        return observations, rewards, terminated, truncated, {} if finals is None else {"final_obs": finals}

    def close_extras(self, **_: Any) -> None:
        """Close all environments, also if some cannot be closed; then raises what the first of them raised."""
        errors: list[Exception] = []
        for index, env in enumerate(self.envs):
            try:
                with user_code(lambda index=index: f"closing simulator {index} of this rank"):  # type: ignore[misc]
                    env.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _room(self) -> Array:
        space = self.single_observation_space
        return np.empty((self.num_envs, *(space.shape or ())), space.dtype)

    def _keep(self, observations: Array, index: int, method: str, seen: object) -> None:
        """Copy what a simulator's method shows into its row. Raises SimulatorError if it does not fit."""
        row = observations[index]
        if type(seen) is np.ndarray and seen.dtype == row.dtype and seen.shape == row.shape:
            row[...] = seen
            return
        found = _array(seen)
        if found is None or found.shape != row.shape or not np.can_cast(found.dtype, row.dtype, "same_kind"):
            what = f"{seen!r:.80}" if found is None else f"of shape {found.shape} and type {found.dtype}"
            raise SimulatorError(
                f"{method} of simulator {index} of this rank gave an observation {what}; its space says {row.shape} "
                f"and {row.dtype}"
            )
        # What this type cannot hold becomes infinite, and is told with all that is.
        with np.errstate(over="ignore"):
            row[...] = found


def check_spaces(observations: object, actions: object) -> str:
    """What a task must have that one with these spaces has not; empty if it can be served."""
    if not isinstance(actions, Discrete) or actions.start != 0:
        return f"a task with Discrete actions from 0, not {actions}"
    if not isinstance(observations, Box) or len(observations.shape) != 1:
        return f"a task with flat Box observations, not {observations}"
    dtype = observations.dtype
    if not dtype.isnative or dtype.itemsize > 8 or dtype.kind not in NUMBERS:
        return (
            f"a task with observations of a type that torch has, not {dtype.str} ({dtype.name}): give them as float32"
        )
    return ""


def _parts(found: object, index: int, method: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    """What a method gave, if it is what Gymnasium's interface says. Raises SimulatorError."""
    if not isinstance(found, tuple) or len(found) != len(names):
        what = f"{len(found)} values" if isinstance(found, tuple) else f"{type(found).__name__}"
        raise SimulatorError(
            f"simulator {index} of this rank gave {what} from {method}; expected ({', '.join(names)}), Gymnasium's "
            "interface since 0.26"
        )
    return found


def _array(value: object) -> Array | None:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _scalar(name: str, value: object, index: int, kinds: str) -> Any:
    """The one number in `value`. Raises SimulatorError if it holds none of these kinds, or several."""
    found = _array(value)
    if found is None or found.size != 1 or found.dtype.kind not in kinds:
        expected = "a number" if kinds is NUMBERS else "True or False"
        raise SimulatorError(f"simulator {index} of this rank gave {name} of {value!r:.80}; expected {expected}")
    return found.item()


def _flag(name: str, value: object, index: int) -> bool:
    # None is what functions give that forget to say.
    return value is not None and bool(_scalar(name, value, index, FLAGS))
