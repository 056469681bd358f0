"""All parameters of a module as views into one flat, contiguous buffer, and their gradients into another.

Posting, mixing, clipping and the optimiser's step are then one pass over one buffer. A parameter keeps its
memory format (channels_last, say) in the strides of its view.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


class FlatParameters:
    """Moves the float32 parameters of `module` into `data`, and their gradients into `grad`: float32, (n,).

    Raises ValueError if a parameter is not float32, is shared between two names with different views, or
    lives on another device than the rest.
    """

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_parameters())
        if not named:
            raise ValueError("the module has no parameters")
        device = named[0][1].device
        owners: dict[int, str] = {}
        for name, parameter in named:
            owner = owners.setdefault(parameter.data_ptr(), name)
            if owner != name and parameter.numel() > 0:
                raise ValueError(f"parameter {name} is shared with {owner} as a view of its own")
            if parameter.dtype != torch.float32 or parameter.device != device:
                raise ValueError(
                    f"parameter {name} is {parameter.dtype} on {parameter.device}; all must be float32 on {device}"
                )
        self.size = sum(parameter.numel() for _, parameter in named)
        self.data = torch.empty(self.size, device=device)
        # One element more than the gradient: a flag that can travel with it in one all-reduce.
        self.grad_and_flag = torch.zeros(self.size + 1, device=device)
        self.grad = self.grad_and_flag[: self.size]
        offset = 0
        for _, parameter in named:
            values = parameter.detach()
            parameter.data = self._view(self.data, offset, values).copy_(values)
            parameter.grad = self._view(self.grad, offset, values)
            offset += parameter.numel()
        # The optimiser sees one parameter, whose storage is the flat buffer itself.
        self.parameter = nn.Parameter(self.data)
        self.parameter.grad = self.grad
        self._host = None if device.type == "cpu" else torch.empty(self.size, pin_memory=device.type == "cuda")

    @staticmethod
    def _view(flat: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
        # empty_like keeps the memory format of a dense tensor, and makes any other dense.
        return flat.as_strided(like.shape, torch.empty_like(like).stride(), offset)

    def host(self) -> npt.NDArray[np.float32]:
        """The parameters in host memory: the live buffer itself on a CPU, else a fresh page-locked copy."""
        if self._host is None:
            return self.data.numpy()
        self._host.copy_(self.data)
        return self._host.numpy()

    def store_host(self) -> None:
        """Take over what was written into the array that `host` gave."""
        if self._host is not None:
            self.data.copy_(self._host)
