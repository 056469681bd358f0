"""The learner: one advantage actor-critic step on a rollout (Mnih et al. 2016, synchronous form)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from gala_mpi import _native
from gala_mpi.config import LearnerConfig
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.learning.cuda_graph import CudaGraph
from gala_mpi.learning.rollout import Rollout, n_step_returns
from gala_mpi.stopwatch import Stopwatch

Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Losses:
    """Terms of the loss and what goes with them, each a scalar tensor."""

    policy_loss: torch.Tensor
    value_loss: torch.Tensor
    entropy: torch.Tensor
    explained_variance: torch.Tensor
    grad_norm: torch.Tensor
    update_norm: torch.Tensor


def actor_critic_loss(
    rollout: Rollout, config: LearnerConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Total loss, its three terms (policy, squared value error, entropy) and the returns, over valid rows."""
    returns = n_step_returns(rollout, config.gamma)
    weight = rollout.valid / rollout.valid.sum().clamp(min=1)
    errors = returns - rollout.values
    policy_loss = -(weight * errors.detach() * rollout.log_probs).sum()
    value_loss = (weight * errors.square()).sum()
    entropy = (weight * rollout.entropies).sum()
    total = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy
    return total, policy_loss, value_loss, entropy, returns


def _variance(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Variance over the valid rows; 0 where there is none."""
    weight = valid / valid.sum().clamp(min=1)
    return (weight * (values - (weight * values).sum()).square()).sum()


@torch.no_grad()
def _explained_variance(rollout: Rollout, returns: torch.Tensor) -> torch.Tensor:
    unexplained = _variance(returns - rollout.values, rollout.valid)
    return 1 - unexplained / _variance(returns, rollout.valid).clamp(min=1e-12)


class Learner:
    """An optimiser on the flat parameters, with the norm of the gradient bounded. For a CPU; see `learner_class`.

    `learning_rate` is that for all ranks, to which the configuration's rises in its warm-up. `average_gradient`, if
    given, is called on the flat gradient (n,) between its computation and its use: the place of a synchronous
    all-reduce.
    """

    def __init__(
        self,
        flat: FlatParameters,
        config: LearnerConfig,
        learning_rate: float,
        average_gradient: Callable[[torch.Tensor], None] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._flat, self._config, self._learning_rate = flat, config, learning_rate
        self._average_gradient = average_gradient
        self._lap = (stopwatch or Stopwatch()).lap
        self.state = {"mean_square": torch.zeros_like(flat.data)}
        """The optimiser's state by name: tensors (n,), zero at first, that checkpoints hold and give back."""
        self.updates = 0
        """The age of the state in updates, which the warm-up goes by. Checkpoints give it back too."""
        self.share = 1.0
        """The share of all ranks that takes part still; a rate that is scaled for all goes down by its square root."""
        self.enough = 1.0
        """The share from which on it need not: that of the ranks that the rate is for."""

    def forget(self) -> None:
        """Reset the optimiser's state, and begin the warm-up anew, as after parameters that were not finite."""
        for values in self.state.values():
            values.zero_()
        self.updates = 0

    def update(self, rollout: Rollout, progress: float, *, measure: bool) -> Losses:
        """One step on `rollout`; `progress` in [0, 1] is how much of the budget is spent.

        Only with `measure` are the norm of the parameters' change, which costs a copy of them, and the explained
        variance computed; else they are NaN.
        """
        learning_rate = self._rate_at(progress)
        terms = self._gradient(rollout, measure)
        if self._average_gradient is not None:
            self._average_gradient(self._flat.grad)
            self._lap("exchange")
        norms = self._step(learning_rate, measure)
        self._lap("optimiser")
        self.updates += 1
        return Losses(**terms, **norms)

    def _rate_at(self, progress: float) -> float:
        config, rate = self._config, self._learning_rate
        if config.learning_rate_scaling != "none":
            rate *= math.sqrt(min(self.share / self.enough, 1.0))
        if self.updates < config.learning_rate_warmup and rate > config.learning_rate:
            rate = config.learning_rate + (rate - config.learning_rate) * self.updates / config.learning_rate_warmup
        return rate * max(1 - progress, 0) if config.learning_rate_decay == "linear" else rate

    def _gradient(self, rollout: Rollout, measure: bool) -> Terms:
        """Compute the flat gradient; the terms of Losses that are known with it."""
        total, terms = self._loss(rollout, measure)
        self._lap("loss")
        self._backward(total)
        self._lap("backward")
        return terms

    def _loss(self, rollout: Rollout, measure: bool) -> tuple[torch.Tensor, Terms]:
        total, policy_loss, value_loss, entropy, returns = actor_critic_loss(rollout, self._config)
        explained = _explained_variance(rollout, returns) if measure else returns.new_full((), math.nan)
        terms = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
        return total, {"explained_variance": explained} | {name: term.detach() for name, term in terms.items()}

    def _backward(self, total: torch.Tensor) -> None:
        self._flat.grad.zero_()
        total.backward()  # type: ignore[no-untyped-call]

    def _step(self, learning_rate: float, measure: bool) -> Terms:
        """One step on the gradient, scaled down to the greatest norm if it is longer; the other terms of Losses."""
        data, grad = self._flat.data, self._flat.grad
        grad_norm = torch.linalg.vector_norm(grad)
        if torch.isinf(grad_norm):
            # Squares are beyond float32 long before the gradient is. The scale would be zero, and nothing learned.
            grad_norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        before = data.clone() if measure else data
        # A norm that is not a number makes all of them so: no half of the parameters goes on.
        self._optimise(min(self._config.max_grad_norm / (float(grad_norm) + 1e-6), 1.0), learning_rate)
        update_norm = torch.linalg.vector_norm(data - before) if measure else grad_norm.new_full((), math.nan)
        return {"grad_norm": grad_norm, "update_norm": update_norm}

    def _optimise(self, scale: float, learning_rate: float) -> None:
        """Change parameters and state by `scale` times the gradient, which stays as it is."""
        data, grad, square = (t.numpy() for t in (self._flat.data, self._flat.grad, self.state["mean_square"]))
        _native.rmsprop(
            data, grad, square, scale, learning_rate, self._config.rmsprop_alpha, self._config.rmsprop_epsilon
        )


class GpuLearner(Learner):
    """The same on a GPU, where the gradient and the step are a CUDA graph each.

    All rollouts must be of one collector, else ValueError. Everything is measured each time, and the losses of an
    update are overwritten by the next one.
    """

    _rollout: Rollout | None = None

    @cached_property
    def _rate(self) -> torch.Tensor:
        return torch.zeros((), device=self._flat.data.device)

    @cached_property
    def _gradient_graph(self) -> CudaGraph[Terms]:
        return CudaGraph(self._whole_gradient)

    @cached_property
    def _step_graph(self) -> CudaGraph[Terms]:
        data, state = self._flat.data, self.state
        return CudaGraph(
            lambda: self._whole_step(data, state),
            rehearsal=lambda: self._whole_step(data.clone(), {name: values.clone() for name, values in state.items()}),
        )

    def _gradient(self, rollout: Rollout, measure: bool) -> Terms:
        rollout.check()
        if self._rollout is not None and rollout.rewards is not self._rollout.rewards:
            raise ValueError("on a GPU all rollouts that a learner is given must be of one collector")
        self._rollout = rollout
        terms = self._gradient_graph.replay()
        self._lap("backward")
        return terms

    def _whole_gradient(self) -> Terms:
        assert self._rollout is not None
        # A copy evaluates the policy's outputs itself, whoever has asked the rollout for them.
        total, terms = self._loss(dataclasses.replace(self._rollout), measure=True)
        self._backward(total)
        return terms

    def _step(self, learning_rate: float, measure: bool) -> Terms:
        self._rate.fill_(learning_rate)
        return self._step_graph.replay()

    def _whole_step(self, data: torch.Tensor, state: dict[str, torch.Tensor]) -> Terms:
        # Squares may be beyond float32.
        grad_norm, before = torch.linalg.vector_norm(self._flat.grad, dtype=torch.float64), data.clone()
        scale = (self._config.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
        self._optimise_in_graph(data, self._flat.grad * scale, state)
        return {"grad_norm": grad_norm, "update_norm": torch.linalg.vector_norm(data - before)}

    def _optimise_in_graph(self, data: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """`_optimise` in operations on tensors (n,): `grad` is scaled, and `_rate` the learning rate."""
        config, square = self._config, state["mean_square"]
        square.mul_(config.rmsprop_alpha).addcmul_(grad, grad, value=1 - config.rmsprop_alpha)
        data.addcdiv_(grad * self._rate, square.sqrt().add_(config.rmsprop_epsilon), value=-1)


def learner_class(device: torch.device) -> type[Learner]:
    """The learner for parameters on a device."""
    return Learner if device.type == "cpu" else GpuLearner
