"""The learner: one advantage actor-critic step on a rollout (Mnih et al. 2016, synchronous form)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gala_mpi import _native
from gala_mpi.config import LearnerConfig
from gala_mpi.parameters import FlatParameters
from gala_mpi.rollout import Rollout, n_step_returns
from gala_mpi.stopwatch import Stopwatch


@dataclass(frozen=True)
class Losses:
    """Terms of the loss and what goes with them, each a scalar tensor."""

    policy_loss: torch.Tensor
    value_loss: torch.Tensor
    entropy: torch.Tensor
    grad_norm: torch.Tensor
    explained_variance: torch.Tensor
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
    """RMSprop on the flat parameters, with the norm of the gradient bounded.

    `average_gradient`, if given, is called on the flat gradient (n,) between its computation and its use:
    the place of a synchronous all-reduce. `mean_square` (n,) is the optimiser's state.
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
        self._stopwatch = stopwatch or Stopwatch()
        self.mean_square = torch.zeros_like(flat.data)

    def forget(self) -> None:
        """Reset the optimiser's state, as after parameters that were not finite."""
        self.mean_square.zero_()

    def update(self, rollout: Rollout, progress: float, *, measure: bool) -> Losses:
        """One step on `rollout`; `progress` in [0, 1] is how much of the budget is spent.

        Only with `measure` are the norm of the parameters' change, which costs a copy of them, and the explained
        variance computed; else they are 0.
        """
        flat, config, lap = self._flat, self._config, self._stopwatch.lap
        total, policy_loss, value_loss, entropy, returns = actor_critic_loss(rollout, config)
        lap("loss")
        flat.grad.zero_()
        total.backward()  # type: ignore[no-untyped-call]
        lap("backward")
        if self._average_gradient is not None:
            self._average_gradient(flat.grad)
            lap("exchange")
        grad_norm = torch.linalg.vector_norm(flat.grad)
        learning_rate = self._learning_rate
        if config.learning_rate_decay == "linear":
            learning_rate *= max(1 - progress, 0)
        before = flat.data.clone() if measure else flat.data
        self._step(grad_norm, learning_rate)
        zero = returns.new_zeros(())
        losses = Losses(
            policy_loss=policy_loss.detach(),
            value_loss=value_loss.detach(),
            entropy=entropy.detach(),
            grad_norm=grad_norm,
            explained_variance=_explained_variance(rollout, returns) if measure else zero,
            update_norm=torch.linalg.vector_norm(flat.data - before) if measure else zero,
        )
        lap("optimiser")
        return losses

    def _step(self, grad_norm: torch.Tensor, learning_rate: float) -> None:
        """One step of RMSprop on the gradient, scaled down to the greatest norm if its own is longer."""
        data, grad, square, config = self._flat.data, self._flat.grad, self.mean_square, self._config
        alpha, epsilon = config.rmsprop_alpha, config.rmsprop_epsilon
        if data.device.type == "cpu":
            # A norm that is not a number makes all of them so: no half of the parameters goes on.
            scale = min(config.max_grad_norm / (float(grad_norm) + 1e-6), 1.0)
            _native.rmsprop(data.numpy(), grad.numpy(), square.numpy(), scale, learning_rate, alpha, epsilon)
        else:
            grad.mul_((config.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1))
            square.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
            data.addcdiv_(grad, square.sqrt().add_(epsilon), value=-learning_rate)
