"""The tape: what it gives, and the gradients that come of it, are those of plain forward and backward passes."""

from __future__ import annotations

import pytest
import torch

from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.learning.networks import AtariPolicy, MLPPolicy, Policy
from gala_mpi.learning.tape import Tape

STEPS, COUNT = 3, 4


def policies() -> list[tuple[Policy, torch.Tensor]]:
    """Each kind of policy, with observations (T + 1, N, ...)."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (STEPS + 1, COUNT, 4, 84, 84), dtype=torch.uint8, generator=generator)
    flat = torch.randn(STEPS + 1, COUNT, 5, generator=generator, dtype=torch.float64)
    return [
        (AtariPolicy(6, generator), frames),
        (MLPPolicy(5, (16, 8), 3, generator), flat),
        (MLPPolicy(5, (), 2, generator), flat),
    ]


def loss(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One that every output has its part in."""
    return torch.log_softmax(logits, -1)[..., 0].mul(values.detach()).sum() + values.square().mean()


@pytest.mark.parametrize("kind", range(3), ids=["atari", "two networks", "one layer"])
def test_outputs_and_gradients_are_those_of_plain_passes(kind: int) -> None:
    policy, observations = policies()[kind]
    flat = FlatParameters(policy)
    tape = Tape(policy, STEPS, COUNT, observations.shape[2:])
    # What lies on it from before, and a batch that is shown again in another place, must not show.
    for t in (0, 1, 2, 3, 1, 0):
        tape.forward(t, observations.flip(0)[t])
    for t in range(STEPS + 1):
        logits, values = tape.forward(t, observations[t])
        expected = policy(observations[t])
        torch.testing.assert_close((logits, values), expected, rtol=1e-4, atol=1e-6)
        assert not logits.requires_grad
    logits, values = tape.replay()
    # The last batch is in no loss.
    expected = policy(observations[:STEPS].flatten(0, 1))
    torch.testing.assert_close((logits.flatten(0, 1), values.flatten()), expected, rtol=1e-4, atol=1e-6)
    loss(logits, values).backward()
    found = flat.grad.clone()
    flat.grad.zero_()
    loss(expected[0].view(logits.shape), expected[1].view(values.shape)).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    torch.testing.assert_close(found, flat.grad, rtol=1e-3, atol=1e-5 * float(flat.grad.abs().max()))


@pytest.mark.parametrize("kind", range(3), ids=["atari", "two networks", "one layer"])
def test_in_bfloat16_outputs_and_gradients_are_near_those_of_float32(kind: int) -> None:
    policy, observations = policies()[kind]
    flat = FlatParameters(policy)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        tape = Tape(policy, STEPS, COUNT, observations.shape[2:], dtype)
        for t in range(STEPS + 1):
            logits, values = tape.forward(t, observations[t])
            assert logits.dtype == values.dtype == torch.float32
        flat.grad.zero_()
        loss(*tape.replay()).backward()
        found.append((*(x.detach() for x in tape.replay()), flat.grad.clone()))
    for exact, rounded in zip(*found, strict=True):
        # Eight bits of each value, in four layers at most; the heads in full.
        assert float((exact - rounded).norm() / exact.norm()) < 0.02
        assert kind == 2 or not torch.equal(exact, rounded)


def test_a_rollout_in_bfloat16_begins_with_the_parameters_of_that_moment() -> None:
    policy, observations = policies()[1]
    flat = FlatParameters(policy)
    tape = Tape(policy, STEPS, COUNT, observations.shape[2:], torch.bfloat16)
    tape.forward(0, observations[0])
    flat.data.mul_(1.5)
    logits, values = tape.forward(0, observations[0])
    torch.testing.assert_close((logits, values), policy(observations[0]), rtol=0.03, atol=0.03)


def test_gradients_are_added_to_what_is_there() -> None:
    policy, observations = policies()[1]
    flat = FlatParameters(policy)
    tape = Tape(policy, STEPS, COUNT, observations.shape[2:])
    for t in range(STEPS + 1):
        tape.forward(t, observations[t])
    loss(*tape.replay()).backward()
    once = flat.grad.clone()
    loss(*tape.replay()).backward()
    torch.testing.assert_close(flat.grad, 2 * once)


def test_what_was_replayed_stays_when_the_tape_goes_on() -> None:
    policy, observations = policies()[1]
    FlatParameters(policy)
    tape = Tape(policy, STEPS, COUNT, observations.shape[2:])
    tape.forward(0, observations[0])
    values = tape.replay()[1]
    before = values.detach().clone()
    tape.forward(0, observations[1])
    assert torch.equal(values, before)
    with pytest.raises(RuntimeError, match="gone on"):
        values.sum().backward()
