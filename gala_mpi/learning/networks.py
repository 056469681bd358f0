"""Policies: from observations to action logits and the state's value.

Layers are orthogonal, of gain sqrt(2) in the bodies, 0.01 at the logits and 1 at the value, biases zero.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gala_mpi import _native


class Policy(nn.Module, ABC):
    """What acts and is learned: logits (N, actions) and values (N,) of observations (N, ...).

    The outputs of `networks`, which all work on the same inputs, stand side by side: the logits, and last the value.
    """

    actions: int

    @property
    @abstractmethod
    def networks(self) -> Sequence[Sequence[nn.Module]]:
        """The modules of each network, in order; the last is linear."""

    @abstractmethod
    def prepare(self, observations: torch.Tensor, inputs: torch.Tensor) -> None:
        """Write into `inputs` what the networks work on."""

    def make_inputs(self, rows: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Room for what `prepare` makes of as many observations of a shape, in float32 or bfloat16."""
        return torch.zeros(rows, *shape, dtype=dtype, device=next(self.parameters()).device)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and values of observations as the simulators give them."""
        inputs = self.make_inputs(len(observations), observations.shape[1:])
        self.prepare(observations, inputs)
        out = torch.cat([functools.reduce(lambda x, module: module(x), net, inputs) for net in self.networks], 1)
        return out[:, :-1], out[:, -1]


class AtariPolicy(Policy):
    """One body of three convolutions over uint8 frames (N, 4, 84, 84), scaled to [0, 1], under both heads.

    866 k parameters for 6 actions, drawn from `generator`.
    """

    def __init__(self, actions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.actions = actions
        self.body = nn.Sequential(
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
        # One matrix product serves both heads; the last row is the value's.
        self.head = nn.Linear(512, actions + 1)
        for layer in self.body:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                _draw(layer, math.sqrt(2), generator)
        _draw(self.head, 1.0, generator)
        with torch.no_grad():
            nn.init.orthogonal_(self.head.weight[:actions], 0.01, generator)
        # Memory formats that products are faster with on a CPU: channels_last takes a quarter to a third off the
        # convolutions, and the transpose a third off the forward pass of the one large matrix.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        large = self.get_parameter("body.7.weight")
        large.data = large.data.t().contiguous().t()

    @property
    def networks(self) -> Sequence[Sequence[nn.Module]]:
        """One for both heads."""
        return ([*self.body, self.head],)

    def make_inputs(self, rows: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Frames with channels last."""
        return super().make_inputs(rows, shape, dtype).to(memory_format=torch.channels_last)

    def prepare(self, observations: torch.Tensor, inputs: torch.Tensor) -> None:
        """Scale frames."""
        if observations.dtype == torch.uint8 and observations.device.type == "cpu":
            # NumPy has no bfloat16: its bits go as integers.
            out = inputs.view(torch.uint16) if inputs.dtype == torch.bfloat16 else inputs
            _native.scale_frames(observations.numpy(), out.permute(0, 2, 3, 1).numpy())
        else:
            inputs.copy_(observations.to(torch.float32).div_(255))


class MLPPolicy(Policy):
    """Two networks of tanh units over flat observations (N, inputs), one for each head, drawn from `generator`.

    They share nothing: values of hundreds would drown the policy's gradient in a shared body.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], actions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.actions = actions
        self.actor = nn.Sequential(*_layers((inputs, *hidden, actions), 0.01, generator))
        self.critic = nn.Sequential(*_layers((inputs, *hidden, 1), 1.0, generator))

    @property
    def networks(self) -> Sequence[Sequence[nn.Module]]:
        """The actor's and the critic's."""
        return ([*self.actor], [*self.critic])

    def prepare(self, observations: torch.Tensor, inputs: torch.Tensor) -> None:
        """Take observations of any type as they are."""
        inputs.copy_(observations)


def _layers(widths: Sequence[int], last_gain: float, generator: torch.Generator) -> Iterator[nn.Module]:
    for depth, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        last = depth == len(widths) - 2
        yield _draw(nn.Linear(inputs, outputs), last_gain if last else math.sqrt(2), generator)
        if not last:
            yield nn.Tanh()


def _draw(layer: nn.Conv2d | nn.Linear, gain: float, generator: torch.Generator) -> nn.Module:
    """The layer with an orthogonal weight and no bias."""
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer
