"""The update: a loss worked out by hand, and the parameters of a plain implementation of A2C."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_rollout import rollout_of

from gala_mpi.config import EnvironmentConfig, LearnerConfig
from gala_mpi.environments import Simulators, make_simulators
from gala_mpi.learner import Learner, actor_critic_loss
from gala_mpi.networks import AtariPolicy, MLPPolicy, Policy
from gala_mpi.parameters import FlatParameters
from gala_mpi.rollout import Collector, Rollout

CONFIG = LearnerConfig(gamma=0.5, value_weight=0.25, entropy_weight=0.1)


def hand_made() -> Rollout:
    """Two steps of two simulators; the second row of the second one is not valid."""
    rollout = rollout_of(
        [[1.0, 2.0], [3.0, 100.0]],
        [[False, True], [False, False]],
        [[False, False], [False, False]],
        [[0.0, 0.0], [0.0, 0.0]],
        [2.0, 50.0],
        [[True, True], [True, False]],
    )
    rollout.values = torch.tensor([[1.0, 5.0], [2.0, -40.0]], requires_grad=True)
    rollout.log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    rollout.entropies = torch.tensor([[0.3, 0.6], [0.9, 7.0]], requires_grad=True)
    return rollout


def test_the_loss_worked_out_by_hand() -> None:
    total, policy_loss, value_loss, entropy, returns = actor_critic_loss(hand_made(), CONFIG)
    # First simulator: 3 + 0.5 * 2 = 4 and 1 + 0.5 * 4 = 3; second, over at once: 2. Errors: 2, 2 and -3.
    assert returns[:, 0].tolist() == [3, 4] and returns[0, 1] == 2
    assert policy_loss.item() == pytest.approx(-(2 * -1 + 2 * -0.5 + -3 * -2) / 3)
    assert value_loss.item() == pytest.approx((4 + 4 + 9) / 3)
    assert entropy.item() == pytest.approx((0.3 + 0.9 + 0.6) / 3)
    assert total.item() == pytest.approx(-1 + 0.25 * 17 / 3 - 0.1 * 0.6)


def test_rows_that_are_not_valid_have_no_gradient() -> None:
    rollout = hand_made()
    actor_critic_loss(rollout, CONFIG)[0].backward()
    for tensor in (rollout.values, rollout.log_probs, rollout.entropies):
        assert tensor.grad is not None and tensor.grad[1, 1] == 0
        assert (tensor.grad[rollout.valid] != 0).all()
    # The advantage is a weight, not a way for gradients: d loss / d value comes from the squared error alone.
    torch.testing.assert_close(rollout.values.grad[0, 0], torch.tensor(0.25 * 2 * -(3.0 - 1.0) / 3))


def test_a_rollout_without_a_valid_row_teaches_nothing() -> None:
    rollout = hand_made()
    rollout.valid = torch.zeros(2, 2, dtype=torch.bool)
    total = actor_critic_loss(rollout, CONFIG)[0]
    total.backward()
    assert total.item() == 0 and (rollout.values.grad == 0).all() and (rollout.log_probs.grad == 0).all()


class Tape:
    """Simulators that remember observations and actions for the plain implementation."""

    def __init__(self, simulators: Simulators) -> None:
        self._simulators = simulators
        self.count = simulators.count
        self.observations: list[np.ndarray] = []
        self.steps: list = []
        self.actions: list[np.ndarray] = []

    def reset(self, seed: int) -> np.ndarray:
        self.observations.append(np.array(self._simulators.reset(seed)))
        return self.observations[-1]

    def step(self, actions: np.ndarray) -> object:
        self.actions.append(actions.copy())
        step = self._simulators.step(actions)
        self.steps.append(step)
        self.observations.append(np.array(step.observations))
        return step


def plain_update(policy: Policy, optimizer: torch.optim.Optimizer, tape: Tape, config: LearnerConfig) -> None:
    """A2C as in a textbook: forward over stored observations, returns by a loop, norm clipped, one step."""
    horizon = config.rollout_steps
    observations = [torch.from_numpy(o) for o in tape.observations[-horizon - 1 :]]
    steps, actions = tape.steps[-horizon:], tape.actions[-horizon:]
    with torch.no_grad():
        following = policy(observations[-1])[1].numpy()
    returns = []
    for step in reversed(steps):
        following = following.copy()
        if step.truncated.any():
            with torch.no_grad():
                following[step.truncated] = policy(torch.from_numpy(step.final_observations))[1].numpy()
        following = step.rewards + config.gamma * following * ~step.terminated
        returns.insert(0, following)
    logits, values = policy(torch.cat(observations[:-1]))
    distribution = torch.distributions.Categorical(logits=logits)
    advantage = torch.from_numpy(np.concatenate(returns)).float() - values
    chosen = distribution.log_prob(torch.from_numpy(np.concatenate(actions)))
    loss = (
        -(chosen * advantage.detach()).mean()
        + config.value_weight * advantage.pow(2).mean()
        - config.entropy_weight * distribution.entropy().mean()
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()


@pytest.mark.parametrize(("env", "updates"), [("CartPole-v1", 50), ("ALE/Pong-v5", 8)])
def test_updates_give_the_parameters_of_a_plain_implementation(env: str, updates: int) -> None:
    """Episodes that end, and CartPole's first ones do, are among them."""
    torch.set_num_threads(1)
    config = LearnerConfig()

    def network() -> Policy:
        generator = torch.Generator().manual_seed(4)
        return AtariPolicy(6, generator) if env.startswith("ALE") else MLPPolicy(4, (64, 64), 2, generator)

    tape = Tape(make_simulators(EnvironmentConfig(env=env, simulators=2), threads=1))
    policy, plain = network(), network()
    learner = Learner(FlatParameters(policy), config, 7e-4)
    optimizer = torch.optim.RMSprop(plain.parameters(), lr=7e-4, alpha=config.rmsprop_alpha, eps=config.rmsprop_epsilon)
    collector = Collector(tape, policy, config.rollout_steps, 1, torch.Generator().manual_seed(5))  # type: ignore[arg-type]
    for _ in range(updates):
        learner.update(collector.collect(), 0.0, measure=False)
        plain_update(plain, optimizer, tape, config)
    if env == "CartPole-v1":
        assert any(step.terminated.any() for step in tape.steps)
    initial = network().state_dict()
    for name, expected in plain.state_dict().items():
        found = policy.state_dict()[name]
        change = (expected - initial[name]).norm()
        # RMSprop divides by the gradient's own size, so rounding shows where a gradient is all but zero: single
        # values may differ, the change as a whole may not.
        assert change > 0 and (found - expected).norm() < 1e-3 * change, name


