"""Rollouts: T steps of N simulators, with the policy's passes on a tape for the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gala_mpi.learning.cuda_graph import CudaGraph
from gala_mpi.learning.environments import Episode, Simulators
from gala_mpi.learning.networks import Policy
from gala_mpi.learning.tape import Tape
from gala_mpi.stopwatch import Stopwatch

COLUMNS = {"rewards": torch.float32, "terminated": torch.bool, "truncated": torch.bool, "valid": torch.bool}


@dataclass
class Rollout:
    """T steps of N simulators; tensors are (T, N), and the collector's own: the next rollout overwrites them.

    `log_probs`, `values` and `entropies`, which carry gradients, are what `evaluate` gives. It is called when one of
    them is first asked for, which raises RuntimeError after the next rollout. `truncated_values` holds the value of the
    final observation where an episode was truncated, 0 elsewhere; `last_values` (N,) that of the observation after the
    last step.
    """

    evaluate: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    is_last: Callable[[], bool]
    rewards: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    valid: torch.Tensor
    truncated_values: torch.Tensor
    last_values: torch.Tensor
    episodes: list[Episode]

    def check(self) -> None:
        """Raise RuntimeError if another rollout has been taken since."""
        if not self.is_last():
            raise RuntimeError("another rollout has been taken since: what this one gave is overwritten")

    @cached_property
    def _evaluated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.check()
        return self.evaluate()

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """Log-probabilities of the actions."""
        return self._evaluated[0]

    @cached_property
    def values(self) -> torch.Tensor:
        """Values of the observations."""
        return self._evaluated[1]

    @cached_property
    def entropies(self) -> torch.Tensor:
        """Entropies of the policy."""
        return self._evaluated[2]


def n_step_returns(rollout: Rollout, gamma: float) -> torch.Tensor:
    """Discounted returns (T, N), bootstrapped from the value of the last observation of what was not over.

    Termination ends the sum; truncation goes on from the value of the final observation.
    """
    not_over = gamma * ~rollout.terminated
    cut = not_over * rollout.truncated
    known, going_on = torch.addcmul(rollout.rewards, cut, rollout.truncated_values), not_over - cut
    returns, following = torch.empty_like(known), rollout.last_values
    for t in reversed(range(len(returns))):
        following = torch.addcmul(known[t], going_on[t], following, out=returns[t])
    return returns


def _within_its_words(stream: torch.Tensor) -> bool:
    """Whether a CPU generator of this state reads its own words only: torch takes one that would read beyond.

    After the seed come how many of its 624 words are left (int32), whether it is seeded (int32), and which is next
    (int64): both always make 625, but for 1 and 0 of a new one.
    """
    if stream.dtype != torch.uint8 or stream.ndim != 1 or len(stream) < 24:
        return False
    left, following = int(stream[8:12].view(torch.int32)), int(stream[16:24].view(torch.int64))
    return (left, following) == (1, 0) or (left + following == 625 and 1 <= following <= 624)


class Collector:
    """Steps a rank's simulators with its policy. The simulators go on where the last rollout ended."""

    def __init__(
        self,
        simulators: Simulators,
        policy: Policy,
        steps: int,
        seed: int,
        generator: torch.Generator,
        stopwatch: Stopwatch | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._simulators, self._policy, self._steps = simulators, policy, steps
        self._stopwatch = stopwatch or Stopwatch()
        self._generator = generator
        self._device = next(policy.parameters()).device
        self._staging: tuple[torch.Tensor, torch.Tensor] | None = None
        observations = simulators.reset(seed)
        self._tape = Tape(policy, steps, simulators.count, observations.shape[1:], dtype)
        self._actions = torch.zeros(steps, simulators.count, dtype=torch.int64, device=self._device)
        self._noise = torch.zeros(steps, simulators.count, policy.actions, device=self._device)
        self._truncated_values = torch.zeros(steps, simulators.count, device=self._device)
        self._columns = {
            name: torch.zeros(steps, simulators.count, dtype=dtype, device=self._device)
            for name, dtype in COLUMNS.items()
        }
        self._graphs: dict[int, CudaGraph[torch.Tensor]] = {}
        self._rollouts = 0
        self._observations = self._show(observations)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What the next rollout depends on, by names; the simulators' part only if they can be saved."""
        found = {"actions.stream": self._generator.get_state().numpy()}
        if (simulators := self._simulators.state()) is not None:
            found["observations"] = self._observations.cpu().numpy()
            found |= {f"simulators.{name}": values for name, values in simulators.items()}
        return found

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Take over what `state` gave; whether the simulators go on too, or stay as they began."""
        with contextlib.suppress(KeyError, RuntimeError, TypeError):
            # Another device's streams are of another kind.
            stream = torch.from_numpy(state["actions.stream"])
            if self._device.type != "cpu" or _within_its_words(stream):
                self._generator.set_state(stream)
        prefix = "simulators."
        saved = {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
        shown = state.get("observations")
        now = self._observations
        if shown is None or shown.shape != now.shape or torch.from_numpy(shown).dtype != now.dtype:
            return False
        if not np.isfinite(shown).all():
            return False
        try:
            self._simulators.restore(saved)
        except ValueError:
            return False
        self._observations = self._show(shown)
        return True

    def _upload(self, array: object) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array)).to(self._device)

    def _show(self, observations: object) -> torch.Tensor:
        """All simulators' observations on the device, there always in the same place, without waiting for the copy."""
        array = torch.from_numpy(np.asarray(observations))
        if self._device.type == "cpu":
            return array
        if self._staging is None:
            self._staging = torch.empty_like(array, pin_memory=True), torch.empty_like(array, device=self._device)
        # The copy before has ended: the actions that were chosen by it have come down since.
        locked, shown = self._staging
        locked.copy_(array)
        return shown.copy_(locked, non_blocking=True)

    def collect(self) -> Rollout:
        """Take T steps in every simulator."""
        arrays: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self._rollouts += 1
        number = self._rollouts
        self._tape.begin()
        self._truncated_values.zero_()
        episodes: list[Episode] = []
        lap = self._stopwatch.lap
        self._noise.exponential_(generator=self._generator).log_()
        lap("sampling")
        for t in range(self._steps):
            self._act(t)
            lap("forward")
            actions = self._actions[t].cpu().numpy()
            lap("sampling")
            step = self._simulators.step(actions)
            lap("emulator")
            for name, column in arrays.items():
                column.append(getattr(step, name))
            if step.final_observations is not None:
                self._truncated_values[t, torch.from_numpy(step.truncated).to(self._device)] = self._value(
                    self._upload(step.final_observations)
                )
                lap("forward")
            episodes += step.episodes
            self._observations = self._show(step.observations)
            lap("transfer")
        last_values = self._act(self._steps)
        lap("forward")
        for name, column in arrays.items():
            self._columns[name].copy_(torch.from_numpy(np.stack(column)))
        lap("sampling")
        return Rollout(
            evaluate=self._evaluate,
            is_last=lambda: self._rollouts == number,
            **self._columns,
            truncated_values=self._truncated_values,
            last_values=last_values,
            episodes=episodes,
        )

    def _act(self, t: int) -> torch.Tensor:
        """Choose the actions of step `t`, unless it is the one after the last; the values (N,) of what is seen."""
        if self._device.type == "cpu":
            return self._choose(t)
        if t not in self._graphs:
            self._graphs[t] = CudaGraph(partial(self._choose, t))
        return self._graphs[t].replay()

    def _choose(self, t: int) -> torch.Tensor:
        logits, values = self._tape.forward(t, self._observations)
        if t < self._steps:
            # The largest of the logits, each less the logarithm of a draw from Exp(1), is distributed as their softmax.
            torch.argmax(logits - self._noise[t], 1, out=self._actions[t])
        return values

    def _evaluate(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the actions, values, and entropies, of the last rollout."""
        logits, values = self._tape.replay()
        log_policy = torch.log_softmax(logits, dim=2)
        log_probs = log_policy.gather(2, self._actions.unsqueeze(2)).squeeze(2)
        return log_probs, values, -(log_policy.exp() * log_policy).sum(2)

    @torch.no_grad()
    def _value(self, observations: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self._policy(observations)[1]
        return values
