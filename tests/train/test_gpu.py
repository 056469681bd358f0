"""What runs on a GPU gives what runs on the CPU. Skipped where torch can use none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from choices import LEARNERS, named
from conftest import Mpi
from test_determinism import check_same, make_runs
from test_resume import CARTPOLE, assert_goes_on_to_the_bit, assert_same_parameters, newest, resume

from gala_mpi.config import EnvironmentConfig, LearnerConfig
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.learning.environments import make_simulators
from gala_mpi.learning.learner import GpuLearner, Learner, actor_critic_loss
from gala_mpi.learning.networks import AtariPolicy
from gala_mpi.learning.rollout import Collector
from gala_mpi.learning.tape import Tape

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU here")


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def policy(device: str) -> AtariPolicy:
    return AtariPolicy(6, torch.Generator().manual_seed(1)).to(device)


def train(mpi: Mpi, folder: Path, *more: str) -> list[np.ndarray]:
    """A short run of two ranks; the table updates of each."""
    done = mpi.run(
        *(2, "-m", "gala_mpi", "--device", "cuda", "--simulators", "4", "--total-steps", "4000", *more),
        *("--record-every", "1", "--out", str(folder)),
    )
    assert done.returncode == 0, done.stderr
    found = []
    for rank in range(2):
        with h5py.File(folder / f"rank-{rank:05d}.h5", "r", locking=False) as file:
            found.append(file["updates"][:])
    return found


def test_a_tape_gives_on_a_gpu_what_it_gives_on_the_cpu() -> None:
    frames = torch.randint(0, 256, (4, 8, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    found = []
    for device in ("cpu", "cuda"):
        own = policy(device)
        flat = FlatParameters(own)
        tape = Tape(own, 3, 8, (4, 84, 84))
        shown = torch.zeros_like(frames[0], device=device)
        # Twice, with other observations in the same place.
        for order in ((3, 2, 1, 0), (0, 1, 2, 3)):
            for t in range(4):
                last = tape.forward(t, shown.copy_(frames[order[t]]))[1].clone()
        logits, values = tape.replay()
        (torch.log_softmax(logits, 2)[..., 0].sum() + values.square().sum()).backward()
        found.append([tensor.detach().cpu() for tensor in (logits, values, last, flat.grad)])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4 * float(cpu.abs().max()))


def test_a_rollout_on_a_gpu_is_of_the_observations_that_the_simulators_gave() -> None:
    simulators = make_simulators(EnvironmentConfig(simulators=4), threads=1)
    shown: list[np.ndarray] = []

    class Remembering:
        count = simulators.count

        def reset(self, seed: int) -> np.ndarray:
            shown.append(simulators.reset(seed).copy())
            return shown[-1]

        def step(self, actions: np.ndarray) -> object:
            step = simulators.step(actions)
            shown.append(np.array(step.observations))
            return step

    own = policy("cuda")
    FlatParameters(own)
    collector = Collector(Remembering(), own, 5, 1, torch.Generator("cuda").manual_seed(1))  # type: ignore[arg-type]
    for begin in (0, 5):
        rollout = collector.collect()
        with torch.no_grad():
            values = policy("cpu")(torch.from_numpy(np.concatenate(shown[begin : begin + 6])))[1].view(6, 4)
        torch.testing.assert_close(rollout.values.detach().cpu(), values[:5], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(rollout.last_values.cpu(), values[5], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_rank_uses_the_device_that_is_its_own(mpi: Mpi, tmp_path: Path) -> None:
    for rows in train(mpi, tmp_path / "run", "--exchange", "none"):
        # A tape that stood still would give the same losses again and again.
        assert (rows["update_norm"] > 0).all() and len(set(rows["entropy"])) > len(rows) // 2


@pytest.mark.parametrize("choice", LEARNERS, ids=named)
def test_updates_on_a_gpu_are_those_on_the_cpu(choice: LearnerConfig) -> None:
    """Of the same rollouts: what a GPU draws is another stream."""
    simulators = make_simulators(EnvironmentConfig(simulators=4), threads=1)
    own = policy("cuda")
    flat, twin = FlatParameters(own), FlatParameters(policy("cpu"))
    learner, expected = GpuLearner(flat, choice, 7e-4), Learner(twin, choice, 7e-4)
    collector = Collector(simulators, own, 5, 1, torch.Generator("cuda").manual_seed(1))
    for _ in range(3):
        # Each begins where the one on the GPU is.
        twin.data.copy_(flat.data)
        for name, values in learner.state.items():
            expected.state[name].copy_(values)
        rollout = collector.collect()
        # The gradient as it comes without a graph, of the same rollout.
        flat.grad.zero_()
        actor_critic_loss(dataclasses.replace(rollout), choice)[0].backward()
        plain = flat.grad.cpu()
        losses = learner.update(rollout, 0.0, measure=True)
        torch.testing.assert_close(flat.grad.cpu(), plain, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(float(losses.grad_norm), float(flat.grad.norm()), rtol=1e-3, atol=0)
        twin.grad.copy_(flat.grad)
        expected._step(7e-4, measure=False)
        expected.updates += 1
        torch.testing.assert_close(flat.data.cpu(), twin.data, rtol=1e-4, atol=1e-6)
        for name, values in learner.state.items():
            close = 1e-6 * float(expected.state[name].abs().max())
            torch.testing.assert_close(values.cpu(), expected.state[name], rtol=1e-3, atol=close)
        assert all(np.isfinite(float(value)) for value in vars(losses).values())


def test_a_run_is_the_same_to_the_bit_each_time(one_mpi: Mpi, tmp_path: Path) -> None:
    """Convolutions and all."""
    args = ("--env", "ALE/Pong-v5", "--device", "cuda", "--total-steps", "4000")
    make_runs(one_mpi, 1, {"pong": args}, tmp_path)
    check_same(tmp_path, "pong", 1)


def test_ranks_share_a_device(mpi: Mpi, tmp_path: Path) -> None:
    for rows in train(mpi, tmp_path / "run", "--profile"):
        assert np.isfinite(rows["policy_loss"]).all() and rows["messages_mixed"][-1] > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_rank_goes_on_to_the_bit(one_mpi: Mpi, precision: str, tmp_path: Path) -> None:
    args = ("--device", "cuda", "--precision", precision, "--total-steps", "12_800", "--learning-rate-decay", "linear")
    assert_goes_on_to_the_bit(one_mpi, 1, (*CARTPOLE[3:], *args), 77, 77, 200, tmp_path)


def test_a_run_changes_the_device(mpi: Mpi, tmp_path: Path) -> None:
    """Parameters and the optimiser's state are taken over as they are; the streams of another device begin anew."""
    run = tmp_path / "run"
    train(mpi, run)
    for device in ("cpu", "cuda"):
        before = [newest(run, rank) for rank in range(2)]
        # No budget is left: what is written is what was taken over.
        assert "changed: --device from" in resume(mpi, run, 2, "--device", device, "--total-steps", "100")
        for rank in range(2):
            found = newest(run, rank)
            assert found.facts.update == before[rank].facts.update
            assert_same_parameters(before[rank], found)
    steps = sum(newest(run, rank).facts.agent_steps for rank in range(2))
    resume(mpi, run, 2, "--total-steps", str(steps + 4_000))
    for rank in range(2):
        assert newest(run, rank).facts.update > before[rank].facts.update


def test_all_reduce_on_a_gpu_keeps_ranks_the_same(mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(mpi, run, "--exchange", "allreduce")
    assert_same_parameters(newest(run, 0), newest(run, 1))
