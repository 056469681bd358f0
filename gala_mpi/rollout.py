"""Rollouts: T steps of N simulators, with the policy's graph kept for the loss.

In A2C the loss is differentiated at the very parameters that chose the actions, so the forward passes of the
rollout serve the update as well: nothing is computed twice and no observation is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gala_mpi.environments import Episode, Simulators
from gala_mpi.networks import Policy


@dataclass
class Rollout:
    """T steps of N simulators; tensors are (T, N). `log_probs`, `values` and `entropies` carry gradients.

    `truncated_values` holds the value of the final observation where an episode was truncated, 0 elsewhere;
    `last_values` (N,) that of the observation after the last step.
    """

    log_probs: torch.Tensor
    values: torch.Tensor
    entropies: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    valid: torch.Tensor
    truncated_values: torch.Tensor
    last_values: torch.Tensor
    episodes: list[Episode]


def n_step_returns(rollout: Rollout, gamma: float) -> torch.Tensor:
    """Discounted returns (T, N), bootstrapped from the value of the last observation of what was not over.

    Termination ends the sum; truncation goes on from the value of the final observation.
    """
    following = rollout.last_values
    returns = torch.empty_like(rollout.rewards)
    for t in reversed(range(len(returns))):
        following = torch.where(rollout.truncated[t], rollout.truncated_values[t], following)
        following = rollout.rewards[t] + gamma * following.masked_fill(rollout.terminated[t], 0)
        returns[t] = following
    return returns


class Collector:
    """Steps a rank's simulators with its policy. The simulators go on where the last rollout ended."""

    def __init__(self, simulators: Simulators, policy: Policy, steps: int, seed: int, generator: torch.Generator):
        self._simulators, self._policy, self._steps = simulators, policy, steps
        self._generator = generator
        self._device = next(policy.parameters()).device
        self._observations = self._upload(simulators.reset(seed))

    def _upload(self, array: object) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array)).to(self._device)

    def collect(self) -> Rollout:
        """Take T steps in every simulator."""
        columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("log_probs", "values", "entropies")}
        arrays: dict[str, list[np.ndarray]] = {n: [] for n in ("rewards", "terminated", "truncated", "valid")}
        truncated_values = torch.zeros(self._steps, self._simulators.count, device=self._device)
        episodes: list[Episode] = []
        for t in range(self._steps):
            logits, values = self._policy(self._observations)
            log_policy = torch.log_softmax(logits, dim=1)
            probabilities = log_policy.exp()
            actions = torch.multinomial(probabilities.detach(), 1, generator=self._generator)
            step = self._simulators.step(actions.squeeze(1).cpu().numpy())
            columns["log_probs"].append(log_policy.gather(1, actions).squeeze(1))
            columns["values"].append(values)
            columns["entropies"].append(-(probabilities * log_policy).sum(1))
            for name, column in arrays.items():
                column.append(getattr(step, name))
            if step.final_observations is not None:
                truncated_values[t, torch.from_numpy(step.truncated).to(self._device)] = self._value(
                    self._upload(step.final_observations)
                )
            episodes += step.episodes
            self._observations = self._upload(step.observations)
        return Rollout(
            **{name: torch.stack(column) for name, column in columns.items()},
            **{name: self._upload(np.stack(column)) for name, column in arrays.items()},
            truncated_values=truncated_values,
            last_values=self._value(self._observations),
            episodes=episodes,
        )

    @torch.no_grad()
    def _value(self, observations: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self._policy(observations)[1]
        return values
