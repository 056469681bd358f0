"""The vector environment: Gymnasium's own to the bit where that works; where it does not, right, or a clear refusal."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gala_mpi.config import ConfigError, EnvironmentConfig
from gala_mpi.learning.environments import SimulatorError, Simulators, make_simulators
from gala_mpi.learning.vector_env import SerialVectorEnv, check_spaces
from gala_mpi.user_code import EndedProgramError


class Task(gymnasium.Env[Any, Any]):
    """Observation [steps, 0] in one array again and again, cut after three steps; `gives` changes what a step gives."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,)), Discrete(2)

    def __init__(
        self, number: int, gives: Callable[[int, int, tuple], Any] = lambda _number, _step, given: given
    ) -> None:
        self._number, self._gives, self._steps, self._shown = number, gives, 0, np.zeros(2, np.float32)

    def _show(self) -> np.ndarray:
        self._shown[:] = self._steps, 0
        return self._shown

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._steps = 0
        return self._gives(self._number, 0, (self._show(), {}))

    def step(self, action: Any) -> Any:
        self._steps += 1
        return self._gives(self._number, self._steps, (self._show(), 1.0, False, self._steps == 3, {}))


def vector(count: int, **options: Any) -> SerialVectorEnv:
    return SerialVectorEnv([lambda number=number: Task(number, **options) for number in range(count)])


def changed(place: int, value: object) -> Callable[[int, int, tuple], Any]:
    """Simulator 1 gives something else in its second step."""

    def gives(number: int, step: int, given: tuple) -> tuple:
        return (*given[:place], value, *given[place + 1 :]) if (number, step) == (1, 2) else given

    return gives


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"])
def test_steps_are_those_of_gymnasiums_own(env: str) -> None:
    makers = [lambda: gymnasium.make(env, max_episode_steps=60)] * 3
    ours, theirs = SerialVectorEnv(makers), SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    ends = 0
    for _ in range(300):
        actions = rng.integers(0, 2, 3)
        mine, other = ours.step(actions), theirs.step(actions)
        for one, another in zip(mine[:4], other[:4], strict=True):
            assert one.dtype == another.dtype
            np.testing.assert_array_equal(one, another)
        for row in np.flatnonzero(mine[2] | mine[3]):
            ends += 1
            np.testing.assert_array_equal(mine[4]["final_obs"][row], other[4]["final_obs"][row])
    assert ends >= 9


def test_a_buffer_that_is_used_again_is_copied_at_once() -> None:
    simulators = Simulators(vector(2))
    before = simulators.reset(1)
    steps = [simulators.step(np.zeros(2, np.int64)) for _ in range(3)]
    assert before.tolist() == [[0, 0]] * 2 and steps[0].observations.tolist() == [[1, 0]] * 2
    cut = steps[2]
    # The reset has written into the same array since.
    assert cut.truncated.all() and cut.final_observations is not None
    assert cut.final_observations.tolist() == [[3, 0]] * 2 and cut.observations.tolist() == [[0, 0]] * 2


@pytest.mark.parametrize(
    "infos", [[None, 1], [1, "boss"], [{"a": 1}, "nothing"], [np.zeros(2), np.zeros(3)], ["three", 3]]
)
def test_infos_are_nobodys_concern(infos: list[object]) -> None:
    """Of other types or shapes in each simulator and step."""
    env = vector(2, gives=lambda number, step, given: (*given[:-1], {"lives": infos[(number + step) % 2]}))
    env.reset(seed=1)
    for _ in range(5):
        assert env.step(np.zeros(2, np.int64))[4].keys() <= {"final_obs"}


@pytest.mark.parametrize("reward", [1, True, np.float32(1), np.array([1.0]), np.array(1), np.array([[1]]), [1.0]])
def test_one_number_is_a_reward_however_it_is_given(reward: object) -> None:
    env = vector(2, gives=changed(1, reward))
    env.reset(seed=1)
    assert [env.step(np.zeros(2, np.int64))[1].tolist() for _ in range(2)] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("flag", [1, np.True_, np.array(True), np.array([True]), np.int8(1), [True]])
@pytest.mark.parametrize("place", [2, 3])
def test_one_truth_is_a_flag_however_it_is_given(place: int, flag: object) -> None:
    env = vector(2, gives=changed(place, flag))
    env.reset(seed=1)
    env.step(np.zeros(2, np.int64))
    assert env.step(np.zeros(2, np.int64))[place].tolist() == [False, True]


