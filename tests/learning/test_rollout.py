"""Returns and rollouts, worked out by hand: what ends, what is cut short, and what the policy saw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import vector
from test_environments import LIVES, MODES, TERMINATES, TRUNCATES

from gala_mpi.learning.environments import Episode, Simulators
from gala_mpi.learning.networks import MLPPolicy
from gala_mpi.learning.rollout import Collector, Rollout, n_step_returns


def rollout_of(
    rewards: list[list[float]],
    terminated: list[list[bool]],
    truncated: list[list[bool]],
    truncated_values: list[list[float]],
    last_values: list[float],
    valid: list[list[bool]] | None = None,
) -> Rollout:
    shape = torch.tensor(rewards).shape
    zeros = torch.zeros(shape)
    return Rollout(
        evaluate=lambda: (zeros.clone(), zeros.clone(), zeros.clone()),
        is_last=lambda: True,
        rewards=torch.tensor(rewards),
        terminated=torch.tensor(terminated),
        truncated=torch.tensor(truncated),
        valid=torch.ones(shape, dtype=torch.bool) if valid is None else torch.tensor(valid),
        truncated_values=torch.tensor(truncated_values),
        last_values=torch.tensor(last_values),
        episodes=[],
    )


def column(values: list[float]) -> list[list[float]]:
    return [[value] for value in values]


NO = column([False, False, False])


@pytest.mark.parametrize(
    ("terminated", "truncated", "truncated_values", "last", "expected"),
    [
        # Nothing ends: 4 + 0.5 * 8 = 8, 2 + 0.5 * 8 = 6, 1 + 0.5 * 6 = 4.
        ([0, 0, 0], [0, 0, 0], [0, 0, 0], 8.0, [4, 6, 8]),
        # Over at the second step: nothing of the value after it comes in; the third is of the next episode.
        ([0, 1, 0], [0, 0, 0], [0, 0, 0], 8.0, [2, 2, 8]),
        # Cut at the second step: its final observation was worth 10: 2 + 0.5 * 10 = 7, 1 + 0.5 * 7 = 4.5.
        ([0, 0, 0], [0, 1, 0], [0, 10, 0], 8.0, [4.5, 7, 8]),
        # Over, or cut, at the last step: the value of what comes after does not matter.
        ([0, 0, 1], [0, 0, 0], [0, 0, 0], 1e6, [3, 4, 4]),
        ([0, 0, 0], [0, 0, 1], [0, 0, 6], 1e6, [3.75, 5.5, 7]),
    ],
)
def test_returns_worked_out_by_hand(
    terminated: list[int], truncated: list[int], truncated_values: list[float], last: float, expected: list[float]
) -> None:
    rollout = rollout_of(
        column([1.0, 2.0, 4.0]),
        column([bool(flag) for flag in terminated]),
        column([bool(flag) for flag in truncated]),
        column([float(value) for value in truncated_values]),
        [last],
    )
    assert n_step_returns(rollout, 0.5).squeeze(1).tolist() == expected


def test_simulators_side_by_side_do_not_mix() -> None:
    # Gamma 0.5. One simulator plays on, one is over at the second step, one is cut there, and one is over at the
    # first step and then only resets: its second row holds what it may, and is no part of either game.
    rollout = rollout_of(
        [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 1e6], [4.0, 4.0, 4.0, 4.0]],
        [[False, False, False, True], [False, True, False, False], [False] * 4],
        [[False] * 4, [False, False, True, False], [False] * 4],
        [[0.0] * 4, [0.0, 0.0, 10.0, 0.0], [0.0] * 4],
        [8.0, 16.0, 24.0, 32.0],
        [[True] * 4, [True, True, True, False], [True] * 4],
    )
    returns = n_step_returns(rollout, 0.5)
    # 4 + 0.5 * (8, 16, 24, 32) in the last row.
    assert returns[2].tolist() == [8, 12, 16, 20]
    # 2 + 0.5 * 8; over: 2; cut: 2 + 0.5 * 10.
    assert returns[1, :3].tolist() == [6, 2, 7]
    # 1 + 0.5 * (6, 2, 7); over: 1.
    assert returns[0].tolist() == [4, 2, 4.5, 1]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 5))
def test_returns_agree_with_a_plain_recursion(seed: int, steps: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rewards, cut_values, last = rng.normal(size=(steps, count)), rng.normal(size=(steps, count)), rng.normal(size=count)
    terminated = rng.random((steps, count)) < 0.2
    truncated = (rng.random((steps, count)) < 0.2) & ~terminated

    def plain(t: int, i: int) -> float:
        if t == steps:
            return float(last[i])
        if terminated[t, i]:
            return float(rewards[t, i])
        following = cut_values[t, i] if truncated[t, i] else plain(t + 1, i)
        return float(rewards[t, i] + 0.9 * following)

    arrays = (rewards, terminated, truncated, cut_values, last)
    found = n_step_returns(rollout_of(*(array.tolist() for array in arrays)), 0.9)
    expected = [[plain(t, i) for i in range(count)] for t in range(steps)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


class Watched(MLPPolicy):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__(2, (8,), 3, torch.Generator().manual_seed(1))
        self.shown: list[np.ndarray] = []

    def prepare(self, observations: torch.Tensor, inputs: torch.Tensor) -> None:
        self.shown.append(observations.numpy().copy())
        super().prepare(observations, inputs)


def collector(policy: MLPPolicy, mode: AutoresetMode, steps: int) -> Collector:
    simulators = Simulators(vector(mode, TERMINATES, TRUNCATES))
    return Collector(simulators, policy, steps, 1, torch.Generator().manual_seed(2))


@MODES
def test_the_value_of_the_final_observation_is_kept_where_an_episode_was_cut(mode: AutoresetMode) -> None:
    policy = Watched()
    rollout = collector(policy, mode, 4).collect()
    with torch.no_grad():
        final = policy(torch.tensor([[0.0, 2.0]]))[1].item()
    expected = torch.zeros(4, 2)
    # The second task is cut after steps 2 and, without a step lost to the reset, 4.
    expected[1, 1] = final
    if mode is AutoresetMode.SAME_STEP:
        expected[3, 1] = final
    torch.testing.assert_close(rollout.truncated_values, expected)


def test_the_policy_sees_each_observation_once_and_goes_on_where_it_was() -> None:
    policy = Watched()
    collects = collector(policy, AutoresetMode.SAME_STEP, 2)
    first, second = (collects.collect().rewards[:, 0].tolist() for _ in range(2))
    shown = [observations[0].tolist() for observations in policy.shown if len(observations) == 2]
    # Two steps, then the value of what follows; the next rollout begins there.
    assert shown == [[0, 0], [0, 1], [0, 2], [0, 2], [0, 0], [0, 1]]
    assert first == [1, 2] and second == [4, 1]


def test_a_rollout_that_is_over_gives_no_values_of_the_next_one() -> None:
    collects = collector(Watched(), AutoresetMode.SAME_STEP, 2)
    asked, not_asked = collects.collect(), collects.collect()
    assert not_asked.log_probs.shape == (2, 2)
    collects.collect()
    with pytest.raises(RuntimeError, match="another rollout has been taken since"):
        _ = asked.values
    with pytest.raises(RuntimeError, match="gone on since"):
        not_asked.values.sum().backward()


@MODES
def test_values_and_log_probabilities_are_those_of_the_actions_taken(mode: AutoresetMode) -> None:
    policy = Watched()
    rollout = collector(policy, mode, 5).collect()
    shown = [observations for observations in policy.shown if len(observations) == 2][:5]
    logits, values = policy(torch.from_numpy(np.concatenate(shown)))
    torch.testing.assert_close(rollout.values.flatten(), values)
    log_policy = torch.log_softmax(logits, 1)
    torch.testing.assert_close(rollout.entropies.flatten(), torch.distributions.Categorical(logits=logits).entropy())
    distance = (rollout.log_probs.flatten()[:, None] - log_policy).abs().min(1).values
    assert distance.max() < 1e-6
    assert rollout.log_probs.requires_grad and not rollout.last_values.requires_grad


def test_actions_follow_the_policys_probabilities() -> None:
    policy = Watched()
    with torch.no_grad():
        policy.actor[-1].weight.zero_()
        policy.actor[-1].bias.copy_(torch.log(torch.tensor([0.7, 0.2, 0.1])))
    env = vector(AutoresetMode.SAME_STEP, TERMINATES)
    collects = Collector(Simulators(env), policy, 4000, 1, torch.Generator().manual_seed(3))
    collects.collect()
    shares = np.bincount(env.envs[0].unwrapped.actions, minlength=3) / 4000
    # Five standard errors of a share of 0.7 among 4000.
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=5 * np.sqrt(0.21 / 4000))


@MODES
def test_no_return_that_is_learned_from_holds_what_a_row_that_is_not_valid_gave(mode: AutoresetMode) -> None:
    simulators = Simulators(vector(mode, LIVES, TERMINATES, TRUNCATES), episodic_life=True, fire_after_life=True)
    rollout = Collector(simulators, Watched(), 9, 1, torch.Generator().manual_seed(2)).collect()
    assert (~rollout.valid).any(0)[0] and (mode is AutoresetMode.SAME_STEP or (~rollout.valid).any(0).all())
    before = n_step_returns(rollout, 0.9)
    rollout.rewards[~rollout.valid] = 1e6
    after = n_step_returns(rollout, 0.9)
    assert torch.equal(before[rollout.valid], after[rollout.valid])
    assert not torch.equal(before, after)


@MODES
def test_a_rollout_brings_every_game_that_ended_in_it(mode: AutoresetMode) -> None:
    collects = collector(Watched(), mode, 6)
    # Games of 3 and of 2 steps; a reset of its own makes them 4 and 3.
    same = [Episode(1, 24.0, 2), Episode(0, 7.0, 3), Episode(1, 24.0, 2), Episode(0, 7.0, 3), Episode(1, 24.0, 2)]
    following = [Episode(1, 24.0, 2), Episode(0, 7.0, 3), Episode(1, 24.0, 2)]
    assert collects.collect().episodes == (following if mode is AutoresetMode.NEXT_STEP else same)
