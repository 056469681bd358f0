"""All trained parameters of a module as views into one flat, contiguous buffer, and their gradients into another.

Posting, mixing, clipping and the optimiser's step are then one pass over one buffer. A parameter keeps its
memory format (channels_last, say) in the strides of its view. The module's Parameter objects stay the same, so an
optimiser that holds them already goes on as before.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter


class FlatParameters:
    """Moves the trained float32 parameters of `module` into `data`, and their gradients into `grad`: float32, (n,).

    Frozen ones (requires_grad is False) stay where they are, of whatever type, and are listed in `frozen`. Without
    `gradients` those of the module are left alone, and `grad` is empty. `layout` says what ranks must have in common.

    Raises ValueError if there is nothing to train, or if a trained parameter is not float32, has no values yet, is
    shared between two names with different views, or lives on another device than the rest.
    """

    def __init__(self, module: nn.Module, *, gradients: bool = True) -> None:
        if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
            raise ValueError("the module has parameters without a shape: call it once before")
        self.layout = [(name, p.shape, p.stride(), p.dtype, p.requires_grad) for name, p in module.named_parameters()]
        self.frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        if not named:
            raise ValueError(f"the module has no parameters to train ({len(self.frozen)} are frozen)")
        device = named[0][1].device
        if device.type == "meta":
            raise ValueError(f"parameter {named[0][0]} is on the device meta, where there are no values")
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
        self.grad_and_flag = torch.zeros(self.size + 1 if gradients else 0, device=device)
        self.grad = self.grad_and_flag[: self.size]
        offset = 0
        self._named: dict[str, tuple[nn.Parameter, int]] = {}
        for name, parameter in named:
            values = parameter.detach()
            self._named[name] = (parameter, offset)
            parameter.data = self._view(self.data, offset, values).copy_(values)
            if gradients:
                parameter.grad = self._view(self.grad, offset, values)
            offset += parameter.numel()
        self._places = frozenset(parameter.data_ptr() for _, parameter in named)
        self._host = None if device.type == "cpu" else torch.empty(self.size, pin_memory=device.type == "cuda")

    @staticmethod
    def _view(flat: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
        # empty_like keeps the memory format of a dense tensor, and makes any other dense.
        return flat.as_strided(like.shape, torch.empty_like(like).stride(), offset)

    def by_name(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views into `values` (n,), one for each parameter, as the parameters themselves are views into `data`."""
        return {name: values.as_strided(p.shape, p.stride(), offset) for name, (p, offset) in self._named.items()}

    def check(self, module: nn.Module) -> None:
        """Raise RuntimeError if some trained parameter of `module` is not, or no longer, a view into `data`."""
        if all(p.data_ptr() in self._places for p in module.parameters() if p.requires_grad):
            return
        astray = [n for n, p in module.named_parameters() if p.requires_grad and p.data_ptr() not in self._places]
        raise RuntimeError(
            f"parameter {astray[0]} ({len(astray)} in all) is not where it is exchanged: the module was moved, "
            "converted, or given new or newly trained parameters since; do that before"
        )

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
