"""Policies: a shared body, a head of action logits and a head of the state's value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn


class Policy(nn.Module):
    """`body` maps observations to features of width `width`; two linear heads follow.

    The layers are orthogonal, of gain sqrt(2) in the body, 0.01 at the logits and 1 at the value, drawn
    from `generator`.
    """

    def __init__(self, body: nn.Sequential, width: int, actions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, actions + 1)
        for layer in body:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                _orthogonal(layer.weight, math.sqrt(2), generator)
                nn.init.zeros_(layer.get_parameter("bias"))
        # One matrix product serves both heads; the last row is the value's.
        with torch.no_grad():
            _orthogonal(self.head.weight[:actions], 0.01, generator)
            _orthogonal(self.head.weight[actions:], 1.0, generator)
            nn.init.zeros_(self.head.bias)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, actions) and values (N,) of observations (N, ...)."""
        out = self.head(self.body(self.prepare(observations)))
        return out[:, :-1], out[:, -1]

    def prepare(self, observations: torch.Tensor) -> torch.Tensor:
        """Observations as the simulators give them, as the first layer wants them."""
        return observations.float()


class AtariPolicy(Policy):
    """Three convolutions over uint8 frames (N, 4, 84, 84), scaled to [0, 1]; 866 k parameters for 6 actions."""

    def __init__(self, actions: int, generator: torch.Generator) -> None:
        body = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 32, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 512),
            nn.ReLU(),
        )
        super().__init__(body, 512, actions, generator)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def prepare(self, observations: torch.Tensor) -> torch.Tensor:
        # channels_last takes a quarter to a third off the convolutions on a CPU.
        return observations.to(torch.float32, memory_format=torch.channels_last).div_(255)


class MLPPolicy(Policy):
    """Hidden layers of tanh units over flat observations (N, ...)."""

    def __init__(self, inputs: int, hidden: Sequence[int], actions: int, generator: torch.Generator) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.Tanh()]
            inputs = width
        super().__init__(nn.Sequential(*layers), inputs, actions, generator)


def _orthogonal(weight: torch.Tensor, gain: float, generator: torch.Generator) -> None:
    nn.init.orthogonal_(weight, gain, generator=generator)