REFUSED: dict[str, tuple[int, object, str]] = {
    "no reward": (1, None, "a reward of None; expected a number"),
    "two rewards": (1, [1.0, 2.0], r"a reward of \[1.0, 2.0\]; expected a number"),
    "a complex reward": (1, 1j, "a reward of 1j"),
    "a word for a reward": (1, "1", "a reward of '1'"),
    "a word for a flag": (2, "no", "terminated of 'no'; expected True or False"),
    "a number for a flag": (3, 0.5, "truncated of 0.5"),
    "two flags": (3, [True, False], "truncated of"),
    "a longer observation": (
        0,
        np.zeros(3, np.float32),
        r"an observation of shape \(3,\) and type float32; its space says \(2,\)",
    ),
    "a column": (0, np.zeros((2, 1), np.float32), r"an observation of shape \(2, 1\)"),
    "a scalar": (0, 0.0, r"an observation of shape \(\)"),
    "complex numbers": (0, np.zeros(2, np.complex64), r"an observation of shape \(2,\) and type complex64"),
    "words": (0, ["a", "b"], "an observation"),
    "ragged lists": (0, [[1.0], [1.0, 2.0]], "an observation"),
    "no observation": (0, None, "an observation"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_with_the_simulators_number(what: str) -> None:
    place, value, said = REFUSED[what]
    env = vector(2, gives=changed(place, value))
    env.reset(seed=1)
    env.step(np.zeros(2, np.int64))
    method = "step of " if place == 0 else "^"
    with pytest.raises(SimulatorError, match=f"{method}simulator 1 of this rank gave {said}"):
        env.step(np.zeros(2, np.int64))


@pytest.mark.parametrize("begins", ["first", "again"])
def test_an_observation_of_reset_that_does_not_fit_is_told_as_that_of_reset(begins: str) -> None:
    longer = np.zeros(3, np.float32)
    resets = itertools.count()

    def gives(_number: int, _step: int, given: tuple[object, ...]) -> tuple[object, ...]:
        # Two simulators: the third reset is that at the end of the first episode.
        is_reset = len(given) == 2
        return (longer, {}) if is_reset and next(resets) == (2 if begins == "again" else 0) else given

    env = vector(2, gives=gives)
    with pytest.raises(SimulatorError, match=r"^reset of simulator 0 of this rank gave an observation of shape \(3,\)"):
        env.reset(seed=1)
        for _ in range(5):
            env.step(np.zeros(2, np.int64))


@pytest.mark.parametrize("observation", [[1.0, 0], (True, False), np.array([1, 0], np.int64), np.array([1.0, 0.0])])
def test_an_observation_of_a_type_that_the_spaces_takes_is_taken(observation: object) -> None:
    env = vector(2, gives=changed(0, observation))
    env.reset(seed=1)
    env.step(np.zeros(2, np.int64))
    seen = env.step(np.zeros(2, np.int64))[0]
    assert seen.dtype == np.float32 and seen[1].tolist() == [1, 0]


def test_the_interface_before_gymnasium_is_refused_by_name() -> None:
    with pytest.raises(SimulatorError, match=r"simulator 0 .* ndarray from reset; expected \(observation, info\)"):
        vector(2, gives=lambda _number, _step, given: given[0]).reset(seed=1)
    env = vector(2, gives=lambda _number, step, given: given[:4] if step else given)
    env.reset(seed=1)
    with pytest.raises(
        SimulatorError, match=r"simulator 0 .* 4 values from step; expected \(observation, reward, term"
    ):
        env.step(np.zeros(2, np.int64))


def test_a_tuple_with_names_is_a_tuple() -> None:
    kinds = {5: collections.namedtuple("Step", "a b c d e"), 2: collections.namedtuple("Reset", "a b")}
    env = vector(2, gives=lambda _number, _step, given: kinds[len(given)](*given))
    env.reset(seed=1)
    assert env.step(np.zeros(2, np.int64))[1].tolist() == [1, 1]


@pytest.mark.parametrize("failing", ["close", "make", "spaces"])
def test_all_that_were_made_are_closed(failing: str) -> None:
    closed: list[int] = []

    class Closing(Task):
        def close(self) -> None:
            closed.append(self._number)
            if failing == "close" and self._number == 0:
                raise ValueError("the window is gone")

    def make(number: int) -> Closing:
        if failing == "make" and number == 2:
            raise ValueError("no more")
        made = Closing(number)
        if failing == "spaces" and number == 2:
            made.action_space = Discrete(3)
        return made

    makers = [lambda number=number: make(number) for number in range(3)]
    if failing == "make":
        with pytest.raises(SimulatorError, match="simulator 2 of this rank cannot be made"):
            SerialVectorEnv(makers)
        assert closed == [0, 1]
    elif failing == "spaces":
        with pytest.raises(SimulatorError, match="simulator 2 of this rank has other spaces"):
            SerialVectorEnv(makers)
        assert closed == [0, 1, 2]
    else:
        with pytest.raises(ValueError, match="the window is gone"):
            SerialVectorEnv(makers).close()
        assert closed == [0, 1, 2]


def test_simulators_that_the_learner_cannot_serve_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    class Continuous(Task):
        action_space = Box(-1, 1, (1,))

        def close(self) -> None:
            closed.append(self._number)

    monkeypatch.setattr(gymnasium, "make", lambda _env: Continuous(len(closed)))
    with pytest.raises(ConfigError, match="Discrete actions"):
        make_simulators(EnvironmentConfig(env="CartPole-v1", simulators=3), threads=1)
    assert len(closed) == 3


def test_what_an_environment_raises_names_its_simulator() -> None:
    def broken(number: int, step: int, given: tuple) -> tuple:
        if (number, step) == (1, 2):
            raise ZeroDivisionError("physics")
        return given

    env = vector(3, gives=broken)
    env.reset(seed=1)
    env.step(np.zeros(3, np.int64))
    with pytest.raises(ZeroDivisionError) as found:
        env.step(np.zeros(3, np.int64))
    assert found.value.__notes__ == ["(simulator 1 of this rank)"]


def test_a_program_that_is_ended_names_its_simulator() -> None:
    def ends(number: int, step: int, given: tuple) -> tuple:
        if (number, step) == (1, 0):
            raise SystemExit(0)
        return given

    with pytest.raises(EndedProgramError, match="simulator 1 of this rank would have ended the program"):
        vector(3, gives=ends).reset(seed=1)


def test_environments_of_different_spaces_are_refused() -> None:
    def narrow() -> Task:
        task = Task(1)
        task.action_space = Discrete(3)
        return task

    with pytest.raises(SimulatorError, match="simulator 1 of this rank has other spaces"):
        SerialVectorEnv([lambda: Task(0), narrow])


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, np.uint8, np.uint16, np.int64, np.uint64, np.bool_]
)
def test_types_that_torch_has_are_served(dtype: type) -> None:
    assert check_spaces(Box(0, 1, (2,), dtype), Discrete(2)) == ""


