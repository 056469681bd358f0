"""Policies: shapes, initial values, and the scale of what goes in."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from gala_mpi.learning.networks import AtariPolicy, MLPPolicy


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shapes() -> None:
    logits, values = AtariPolicy(6, generator())(torch.zeros(3, 4, 84, 84, dtype=torch.uint8))
    assert logits.shape == (3, 6) and values.shape == (3,)
    logits, values = MLPPolicy(5, (7, 8), 2, generator())(torch.zeros(3, 5, dtype=torch.float64))
    assert logits.shape == (3, 2) and values.shape == (3,)


def test_one_seed_gives_one_policy() -> None:
    first, again, other = (AtariPolicy(4, generator(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["body.0.weight"], other["body.0.weight"])


def test_layers_are_orthogonal_of_the_stated_gain() -> None:
    policy = MLPPolicy(64, (32, 16), 4, generator())
    for layer, gain in ((policy.actor[0], math.sqrt(2)), (policy.actor[2], math.sqrt(2)), (policy.actor[4], 0.01)):
        rows = layer.weight @ layer.weight.T
        torch.testing.assert_close(rows, gain**2 * torch.eye(len(rows)), rtol=1e-4, atol=1e-5)
        assert (layer.bias == 0).all()
    atari = AtariPolicy(6, generator())
    head = atari.head.weight
    torch.testing.assert_close(head[:6] @ head[:6].T, 1e-4 * torch.eye(6), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(head[6].norm(), torch.tensor(1.0))
    torch.testing.assert_close(policy.critic[4].weight.norm(), torch.tensor(1.0))
    assert torch.equal(atari.head.bias, torch.zeros(7))
    for index in (0, 2, 4, 7):
        flat = atari.body[index].weight.flatten(1)
        torch.testing.assert_close(flat @ flat.T, 2 * torch.eye(len(flat)), rtol=1e-4, atol=1e-5)
        assert (atari.body[index].bias == 0).all()


def test_the_first_policy_is_all_but_uniform() -> None:
    frames = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8, generator=generator())
    probabilities = AtariPolicy(6, generator())(frames)[0].softmax(1)
    assert (probabilities - 1 / 6).abs().max() < 0.02
    # Tanh units of at most 1, 64 of them, under rows of norm 0.01: logits within 0.08, and mostly far within.
    flat = 10 * torch.randn(50, 4, generator=generator())
    logits = MLPPolicy(4, (64, 64), 2, generator())(flat)[0]
    assert 0 < logits.abs().max() < 0.08


def test_the_two_heads_of_a_flat_task_share_nothing() -> None:
    policy = MLPPolicy(3, (5,), 2, generator())
    policy(torch.ones(4, 3))[1].sum().backward()
    assert not any(parameter.grad.any() for parameter in policy.actor.parameters())
    assert all(parameter.grad.any() for parameter in policy.critic.parameters())


def test_what_comes_in_is_left_as_it_is() -> None:
    # Pixels of 255 become 1 within the network, in a copy of it.
    frames = torch.full((1, 4, 84, 84), 255, dtype=torch.uint8)
    as_floats = frames.float()
    policy = AtariPolicy(6, generator())
    torch.testing.assert_close(policy(frames), policy(as_floats.clone()))
    policy(frames)
    assert (frames == 255).all()


def test_frames_are_scaled_to_one() -> None:
    policy = AtariPolicy(6, generator())
    frames = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8, generator=generator())
    x = frames.float() / 255
    for layer, stride in ((policy.body[0], 4), (policy.body[2], 2), (policy.body[4], 1)):
        x = functional.relu(functional.conv2d(x, layer.weight.contiguous(), layer.bias, stride))
    x = functional.relu(functional.linear(x.flatten(1), policy.body[7].weight, policy.body[7].bias))
    out = functional.linear(x, policy.head.weight, policy.head.bias)
    logits, values = policy(frames)
    torch.testing.assert_close(torch.cat([logits, values[:, None]], 1), out, rtol=1e-4, atol=1e-5)
    assert frames.dtype == torch.uint8 and frames.max() > 200
