"""Flat parameters: one buffer, seen through the module's own tensors, in values, gradients and memory format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gala_mpi.gossip.parameters import FlatCopy, FlatParameters, flatten
from gala_mpi.learning.networks import AtariPolicy, MLPPolicy


def test_values_are_kept_and_live_in_the_buffer() -> None:
    policy = MLPPolicy(3, (5, 4), 2, torch.Generator().manual_seed(1))
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    flat = FlatParameters(policy)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name])
    flat.data.zero_()
    assert all((parameter == 0).all() for parameter in policy.parameters())


def test_views_cover_the_buffer_once() -> None:
    policy = AtariPolicy(6, torch.Generator().manual_seed(1))
    flat = FlatParameters(policy)
    assert flat.size == 866_439 == sum(parameter.numel() for parameter in policy.parameters())
    flat.data.zero_()
    for parameter in policy.parameters():
        parameter.data.add_(1)
    assert torch.equal(flat.data, torch.ones(flat.size))
    named = list(policy.named_parameters())
    places = [parameter.data.storage_offset() for _, parameter in named]
    assert places == np.cumsum([0, *(p.numel() for _, p in named[:-1])]).tolist()


def test_gradients_land_in_the_buffer_at_every_backward() -> None:
    policy = MLPPolicy(3, (5,), 2, torch.Generator().manual_seed(1))
    flat = FlatParameters(policy)
    for _ in range(3):
        flat.grad.zero_()
        logits, values = policy(torch.ones(4, 3))
        (logits.sum() + values.sum()).backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
        assert torch.equal(flat.grad, expected) and flat.grad.abs().sum() > 0
        pointers = [parameter.grad.data_ptr() for parameter in policy.parameters()]
        places = [parameter.data.storage_offset() for parameter in policy.parameters()]
        assert pointers == [flat.grad[place:].data_ptr() for place in places]


def test_memory_format_is_kept() -> None:
    policy = AtariPolicy(4, torch.Generator().manual_seed(1))
    strides = {name: parameter.stride() for name, parameter in policy.named_parameters()}
    FlatParameters(policy)
    assert {name: parameter.stride() for name, parameter in policy.named_parameters()} == strides
    weight = policy.body[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert weight.grad.stride() == weight.stride()


def test_tied_parameters_are_counted_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    flat = FlatParameters(module)
    assert flat.size == 16 + 4 + 4
    flat.data.fill_(2)
    assert (module[1].weight == 2).all() and module[1].weight is module[0].weight


def test_what_it_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is torch\.float64"):
        FlatParameters(nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="no parameters"):
        FlatParameters(nn.ReLU())
    with pytest.raises(ValueError, match="on meta"):
        FlatParameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


def test_on_a_cpu_host_memory_is_the_buffer_itself() -> None:
    flat = FlatParameters(nn.Linear(3, 3))
    flat.host()[:] = np.arange(12)
    flat.store_host()
    assert flat.data.tolist() == list(range(12))


def test_one_matrix_under_two_parameters_is_refused() -> None:
    # Each of them would get a copy of its own, and what was one matrix would be two from then on.
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(module[0].weight.detach().t())
    with pytest.raises(ValueError, match="shared"):
        FlatParameters(module)


def test_what_is_written_into_the_buffer_is_what_the_module_computes_with() -> None:
    policy, other = (MLPPolicy(3, (5,), 2, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    flat, source = FlatParameters(policy), FlatParameters(other)
    observations = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(policy(observations)[0], other(observations)[0])
    flat.data.copy_(source.data)
    for found, expected in zip(policy(observations), other(observations), strict=True):
        assert torch.equal(found, expected)


def test_the_flag_travels_behind_the_gradient_and_is_no_part_of_it() -> None:
    policy = MLPPolicy(3, (5,), 2, torch.Generator().manual_seed(1))
    flat = FlatParameters(policy)
    assert flat.grad_and_flag.shape == (flat.size + 1,) and flat.grad.shape == (flat.size,)
    flat.grad_and_flag[-1] = 7
    logits, values = policy(torch.ones(4, 3))
    (logits.sum() + values.sum()).backward()
    assert flat.grad_and_flag[-1] == 7
    assert torch.equal(flat.grad_and_flag[:-1], flat.grad) and flat.grad.data_ptr() == flat.grad_and_flag.data_ptr()
    flat.grad.zero_()
    assert flat.grad_and_flag[-1] == 7


def test_a_step_on_the_flat_buffer_moves_the_module() -> None:
    policy = MLPPolicy(3, (5,), 2, torch.Generator().manual_seed(1))
    flat = FlatParameters(policy)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    logits, values = policy(torch.ones(4, 3))
    (logits.square().sum() + values.sum()).backward()
    flat.data.sub_(flat.grad, alpha=0.5)
    for parameter, old in zip(policy.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.5 * parameter.grad)


def test_parameters_of_other_types_take_over_what_was_made_of_their_copy() -> None:
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in types])
    flat = flatten(model)
    assert isinstance(flat, FlatCopy) and flat.size == 16 and list(flat.given_once) == list(model)
    wanted = [1.0, 1.0, 0.5, 1 / 3]
    for parameter in model:
        # Of a rank that diverges some are not finite, and some just huge.
        large = 6e4 if parameter.dtype == torch.float16 else 1e20
        parameter.data[:] = torch.tensor([torch.nan, large, 0.5, 1 / 3], dtype=torch.float64)
    flat.host()[:] = np.tile(np.array(wanted, np.float32), 4)
    flat.store_host()
    for parameter in model:
        assert torch.equal(parameter[:3], torch.tensor(wanted[:3], dtype=parameter.dtype))
    # Last digits stay, of what was not changed and of what was.
    assert model[0][3] == 1 / 3 and model[1][3] == np.float32(1 / 3)
    model[0].data[3] = 1 + 1e-12
    flat.host()[3] = 2.0
    flat.store_host()
    assert model[0][3] == 2 + 1e-12


def test_what_cannot_be_copied_is_refused_and_what_is_converted_is_found() -> None:
    with pytest.raises(ValueError, match=r"complex64 .* float32 or float64 or bfloat16 or float16"):
        flatten(nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]))
    model = nn.Linear(2, 2).double()
    flat = flatten(model)
    flat.check(model)
    model.weight.requires_grad_(False)
    flat.check(model)
    model.float()
    with pytest.raises(RuntimeError, match="is not where it is exchanged"):
        flat.check(model)