@pytest.mark.parametrize("dtype", [np.longdouble, np.dtype(">f4"), np.dtype(">i8")])
def test_types_that_torch_lacks_are_refused(dtype: Any) -> None:
    assert "of a type that torch has" in check_spaces(Box(0, 1, (2,), dtype), Discrete(2))


@pytest.mark.parametrize(
    ("value", "said"), [(1e300, r"element 1 is 1e\+300"), (-np.inf, "-inf"), (np.nan, "nan"), (3.5e38, r"3\.5e\+38")]
)
def test_what_float32_cannot_hold_is_told_as_it_was_given(value: float, said: str) -> None:
    """Finite in float64, the type of the space."""

    class Wide(Task):
        observation_space = Box(-np.inf, np.inf, (2,), np.float64)

    makers = [lambda number=number: Wide(number, changed(0, np.array([0.0, value]))) for number in range(2)]
    simulators = Simulators(SerialVectorEnv(makers))
    simulators.reset(1)
    simulators.step(np.zeros(2, np.int64))
    with pytest.raises(SimulatorError, match=f"simulator 1 of this rank gave observations that are not finite.*{said}"):
        simulators.step(np.zeros(2, np.int64))


@pytest.mark.parametrize(("reward", "refused"), [(1e25, True), (-1e16, True), (1e14, False), (1e39, True)])
def test_rewards_whose_returns_have_no_square_are_refused(reward: float, refused: bool) -> None:
    simulators = Simulators(vector(2, gives=changed(1, reward)))
    simulators.reset(1)
    simulators.step(np.zeros(2, np.int64))
    if refused:
        with pytest.raises(
            SimulatorError, match=r"simulator 1 of this rank gave rewards that are not finite in float32, .*1e\+"
        ):
            simulators.step(np.zeros(2, np.int64))
    else:
        assert simulators.step(np.zeros(2, np.int64)).rewards.tolist() == pytest.approx([1, reward])
