"""All trained parameters of a module as one flat vector: as views into it, or copied where their types differ.

As views, posting, mixing, clipping and the optimiser's step are one pass over one buffer. A parameter keeps its
memory format (channels_last, say) in the strides of its view. The module's Parameter objects stay the same, so an
optimiser that holds them already goes on as before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

LAST_DIGIT = 2.0**-23
COPIED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def flatten(module: nn.Module) -> FlatParameters | FlatCopy:
    """Its trained parameters, without gradients; raises as these do."""
    if all(parameter.dtype == torch.float32 for parameter in module.parameters() if parameter.requires_grad):
        return FlatParameters(module, gradients=False)
    return FlatCopy(module)


def _layout(module: nn.Module) -> list[object]:
    return [(name, p.shape, p.stride(), p.dtype, p.requires_grad) for name, p in module.named_parameters()]


def _trained(module: nn.Module, types: Collection[torch.dtype]) -> list[tuple[str, nn.Parameter]]:
    """Its trained parameters and their names, which must be there, on one device, and of one of the types."""
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise ValueError("the module has parameters without a shape: call it once before")
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        frozen = sum(1 for _ in module.parameters())
        raise ValueError(f"the module has no parameters to train ({frozen} are frozen)")
    device = named[0][1].device
    if device.type == "meta":
        raise ValueError(f"parameter {named[0][0]} is on the device meta, where there are no values")
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
    owners: dict[int, str] = {}
    for name, parameter in named:
        owner = owners.setdefault(parameter.data_ptr(), name)
        if owner != name and parameter.numel() > 0:
            raise ValueError(f"parameter {name} is shared with {owner} as a view of its own")
        if parameter.dtype not in types or parameter.device != device:
            raise ValueError(
                f"parameter {name} is {parameter.dtype} on {parameter.device}; all must be {allowed} on {device}"
            )
    return named


def _refuse(astray: Sequence[str]) -> None:
    """Raise RuntimeError if there are parameters that are not exchanged any more."""
    if astray:
        raise RuntimeError(
            f"parameter {astray[0]} ({len(astray)} in all) is not where it is exchanged: the module was moved, "
            "converted, or given new or newly trained parameters since; do that before"
        )


class FlatParameters:
    """Moves the trained float32 parameters of `module` into `data`, and their gradients into `grad`: float32, (n,).

    Frozen ones (requires_grad is False) stay where they are, of whatever type, and are listed in `given_once`. Without
    `gradients` those of the module are left alone, and `grad` is empty. `layout` says what ranks must have in common.

    Raises ValueError if there is nothing to train, or if a trained parameter is not float32, has no values yet, is
    shared between two names with different views, or lives on another device than the rest.
    """

    def __init__(self, module: nn.Module, *, gradients: bool = True) -> None:
        named = _trained(module, (torch.float32,))
        self.layout = _layout(module)
        self.given_once = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        device = named[0][1].device
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
        if not all(p.data_ptr() in self._places for p in module.parameters() if p.requires_grad):
            trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
            _refuse([name for name, p in trained if p.data_ptr() not in self._places])

    def host(self) -> npt.NDArray[np.float32]:
        """The parameters in host memory: the live buffer itself on a CPU, else a fresh page-locked copy."""
        if self._host is None:
            return self.data.numpy()
        self._host.copy_(self.data)
        return self._host.numpy()

    def store_host(self, *, alike: bool = False) -> None:
        """Take over what was written into the array that `host` gave."""
        if self._host is not None:
            self.data.copy_(self._host)


class FlatCopy:
    """A float32 copy (n,) of the trained parameters of `module`, of which some are float64, bfloat16 or float16.

    The parameters stay where they are, and take over what an exchange made of the copy, rounded to their type. What a
    float64 has beyond float32's precision stays with it: its last digits are each rank's own. A value beyond float32
    counts as one that is not finite. `given_once` has all parameters: ranks begin alike to the last digit. Raises as
    FlatParameters does.
    """

    def __init__(self, module: nn.Module) -> None:
        named = _trained(module, COPIED)
        self.layout, self.given_once = _layout(module), list(module.parameters())
        self._parameters = [parameter for _, parameter in named]
        # By identity: == compares elements.
        self._types = {id(parameter): parameter.dtype for parameter in self._parameters}
        sizes = [parameter.numel() for parameter in self._parameters]
        self.size = sum(sizes)
        self._copy = torch.empty(self.size, pin_memory=self._parameters[0].is_cuda)
        parts = zip(torch.split(self._copy, sizes), self._parameters, strict=True)
        self._views = [part.view(parameter.shape) for part, parameter in parts]

    def check(self, module: nn.Module) -> None:
        """Raise RuntimeError if some trained parameter of `module` is new, or was converted."""
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        _refuse([name for name, p in trained if p.is_meta or self._types.get(id(p)) != p.dtype])

    def host(self) -> npt.NDArray[np.float32]:
        """A fresh copy of the parameters in host memory."""
        for view, parameter in zip(self._views, self._parameters, strict=True):
            view.copy_(parameter.detach())
        return self._copy.numpy()

    def store_host(self, *, alike: bool = False) -> None:
        """Take over what was written into the array that `host` gave; `alike`: with no digits of this rank's own."""
        for view, parameter in zip(self._views, self._parameters, strict=True):
            values, wanted = parameter.detach(), view.to(parameter.device, parameter.dtype)
            if parameter.dtype == torch.float64 and not alike:
                digits = values - values.float().double()
                # Of a value far from the new one they would be no last digits any more.
                wanted = torch.where(digits.abs() <= LAST_DIGIT * wanted.abs(), wanted + digits, wanted)
            values.copy_(wanted)