def small_learner(config: LearnerConfig, **options: object) -> tuple[Learner, FlatParameters, Collector]:
    policy = MLPPolicy(4, (8,), 2, torch.Generator().manual_seed(1))
    flat = FlatParameters(policy)
    simulators = make_simulators(EnvironmentConfig(env="CartPole-v1", simulators=2), threads=1)
    return Learner(flat, config, 1e-2, **options), flat, Collector(simulators, policy, 5, 1, torch.Generator())


def test_the_measured_norm_is_that_of_the_change() -> None:
    learner, flat, collector = small_learner(LearnerConfig())
    before = flat.data.clone()
    losses = learner.update(collector.collect(), 0.0, measure=True)
    torch.testing.assert_close(losses.update_norm, (flat.data - before).norm())
    assert losses.update_norm > 0


def test_linear_decay_scales_the_step_and_ends_at_none() -> None:
    changes = []
    for progress in (0.0, 0.75, 1.0, 1.5):
        learner, _, collector = small_learner(LearnerConfig(learning_rate_decay="linear"))
        changes.append(learner.update(collector.collect(), progress, measure=True).update_norm.item())
    assert changes[1] == pytest.approx(changes[0] / 4, rel=1e-3)
    assert changes[2:] == [0, 0]


def test_the_gradient_is_averaged_before_it_is_clipped() -> None:
    seen = []

    def enlarge(grad: torch.Tensor) -> None:
        seen.append(grad.clone())
        grad.mul_(1000)

    config = dataclasses.replace(LearnerConfig(), max_grad_norm=0.5)
    learner, flat, collector = small_learner(config, average_gradient=enlarge)
    losses = learner.update(collector.collect(), 0.0, measure=False)
    assert len(seen) == 1 and seen[0].shape == (flat.size,)
    torch.testing.assert_close(losses.grad_norm, 1000 * seen[0].norm())
    torch.testing.assert_close(flat.grad.norm(), torch.tensor(0.5), rtol=1e-4, atol=0)


def test_a_short_gradient_is_left_as_it_is() -> None:
    learner, flat, collector = small_learner(dataclasses.replace(LearnerConfig(), max_grad_norm=1e6))
    losses = learner.update(collector.collect(), 0.0, measure=False)
    torch.testing.assert_close(flat.grad.norm(), losses.grad_norm, rtol=0, atol=0)
