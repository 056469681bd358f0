"""The tape: what a policy computed in a rollout, kept for one backward pass over all of it.

In A2C the loss is differentiated at the very parameters that chose the actions, so the forward passes of the rollout
serve the update as well. Autograd would keep a graph of every step, and go through each of them: for every layer T
products of N rows, and T - 1 additions of gradients as large as the parameters. Here every layer writes what it gives
into rows of one block, made once, and is differentiated once, over all T * N rows.

The layers below the heads may compute in bfloat16, with copies of their parameters that are made anew for each rollout.
The heads, the parameters themselves and their gradients stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from gala_mpi.learning.networks import Policy

aten = torch.ops.aten


class _Layer:
    """A convolution or linear layer with the activation behind it, and its rows of inputs and outputs.

    It computes in the type of `inputs`. `steps` holds the two in parts of `count` rows. Without `outputs` they are made
    here, in `type_after`, so that the next layer can work on them: with channels last if it is a convolution, else in
    the order in which nn.Flatten takes them.
    """

    def __init__(
        self,
        module: nn.Conv2d | nn.Linear,
        activation: nn.Module | None,
        inputs: torch.Tensor,
        outputs: torch.Tensor | None,
        count: int,
        following: nn.Module | None,
        type_after: torch.dtype,
    ) -> None:
        self.module, self.activation = module, activation
        self.inputs = inputs.flatten(1) if isinstance(module, nn.Linear) else inputs
        self._weight, self._bias = self._parameters = module.weight.detach(), module.get_parameter("bias").detach()
        if inputs.dtype != torch.float32:
            # Of the same memory format.
            self._weight, self._bias = (parameter.to(inputs.dtype) for parameter in self._parameters)
        if outputs is None:
            last = torch.channels_last if isinstance(following, nn.Conv2d) else torch.contiguous_format
            shape = self._product(self.inputs[:1]).shape[1:]
            outputs = torch.empty(len(inputs), *shape, dtype=type_after, device=inputs.device).to(memory_format=last)
        self.outputs = outputs
        self.steps = list(zip(torch.split(self.inputs, count), torch.split(outputs, count), strict=True))

    def refresh(self) -> None:
        """Take over the parameters as they are now."""
        for own, parameter in zip((self._weight, self._bias), self._parameters, strict=True):
            if own is not parameter:
                own.copy_(parameter)

    def _product(self, inputs: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The layer without its activation; a linear one writes into `out`, if given."""
        module = self.module
        if isinstance(module, nn.Linear):
            return torch.addmm(self._bias, inputs, self._weight.t(), out=out)
        return nn.functional.conv2d(
            inputs, self._weight, self._bias, module.stride, module.padding, module.dilation, module.groups
        )

    def forward(self, t: int) -> None:
        """Compute the rows of step `t`."""
        inputs, outputs = self.steps[t]
        same = outputs.dtype == inputs.dtype
        given = self._product(inputs, outputs if same else None)
        if not same:
            given = outputs.copy_(given)
        if isinstance(self.activation, nn.ReLU):
            torch.clamp_min(given, 0, out=outputs)
        elif isinstance(self.activation, nn.Tanh):
            torch.tanh(given, out=outputs)
        elif given is not outputs:
            outputs.copy_(given)

    def backward(self, grad: torch.Tensor, *, first: bool) -> torch.Tensor | None:
        """Add to the gradients of the parameters those of the rows that `grad` has; gives that of the inputs.

        None if this layer is the `first`, whose inputs need none.
        """
        module, rows = self.module, len(grad)
        weight, bias = module.weight.grad, module.get_parameter("bias").grad
        assert weight is not None and bias is not None
        inputs, outputs = self.inputs[:rows], self.outputs[:rows]
        grad = grad.view(outputs.shape)
        # In place: the gradient is that of the layer above, and nobody else's.
        if isinstance(self.activation, nn.ReLU):
            aten.threshold_backward(grad, outputs, 0, grad_input=grad)
        elif isinstance(self.activation, nn.Tanh):
            aten.tanh_backward(grad, outputs, grad_input=grad)
        grad = grad.to(inputs.dtype)
        if isinstance(module, nn.Linear):
            if weight.dtype == inputs.dtype:
                weight.addmm_(grad.t(), inputs)
            else:
                weight.add_(grad.t() @ inputs)
            bias.add_(grad.sum(0))
            return None if first else grad @ self._weight
        before, by_weight, by_bias = aten.convolution_backward(
            grad.contiguous(memory_format=torch.channels_last),
            inputs,
            self._weight,
            [module.out_channels],
            module.stride,
            module.padding,
            module.dilation,
            False,
            (0, 0),
            module.groups,
            (not first, True, True),
        )
        weight.add_(by_weight)
        bias.add_(by_bias)
        return None if first else before


