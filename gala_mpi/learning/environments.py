"""Simulators: one interface over ALE's vector environment and Gymnasium's, right at the edges of episodes.

What differs between environments is settled here, once: the autoreset mode, lost lives, clipped rewards,
and statistics of whole games. The learner sees rows that are valid or not, terminated or truncated.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from gala_mpi.config import ConfigError, EnvironmentConfig
from gala_mpi.files import first_line
from gala_mpi.learning import simulator_state
from gala_mpi.learning.vector_env import SerialVectorEnv, check_spaces
from gala_mpi.user_code import EndedProgramError, SimulatorError, summary, user_code

Bools = npt.NDArray[np.bool_]
FIRE = 1
# The square of a return, of many such rewards, is still far from what float32 cannot hold.
LARGEST_REWARD = 1e15
LARGEST_OBSERVATION = float(np.finfo(np.float32).max)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Episode:
    """A finished game: its simulator, the sum of its unclipped rewards, and its length in agent steps."""

    env_index: int
    episode_return: float
    length: int


@dataclass(frozen=True)
class Step:
    """What one step of N simulators gave; arrays are (N,) but for the observations (N, ...).

    `valid` is False where the policy's action was not taken: such a row belongs in no loss. A row is never
    both terminated and truncated. `final_observations` holds, for the truncated rows in order, the
    observation to bootstrap from.
    """

    observations: npt.NDArray[Any]
    rewards: npt.NDArray[np.float32]
    terminated: Bools
    truncated: Bools
    valid: Bools
    final_observations: npt.NDArray[Any] | None
    episodes: list[Episode] = field(default_factory=list)


class Simulators:
    """N simulators that step together.

    `episodic_life` ends the learner's return at each lost life, while the game goes on and its statistics
    with it. `fire_after_life` presses FIRE after a lost life, as some games wait for it.
    """

    def __init__(
        self,
        vector_env: VectorEnv[Any, Any, Any],
        *,
        clip_rewards: bool = False,
        episodic_life: bool = False,
        fire_after_life: bool = False,
    ) -> None:
        self.env = vector_env
        self.count = vector_env.num_envs
        self.observation_shape: tuple[int, ...] = vector_env.single_observation_space.shape or ()
        assert isinstance(vector_env.single_action_space, gymnasium.spaces.Discrete)
        self.actions = int(vector_env.single_action_space.n)
        mode = vector_env.metadata["autoreset_mode"]
        if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise ValueError(f"autoreset mode {mode} is not handled; expected NEXT_STEP or SAME_STEP")
        self._resets_next_step = mode == AutoresetMode.NEXT_STEP
        self._clip_rewards, self._episodic_life = clip_rewards, episodic_life
        self._fire_after_life = fire_after_life
        self._returns = np.zeros(self.count)
        self._lengths = np.zeros(self.count, np.int64)
        self._lives = np.zeros(self.count, np.int64)
        self._resetting = np.zeros(self.count, np.bool_)
        self._fire_next = np.zeros(self.count, np.bool_)

    def reset(self, seed: int) -> npt.NDArray[Any]:
        """Start a game in every simulator; returns the observations (N, ...)."""
        observations, info = self.env.reset(seed=seed)
        self._check("observations", observations)
        self._returns[:], self._lengths[:] = 0, 0
        self._resetting[:], self._fire_next[:] = False, False
        if self._episodic_life:
            self._lives = np.array(info.get("lives", self._lives))
        return np.asarray(observations)

    def step(self, actions: npt.NDArray[np.int64]) -> Step:
        """Take `actions` (N,) in the simulators."""
        valid = ~(self._resetting | self._fire_next)
        if self._fire_after_life and self._fire_next.any():
            actions = np.where(self._fire_next, FIRE, actions)
        observations, rewards, terminated, truncated, info = self.env.step(actions)
        learned = np.sign(rewards) if self._clip_rewards else rewards
        self._check("rewards", learned, LARGEST_REWARD)
        self._check("observations", observations)
        # A row that only resets belongs to no game: neither its reward nor its flags count.
        playing = ~self._resetting
        terminated, truncated = terminated & playing, truncated & ~terminated & playing
        over = terminated | truncated
        self._returns += np.where(playing, rewards, 0)
        self._lengths += playing
        episodes = self._finish(over)
        lost_life = self._lost_lives(info, over)
        final = None
        if truncated.any():
            source = observations if self._resets_next_step else info["final_obs"]
            final = np.stack([source[row] for row in np.flatnonzero(truncated)])
            self._check("final observations", final)
        self._resetting = over & self._resets_next_step
        self._fire_next = lost_life & self._fire_after_life
        return Step(
            observations=observations,
            rewards=learned.astype(np.float32),
            terminated=terminated | (lost_life & ~over),
            truncated=truncated,
            valid=valid,
            final_observations=final,
            episodes=episodes,
        )

    @staticmethod
    def _check(name: str, values: npt.NDArray[Any], largest: float = LARGEST_OBSERVATION) -> None:
        """Raise SimulatorError if a value is not finite, or too large: one such row would make all parameters so."""
        if values.dtype.kind != "f":
            return
        finite = np.isfinite(values)
        fits = finite
        if values.dtype.itemsize > 4 or largest < LARGEST_OBSERVATION:
            fits = finite & (np.abs(values) <= largest)
        if fits.all():
            return
        place = tuple(map(int, np.argwhere(~fits)[0]))
        gave = f"simulator {place[0]} of this rank gave {name} that are not finite"
        if not finite[place]:
            raise SimulatorError(f"{gave} ({' '.join(str(values[place[0]]).split())}): mend the environment")
        where = f"element {', '.join(map(str, place[1:]))} is " if place[1:] else ""
        raise SimulatorError(
            f"{gave} in float32, or have no square in it ({where}{values[place]:g}, above {largest:.2g}): scale them "
            "in a wrapper"
        )

    def state(self) -> dict[str, npt.NDArray[Any]] | None:
        """All that the next step depends on, by names, or None if the simulators cannot be saved."""
        state = simulator_state.save(self.env)
        return None if state is None else state | {name: own.copy() for name, own in self._own_state().items()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what `state` gave, after a reset. Raises ValueError if it is that of other simulators."""
        own = self._own_state()
        for name, values in own.items():
            found = state.get(name)
            if found is None or found.shape != values.shape or found.dtype != values.dtype:
                raise ValueError("the state is not one of these simulators")
            if not np.isfinite(found).all():
                raise ValueError(f"the state of {name} is not finite")
        simulator_state.restore(self.env, {name: values for name, values in state.items() if name not in own})
        for name, values in own.items():
            values[:] = state[name]

    def _own_state(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "returns": self._returns,
            "lengths": self._lengths,
            "lives": self._lives,
            "resetting": self._resetting,
            "fire_next": self._fire_next,
        }

    def _finish(self, over: Bools) -> list[Episode]:
        """The games that ended on this step; their simulators begin new ones."""
        episodes = [Episode(int(i), float(self._returns[i]), int(self._lengths[i])) for i in np.flatnonzero(over)]
        self._returns[over], self._lengths[over] = 0, 0
        return episodes

    def _lost_lives(self, info: dict[str, Any], over: Bools) -> Bools:
        """Rows that lost a life and play on."""
        if not self._episodic_life or "lives" not in info:
            return np.zeros(self.count, np.bool_)
        lost = (info["lives"] < self._lives) & ~over & ~self._resetting
        self._lives = np.array(info["lives"])
        return np.asarray(lost, np.bool_)

    def close(self) -> None:
        """Free the simulators. What goes wrong with that is a warning: all has been learned by then."""
        try:
            self.env.close()
        except Exception as error:
            log.warning("the simulators could not be closed (%s)", summary(error))


