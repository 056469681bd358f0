"""Simulators that were saved and restored go on as those that never stopped."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from scripted import vector
from test_environments import TERMINATES

from gala_mpi.config import EnvironmentConfig
from gala_mpi.learning import simulator_state
from gala_mpi.learning.environments import Simulators, Step, make_simulators
from gala_mpi.learning.networks import MLPPolicy
from gala_mpi.learning.rollout import Collector
from gala_mpi.learning.vector_env import SerialVectorEnv

CLASSIC = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


def make(env: str, count: int = 3) -> Simulators:
    return make_simulators(EnvironmentConfig(env=env, simulators=count), 1)


def play(simulators: Simulators, steps: int, seed: int) -> list[Step]:
    actions = np.random.default_rng(seed).integers(0, simulators.actions, (steps, simulators.count))
    return [simulators.step(row) for row in actions]


@pytest.mark.parametrize("env", CLASSIC)
@pytest.mark.parametrize("before", [0, 1, 37, 250])
def test_what_was_restored_goes_on_to_the_bit(env: str, before: int) -> None:
    first, second = make(env), make(env)
    first.reset(1)
    second.reset(2)
    play(first, before, 3)
    state = first.state()
    assert state is not None
    play(second, 11, 5)
    second.restore({name: values.copy() for name, values in state.items()})
    # Far enough for several episodes to end, by their own rules or a limit of steps, and for others to begin.
    expected, found = play(first, 600, 4), play(second, 600, 4)
    assert sum(len(step.episodes) for step in expected) > 2
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one.observations, other.observations)
        np.testing.assert_array_equal(one.rewards, other.rewards)
        assert one.episodes == other.episodes
        assert (one.terminated == other.terminated).all() and (one.truncated == other.truncated).all()


def test_a_state_is_a_copy() -> None:
    simulators = make("CartPole-v1")
    simulators.reset(1)
    state = simulators.state()
    assert state is not None
    before = {name: values.copy() for name, values in state.items()}
    play(simulators, 50, 1)
    assert all(np.array_equal(state[name], values) for name, values in before.items())


def test_what_cannot_be_saved_says_so() -> None:
    for simulators in (make("ALE/Pong-v5", 1), Simulators(vector(AutoresetMode.NEXT_STEP, TERMINATES))):
        simulators.reset(1)
        assert simulators.state() is None
        with pytest.raises(ValueError, match="state"):
            simulators.restore({})


def test_a_wrapper_with_a_state_of_its_own_is_not_half_saved() -> None:
    """Observations that are normalised by statistics that were lost would be of other values."""
    plain = SerialVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    plain.reset(seed=1)
    assert simulator_state.save(plain) is not None
    wrapped = SerialVectorEnv([lambda: gymnasium.wrappers.NormalizeObservation(gymnasium.make("CartPole-v1"))] * 2)
    wrapped.reset(seed=1)
    assert simulator_state.save(wrapped) is None


@pytest.mark.parametrize("value", [1e300, -1e7, np.nan, np.inf])
def test_a_state_that_no_simulator_comes_to_is_refused(value: float) -> None:
    """Acrobot would turn an angle of 1e300 back into a circle by steps of 2 pi."""
    simulators = make("Acrobot-v1", 2)
    simulators.reset(1)
    state = simulators.state()
    assert state is not None
    state["1.state"] = np.array([0.0, value, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"1\.state is out of range"):
        simulators.restore(state)
    again = simulators.state()
    assert again is not None
    again["returns"] = np.array([0.0, value if not np.isfinite(value) else np.nan])
    with pytest.raises(ValueError, match="returns is not finite"):
        simulators.restore(again)


def test_the_state_of_other_simulators_is_refused_and_changes_nothing() -> None:
    simulators, others = make("CartPole-v1", 3), make("CartPole-v1", 4)
    simulators.reset(1)
    others.reset(1)
    before = simulators.state()
    more = others.state()
    assert before is not None and more is not None
    cut = {name: values for name, values in before.items() if name != "2.stream"}
    wrong = before | {"1.state": np.zeros(5)}
    texts = before | {"1.state": np.array(["a", "b", "c", "d"])}
    for state in (more, cut, wrong, texts, {}):
        with pytest.raises(ValueError, match="state"):
            simulators.restore(state)
    after = simulators.state()
    assert after is not None and all(np.array_equal(after[name], values) for name, values in before.items())


def collector(seed: int) -> tuple[Collector, torch.Generator]:
    simulators = make("CartPole-v1")
    policy = MLPPolicy(4, (8,), 2, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return Collector(simulators, policy, 5, seed, generator), generator


def test_rollouts_go_on_to_the_bit() -> None:
    first, second = collector(1)[0], collector(2)[0]
    first.collect()
    assert second.restore(first.state())
    for _ in range(20):
        one, other = first.collect(), second.collect()
        for name in ("log_probs", "values", "rewards", "terminated", "last_values"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_without_the_simulators_the_stream_of_actions_goes_on_alone() -> None:
    (first, drawn), (second, restored) = collector(1), collector(2)
    first.collect()
    state = {name: values for name, values in first.state().items() if name == "actions.stream"}
    assert not second.restore(state)
    assert torch.equal(drawn.get_state(), restored.get_state())
    # A stream of another kind stays away.
    assert not second.restore({"actions.stream": np.zeros(16, np.uint8)})
    assert torch.equal(drawn.get_state(), restored.get_state())