class Tape:
    """The forward passes of a policy over T + 1 batches of N observations, and one backward pass over the first T.

    Serves networks of nn.Conv2d and nn.Linear layers with a bias, each followed by nn.ReLU, nn.Tanh or nothing, and
    nn.Flatten between. The parameters must have gradients to add to, as those of `parameters.FlatParameters` have, and
    stay where they are. All layers but the last of each network compute in `dtype`, float32 or bfloat16.
    """

    def __init__(
        self, policy: Policy, steps: int, count: int, shape: Sequence[int], dtype: torch.dtype = torch.float32
    ) -> None:
        self._policy, self._steps, self._count = policy, steps, count
        rows = (steps + 1) * count
        if any(sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network) == 1 for network in policy.networks):
            dtype = torch.float32
        self._inputs = policy.make_inputs(rows, shape, dtype)
        self._outputs = torch.zeros(rows, policy.actions + 1, device=self._inputs.device)
        self._widths = [network[-1].get_parameter("bias").numel() for network in policy.networks]
        self._networks = [
            list(_layers(network, self._inputs, outputs, count))
            for network, outputs in zip(policy.networks, torch.split(self._outputs, self._widths, 1), strict=True)
        ]
        self._passes = 0
        self._parts = list(zip(torch.split(self._inputs, count), torch.split(self._outputs, count), strict=True))

    def begin(self) -> None:
        """Note that passes follow, also such as a CUDA graph makes: those before are over."""
        self._passes += 1

    @torch.no_grad()
    def forward(self, t: int, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, actions) and values (N,) of the observations of step `t`; views, without a gradient.

        Step 0 comes first: from it to the next, the parameters stay as they are.
        """
        self._passes += 1
        outputs = self._parts[t][1]
        self._policy.prepare(observations, self._parts[t][0])
        for network in self._networks:
            for layer in network:
                if t == 0:
                    layer.refresh()
                layer.forward(t)
        return outputs[:, :-1], outputs[:, -1]

    def replay(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (T, N, actions) and values (T, N) of the first T steps, from which gradients find the parameters.

        A backward pass through them must come before the next `forward`, else it raises RuntimeError, and at the same
        parameters.
        """
        passes = self._passes

        def backward(outputs: torch.Tensor) -> None:
            if self._passes != passes:
                raise RuntimeError("the tape has gone on since this replay: its gradients are no longer known")
            self._backward(outputs)

        outputs = self._outputs[: self._steps * self._count].clone().requires_grad_()
        outputs.register_post_accumulate_grad_hook(backward)  # type: ignore[no-untyped-call]
        shaped = outputs.view(self._steps, self._count, -1)
        return shaped[..., :-1], shaped[..., -1]

    @torch.no_grad()
    def _backward(self, outputs: torch.Tensor) -> None:
        assert outputs.grad is not None
        grad: torch.Tensor | None
        for network, grad in zip(self._networks, torch.split(outputs.grad, self._widths, 1), strict=True):
            for layer in reversed(network):
                assert grad is not None
                grad = layer.backward(grad, first=layer is network[0])


def _layers(network: Sequence[nn.Module], inputs: torch.Tensor, outputs: torch.Tensor, count: int) -> Iterator[_Layer]:
    """The layers of a network, from its inputs to its outputs, each working on what the one before it gives."""
    kept = [module for module in network if not isinstance(module, nn.Flatten)]
    places = [place for place, module in enumerate(kept) if isinstance(module, nn.Conv2d | nn.Linear)]
    computes_in, gives = inputs.dtype, outputs.dtype
    for place, end in zip(places, [*places[1:], len(kept)], strict=True):
        module, between = kept[place], kept[place + 1 : end]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        following = kept[end] if end < len(kept) else None
        activation, out = between[0] if between else None, None if following else outputs
        type_after = gives if end == places[-1] else computes_in
        layer = _Layer(module, activation, inputs, out, count, following, type_after)
        inputs = layer.outputs
        yield layer