def is_atari(env: str) -> bool:
    """Whether a Gymnasium id is a game of the Arcade Learning Environment."""
    return env.startswith("ALE/")


def check_environment(env: str) -> None:
    """Raise ConfigError if the Gymnasium id is not known. Imports the module before a colon in it."""
    if is_atari(env):
        _atari_game(env)
        return
    module, colon, name = env.rpartition(":")
    if colon:
        _import(module, env)
    try:
        gymnasium.spec(name)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise ConfigError(
            "env", env, f"a Gymnasium id such as ALE/Pong-v5 or CartPole-v1 ({first_line(error)})"
        ) from error


def _import(module: str, env: str) -> None:
    """Import the module; what goes wrong within it is told as it is."""
    if not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError("env", env, "the name of a module before the colon")
    try:
        with user_code(lambda: f"the import of {module}"):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError("env", env, f"a module that can be imported before the colon ({error})") from error


@contextlib.contextmanager
def refused(env: str) -> Iterator[None]:
    """Before the first step, what is wrong with an environment is a refusal of it, in one line: ConfigError.

    Not so a program's end (EndedProgramError): that is told as it is.
    """
    try:
        yield
    except EndedProgramError:
        raise
    except SimulatorError as error:
        raise ConfigError("env", env, f"an environment that works, but {error}") from error


def make_simulators(config: EnvironmentConfig, threads: int) -> Simulators:
    """The simulators of one rank.

    Raises ConfigError if the id is not known, if they cannot be made, or have spaces that the learner cannot serve.
    """
    if is_atari(config.env):
        return _atari_simulators(config, threads)
    check_environment(config.env)
    with refused(config.env):
        # In this process: MPI forbids forking after its start, and processes of flat tasks cost more than they give.
        vector_env = SerialVectorEnv([lambda: gymnasium.make(config.env)] * config.simulators)
    if lacking := check_spaces(vector_env.single_observation_space, vector_env.single_action_space):
        with contextlib.suppress(Exception):
            vector_env.close()
        raise ConfigError("env", config.env, lacking)
    return Simulators(vector_env)


def _atari_simulators(config: EnvironmentConfig, threads: int) -> Simulators:
    from ale_py.vector_env import AtariVectorEnv

    vector_env = AtariVectorEnv(
        _atari_game(config.env),
        config.simulators,
        num_threads=min(threads, config.simulators),
        max_num_frames_per_episode=config.max_frames,
        repeat_action_probability=config.sticky_actions,
        autoreset_mode=AutoresetMode.SAME_STEP,
        frameskip=config.frame_skip,
        noop_max=config.noop_max,
        # ALE's own episodic life restarts the whole game at each lost life, and its clipping hides the score.
        episodic_life=False,
        reward_clipping=False,
        use_fire_reset=True,
    )
    fires = any(action.name == "FIRE" for action in vector_env.ale.get_action_set()[FIRE : FIRE + 1])
    return Simulators(
        vector_env,
        clip_rewards=config.clip_rewards,
        episodic_life=config.episodic_life,
        fire_after_life=config.episodic_life and fires,
    )


def _atari_game(env: str) -> str:
    """The ROM's name for an id such as ALE/MsPacman-v5."""
    import ale_py

    gymnasium.register_envs(ale_py)
    spec = gymnasium.registry.get(env)
    if spec is None or spec.kwargs.get("obs_type") == "ram":
        raise ConfigError("env", env, "a known game such as ALE/Pong-v5 or ALE/SpaceInvaders-v5")
    return str(spec.kwargs["game"])
