"""The update: a loss worked out by hand, and the parameters of a plain implementation of A2C."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from choices import LEARNERS, named
from gymnasium.vector import AutoresetMode
from scripted import vector
from test_environments import LIVES, TERMINATES, TRUNCATES
from test_rollout import rollout_of

from gala_mpi.config import EnvironmentConfig, LearnerConfig
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.learning import learner as learner_module
from gala_mpi.learning.environments import Simulators, make_simulators
from gala_mpi.learning.learner import GpuLearner, Learner, actor_critic_loss
from gala_mpi.learning.networks import AtariPolicy, MLPPolicy, Policy
from gala_mpi.learning.rollout import Collector, Rollout

CONFIG = LearnerConfig(gamma=0.5, value_weight=0.25, entropy_weight=0.1)
# A new optimiser is among them by itself.
for_each_choice = pytest.mark.parametrize("choice", LEARNERS, ids=named)


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


@pytest.mark.parametrize("size", [1.0, -1e6, 1e15])
def test_what_a_row_that_is_not_valid_holds_changes_nothing(size: float) -> None:
    results = []
    for value in (0.0, size):
        rollout = hand_made()
        # In the reset's row and in the value after it, which bootstraps that row alone.
        rollout.rewards[1, 1], rollout.last_values[1] = value, value
        with torch.no_grad():
            for tensor in (rollout.values, rollout.log_probs, rollout.entropies):
                tensor[1, 1] = value
        total, policy_loss, value_loss, entropy, _ = actor_critic_loss(rollout, CONFIG)
        total.backward()
        gradients = [tensor.grad for tensor in (rollout.values, rollout.log_probs, rollout.entropies)]
        results.append(torch.stack([total, policy_loss, value_loss, entropy, *torch.stack(gradients).flatten()]))
    assert torch.equal(results[0].detach(), results[1].detach())


class Remembering:
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


def plain_update(policy: Policy, optimizer: torch.optim.Optimizer, tape: Remembering, config: LearnerConfig) -> None:
    """A2C as in a textbook: forward over stored observations, returns by a loop, norm clipped, one step.

    Rows that are not valid are taken out, rather than weighted by zero.
    """
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
    valid = np.concatenate([step.valid for step in steps])
    logits, values = policy(torch.cat(observations[:-1])[torch.from_numpy(valid)])
    distribution = torch.distributions.Categorical(logits=logits)
    advantage = torch.from_numpy(np.concatenate(returns)[valid]).float() - values
    chosen = distribution.log_prob(torch.from_numpy(np.concatenate(actions)[valid]))
    loss = (
        -(chosen * advantage.detach()).mean()
        + config.value_weight * advantage.pow(2).mean()
        - config.entropy_weight * distribution.entropy().mean()
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()


def cut_short() -> Simulators:
    """CartPole in games of at most 20 steps: some fall, some are cut."""
    return Simulators(
        gymnasium.make_vec(
            "CartPole-v1",
            num_envs=2,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
            max_episode_steps=20,
        )
    )


def every_edge() -> Simulators:
    """Lost lives, FIRE, ends, cuts and steps that only reset."""
    env = vector(AutoresetMode.NEXT_STEP, LIVES, TERMINATES, TRUNCATES)
    return Simulators(env, clip_rewards=True, episodic_life=True, fire_after_life=True)


@pytest.mark.parametrize(
    ("env", "updates"), [("CartPole-v1", 50), ("CartPole, cut short", 20), ("every edge", 20), ("ALE/Pong-v5", 8)]
)
def test_updates_give_the_parameters_of_a_plain_implementation(env: str, updates: int) -> None:
    """Episodes that end are among them, and in the tasks made for it those that are cut, and rows not valid."""
    torch.set_num_threads(1)
    config = LearnerConfig()
    makers = {"CartPole, cut short": cut_short, "every edge": every_edge}
    simulators = (
        makers[env]() if env in makers else make_simulators(EnvironmentConfig(env=env, simulators=2), threads=1)
    )

    def network() -> Policy:
        generator = torch.Generator().manual_seed(4)
        if env.startswith("ALE"):
            return AtariPolicy(6, generator)
        return MLPPolicy(simulators.observation_shape[0], (64, 64), simulators.actions, generator)

    tape = Remembering(simulators)
    policy, plain = network(), network()
    learner = Learner(FlatParameters(policy), config, 7e-4)
    optimizer = torch.optim.RMSprop(plain.parameters(), lr=7e-4, alpha=config.rmsprop_alpha, eps=config.rmsprop_epsilon)
    collector = Collector(tape, policy, config.rollout_steps, 1, torch.Generator().manual_seed(5))  # type: ignore[arg-type]
    since = network().state_dict()
    for update in range(updates):
        learner.update(collector.collect(), 0.0, measure=False)
        plain_update(plain, optimizer, tape, config)
        if env.startswith("ALE") or update == updates - 1:
            # Single values may differ where a gradient is all but zero; the change as a whole may not.
            for name, expected in plain.state_dict().items():
                change = (expected - since[name]).norm()
                assert change > 0 and (policy.state_dict()[name] - expected).norm() < 1e-3 * change, (update, name)
        if env.startswith("ALE"):
            # RMSprop's first steps are all but signs, and rounding grows some threefold with each (measured: up to
            # 2 % of the change after eight): so every update begins at the same parameters. Optimisers' states stay.
            plain.load_state_dict(policy.state_dict())
            since = {name: value.clone() for name, value in plain.state_dict().items()}
    if env.startswith("ALE"):
        return
    torch.testing.assert_close(
        torch.nn.utils.parameters_to_vector(policy.parameters()),
        torch.nn.utils.parameters_to_vector(plain.parameters()),
        rtol=1e-4,
        atol=1e-5,
    )
    assert any(step.terminated.any() for step in tape.steps)
    assert any(step.truncated.any() for step in tape.steps) == (env in makers)
    assert all(step.valid.all() for step in tape.steps) == (env != "every edge")


def small_learner(config: LearnerConfig, **options: object) -> tuple[Learner, FlatParameters, Collector]:
    policy = MLPPolicy(4, (8,), 2, torch.Generator().manual_seed(1))
    flat = FlatParameters(policy)
    simulators = make_simulators(EnvironmentConfig(env="CartPole-v1", simulators=2), threads=1)
    config = dataclasses.replace(config, learning_rate=1e-2)
    return Learner(flat, config, 1e-2, **options), flat, Collector(simulators, policy, 5, 1, torch.Generator())


def test_the_measured_norm_is_that_of_the_change() -> None:
    learner, flat, collector = small_learner(LearnerConfig())
    before = flat.data.clone()
    losses = learner.update(collector.collect(), 0.0, measure=True)
    torch.testing.assert_close(losses.update_norm, (flat.data - before).norm())
    assert losses.update_norm > 0


def test_what_is_not_measured_is_not_a_number() -> None:
    learner, _, collector = small_learner(LearnerConfig())
    losses = learner.update(collector.collect(), 0.0, measure=False)
    assert {name for name, value in vars(losses).items() if value.isnan()} == {"update_norm", "explained_variance"}


def test_linear_decay_scales_the_step_and_ends_at_none() -> None:
    changes = []
    for progress in (0.0, 0.75, 1.0, 1.5):
        learner, _, collector = small_learner(LearnerConfig(learning_rate_decay="linear"))
        changes.append(learner.update(collector.collect(), progress, measure=True).update_norm.item())
    assert changes[1] == pytest.approx(changes[0] / 4, rel=1e-3)
    assert changes[2:] == [0, 0]


class Eager:
    """In place of a CUDA graph where there is no GPU: the work itself, each time."""

    def __init__(self, work: Callable[[], object], rehearsal: Callable[[], object] | None = None) -> None:
        (rehearsal or work)()
        self.replay = work


@for_each_choice
def test_the_halves_of_an_update_on_a_gpu_are_those_on_the_cpu(
    choice: LearnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the graphs, which `test_gpu.py` tries: the same losses and parameters, clipped, at a changing rate."""
    monkeypatch.setattr(learner_module, "CudaGraph", Eager)
    config = dataclasses.replace(choice, learning_rate_warmup=10)
    found = []
    for kind in (Learner, GpuLearner):
        simulators = make_simulators(EnvironmentConfig(env="CartPole-v1", simulators=4), threads=1)
        policy = MLPPolicy(4, (8,), 2, torch.Generator().manual_seed(1))
        flat = FlatParameters(policy)
        learner, collector = kind(flat, config, 1e-3), Collector(simulators, policy, 5, 1, torch.Generator())
        losses = []
        for update in range(40):
            rollout = collector.collect()
            if update % 2:
                assert rollout.values.requires_grad  # somebody has asked before
            made = learner.update(rollout, update / 40, measure=True)
            losses.append([float(getattr(made, name)) for name in vars(made)])
        assert (np.array(losses)[:, list(vars(made)).index("grad_norm")] > config.max_grad_norm).any()
        found.append({"losses": np.array(losses), "parameters": flat.data.numpy(), **learner.state})
    assert found[0].keys() == found[1].keys()
    for name, cpu in found[0].items():
        np.testing.assert_allclose(found[1][name], cpu, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", [Learner, GpuLearner])
@for_each_choice
def test_a_gradient_whose_squares_float32_cannot_hold_is_clipped_like_any_other(
    choice: LearnerConfig, kind: type[Learner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its norm would be infinite, its scale zero, and nothing would be learned for ever."""
    monkeypatch.setattr(learner_module, "CudaGraph", Eager)
    changes = []
    for size in (10.0, 1e25, 1e36):
        policy = MLPPolicy(4, (8,), 2, torch.Generator().manual_seed(1))
        flat = FlatParameters(policy)
        learner, before = kind(flat, choice, 1.0), flat.data.clone()
        flat.grad.copy_(size * torch.linspace(-1, 1, flat.size))
        gradient = flat.grad.clone()
        terms = learner._step(1.0, measure=True)
        assert torch.equal(flat.grad, gradient)
        assert float(terms["grad_norm"]) == pytest.approx(size * np.sqrt(flat.size / 3), rel=0.1)
        changes.append((flat.data - before).numpy())
    assert np.abs(changes[0]).max() > 1e-3
    for change in changes[1:]:
        np.testing.assert_allclose(change, changes[0], rtol=1e-3, atol=1e-6)


def test_a_learner_on_a_gpu_refuses_what_its_graph_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes by where the rollouts of the first collector lie, and by what is there now."""
    monkeypatch.setattr(learner_module, "CudaGraph", Eager)
    policy = MLPPolicy(4, (8,), 2, torch.Generator().manual_seed(1))
    learner = GpuLearner(FlatParameters(policy), LearnerConfig(), 7e-4)
    simulators = make_simulators(EnvironmentConfig(env="CartPole-v1", simulators=2), threads=1)
    first, other = (Collector(simulators, policy, 5, 1, torch.Generator()) for _ in range(2))
    for _ in range(2):
        learner.update(first.collect(), 0.0, measure=False)
    with pytest.raises(ValueError, match="of one collector"):
        learner.update(other.collect(), 0.0, measure=False)
    over = first.collect()
    first.collect()
    with pytest.raises(RuntimeError, match="another rollout has been taken since"):
        learner.update(over, 0.0, measure=False)


@pytest.mark.parametrize(
    ("scaled", "warmup", "expected"),
    [(5e-3, 4, [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 5e-3]), (5e-3, 0, [5e-3] * 3), (5e-4, 4, [5e-4] * 6)],
)
def test_the_learning_rate_rises_to_the_scaled_one(scaled: float, warmup: int, expected: list[float]) -> None:
    config = LearnerConfig(learning_rate=1e-3, learning_rate_warmup=warmup)
    policy = MLPPolicy(4, (8,), 2, torch.Generator().manual_seed(1))
    taken = []

    class Noting(Learner):
        def _step(self, learning_rate: float, measure: bool) -> dict[str, torch.Tensor]:
            taken.append(learning_rate)
            return super()._step(learning_rate, measure)

    simulators = make_simulators(EnvironmentConfig(env="CartPole-v1", simulators=2), threads=1)
    learner = Noting(FlatParameters(policy), config, scaled)
    collector = Collector(simulators, policy, 5, 1, torch.Generator())
    for _ in expected:
        learner.update(collector.collect(), 0.0, measure=False)
    learner.forget()
    learner.update(collector.collect(), 0.0, measure=False)
    assert taken == pytest.approx([*expected, expected[0]])


@pytest.mark.parametrize(
    ("scaling", "enough", "factor"),
    [
        ("sqrt", 1.0, 0.5),
        ("effective", 1.0, 0.5),
        ("effective", 0.5, 0.5**0.5),
        ("effective", 0.1, 1.0),
        ("none", 1.0, 1.0),
    ],
)
def test_a_scaled_learning_rate_follows_the_ranks_that_are_there(scaling: Any, enough: float, factor: float) -> None:
    """But those that are left may be more still than a rank gains from."""
    config = LearnerConfig(learning_rate=1e-3, learning_rate_warmup=0, learning_rate_scaling=scaling)
    learner = Learner(FlatParameters(torch.nn.Linear(1, 1)), config, 2e-3)
    assert learner._rate_at(0.0) == 2e-3
    learner.share, learner.enough = 0.25, enough
    assert learner._rate_at(0.0) == pytest.approx(2e-3 * factor)


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
    # The optimiser's first mean square is a share of the gradient that it took.
    taken = (learner.state["mean_square"].sum() / (1 - config.rmsprop_alpha)).sqrt()
    torch.testing.assert_close(taken, torch.tensor(0.5), rtol=1e-4, atol=0)


def test_a_short_gradient_is_left_as_it_is() -> None:
    config = dataclasses.replace(LearnerConfig(), max_grad_norm=1e6)
    learner, flat, collector = small_learner(config)
    losses = learner.update(collector.collect(), 0.0, measure=False)
    torch.testing.assert_close(flat.grad.norm(), losses.grad_norm, rtol=0, atol=0)
    torch.testing.assert_close(learner.state["mean_square"], (1 - config.rmsprop_alpha) * flat.grad.square())


def test_the_optimiser_takes_the_averaged_gradient_once_an_update() -> None:
    calls = []

    def replace(grad: torch.Tensor) -> None:
        calls.append(1)
        grad.fill_(0).view(-1)[0] = 0.25

    learner, flat, collector = small_learner(LearnerConfig(), average_gradient=replace)
    before = flat.data.clone()
    for update in range(1, 4):
        learner.update(collector.collect(), 0.0, measure=False)
        assert len(calls) == update
    change = flat.data - before
    assert (change[1:] == 0).all()
    # RMSprop on a gradient of 0.25, below the clip: after k steps the mean square is (1 - 0.99^k) 0.25^2, so each
    # step is 0.01 * 0.25 / (0.25 sqrt(1 - 0.99^k) + 1e-5), for k = 1, 2, 3: 0.1, 0.0708881 and 0.0580259, less
    # a part in 25,000 or so.
    expected = -sum(0.0025 / (0.25 * (1 - 0.99**k) ** 0.5 + 1e-5) for k in (1, 2, 3))
    assert change[0].item() == pytest.approx(expected, rel=1e-4) == pytest.approx(-0.228914, rel=1e-3)


def explained(rollout: Rollout) -> float:
    learner, _, _ = small_learner(CONFIG)
    return learner.update(rollout, 0.0, measure=True).explained_variance.item()


def test_the_explained_variance_worked_out_by_hand() -> None:
    rollout = hand_made()
    rollout.valid[:] = True
    rollout.rewards[1, 1], rollout.last_values[1] = 5.0, 4.0
    rollout.values.data[1, 1] = 6.0
    # Returns 3, 4, 2 and 5 + 0.5 * 4 = 7: mean 4, squares 1 + 0 + 4 + 9 = 14. Errors 2, 2, -3 and 1: mean 0.5,
    # squares 2.25 + 2.25 + 12.25 + 0.25 = 17.
    assert explained(rollout) == pytest.approx(1 - 17 / 14)


def test_the_explained_variance_is_that_of_the_valid_rows() -> None:
    # Returns 3, 4 and 2: variance 1. Errors 2, 2 and -3: mean 1/3, squares 25/9 + 25/9 + 100/9, variance 25/3.
    assert explained(hand_made()) == pytest.approx(1 - 25 / 3)


def test_one_step_of_one_simulator_is_a_rollout() -> None:
    config = LearnerConfig(rollout_steps=1)
    policy = MLPPolicy(4, (8,), 2, torch.Generator().manual_seed(1))
    learner = Learner(FlatParameters(policy), config, 1e-2)
    simulators = make_simulators(EnvironmentConfig(env="CartPole-v1", simulators=1), threads=1)
    losses = learner.update(Collector(simulators, policy, 1, 1, torch.Generator()).collect(), 0.0, measure=True)
    # Nothing varies, so nothing can be said of the variance; but neither a warning nor an infinity.
    assert losses.update_norm > 0 and not torch.isinf(losses.explained_variance)


@pytest.mark.parametrize("decay", ["linear", "none"])
def test_the_step_is_that_of_torchs_rmsprop(decay: str) -> None:
    """Over many updates, to rounding, with the clip as torch has it."""
    config = LearnerConfig(learning_rate_decay=decay, max_grad_norm=0.01)
    learner, flat, collector = small_learner(config)
    theirs = torch.nn.Parameter(flat.data.clone())
    optimizer = torch.optim.RMSprop([theirs], lr=1e-2, alpha=config.rmsprop_alpha, eps=config.rmsprop_epsilon)
    for update in range(30):
        learner.update(collector.collect(), update / 40, measure=False)
        theirs.grad = flat.grad.clone()
        torch.nn.utils.clip_grad_norm_([theirs], config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - update / 40 if decay == "linear" else 1)
        optimizer.step()
        torch.testing.assert_close(flat.data, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@for_each_choice
def test_a_gradient_that_is_not_finite_shows_in_the_parameters(choice: LearnerConfig, value: float) -> None:
    """As with torch's own: the exchange sees it, and quarantines the rank."""

    def spoil(grad: torch.Tensor) -> None:
        grad[0] = value

    learner, flat, collector = small_learner(choice, average_gradient=spoil)
    learner.update(collector.collect(), 0.0, measure=False)
    assert flat.data[0].isnan() and (value == float("inf") or flat.data.isnan().all())
    learner.forget()
    assert all((values == 0).all() for values in learner.state.values())
