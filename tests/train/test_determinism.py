"""What the seed fixes: the same run twice gives the same to the bit, where the documentation says so."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Mpi

from gala_mpi.storage.checkpoint import Checkpoint, CheckpointFolder, read
from gala_mpi.storage.run_folder import rank_file

TRAIN = ("-m", "gala_mpi", "train", "--preset", "cartpole", "--total-steps", "12_800")


def ends(run: Path, size: int) -> list[Checkpoint]:
    """The last checkpoint of each rank."""
    return [read(CheckpointFolder(run, rank).newest_first()[0], 10**8) for rank in range(size)]


def same(first: Checkpoint, second: Checkpoint) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        np.array_equal(values, second.tensors[name]) for name, values in first.tensors.items()
    )


def check_same(mpi: Mpi, size: int, args: tuple[str, ...], folder: Path) -> None:
    """Two runs with one seed are the same to the bit, and one with another is not."""
    found = []
    for number, seed in enumerate((5, 5, 6)):
        run = folder / str(number)
        done = mpi.run(size, *TRAIN, *args, "--seed", str(seed), "--out", str(run))
        assert done.returncode == 0, done.stderr
        found.append(ends(run, size))
    for first, again, other in zip(*found, strict=True):
        assert first.facts.update == again.facts.update > 0
        assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("args", [(), ("--precision", "bfloat16")], ids=["float32", "bfloat16"])
def test_a_run_of_one_rank_is_the_same_to_the_bit_each_time(
    one_mpi: Mpi, args: tuple[str, ...], tmp_path: Path
) -> None:
    check_same(one_mpi, 1, args, tmp_path)


def test_a_run_in_step_is_the_same_to_the_bit_each_time(mpi: Mpi, tmp_path: Path) -> None:
    check_same(mpi, 3, ("--exchange", "allreduce"), tmp_path)


def test_a_run_without_exchange_is_the_same_to_the_bit_each_time(one_mpi: Mpi, tmp_path: Path) -> None:
    check_same(one_mpi, 3, ("--exchange", "none", "--budget", "per-rank"), tmp_path)


def test_ranks_that_share_nothing_but_the_budget_differ_in_their_ends_alone(one_mpi: Mpi, tmp_path: Path) -> None:
    args = ("--exchange", "none", "--learning-rate-decay", "none", "--record-every", "1", "--seed", "5")
    rows = []
    for number in range(2):
        run = tmp_path / str(number)
        assert one_mpi.run(3, *TRAIN, *args, "--out", str(run)).returncode == 0
        for rank in range(3):
            with h5py.File(rank_file(run, rank), "r") as file:
                rows.append(file["updates"][:])
    for first, again in zip(rows[:3], rows[3:], strict=True):
        count = min(len(first), len(again))
        assert count > 20
        for name in ("agent_steps", "policy_loss", "value_loss", "entropy", "grad_norm", "update_norm"):
            np.testing.assert_array_equal(first[name][:count], again[name][:count], err_msg=name)


def test_gossip_begins_with_the_same_parameters_on_all_ranks_and_streams_of_their_own(
    one_mpi: Mpi, tmp_path: Path
) -> None:
    firsts = []
    for number in range(2):
        run = tmp_path / str(number)
        args = ("--total-steps", "64", "--seed", "5", "--out", str(run))
        assert one_mpi.run(3, *TRAIN[:5], *args).returncode == 0
        name = "segment-0-update-000000000000.safetensors"
        firsts += [read(CheckpointFolder(run, rank).path / name, 10**8) for rank in range(3)]
    for rank in range(3):
        assert same(firsts[rank], firsts[rank + 3])
        other = firsts[(rank + 1) % 3]
        for name, values in firsts[rank].tensors.items():
            if name.startswith("parameters."):
                assert np.array_equal(values, other.tensors[name])
        for name in ("actions.stream", "observations", "simulators.0.stream"):
            assert not np.array_equal(firsts[rank].tensors[name], other.tensors[name])
