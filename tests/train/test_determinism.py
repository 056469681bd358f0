"""What the seed fixes: the same run twice gives the same to the bit, where the documentation says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Mpi, Once, either
from several import train_all

from gala_mpi.storage.checkpoint import Checkpoint, CheckpointFolder, read
from gala_mpi.storage.run_folder import rank_file

CARTPOLE = ("--preset", "cartpole", "--total-steps", "12_800")
# Runs of 3 ranks; those of one library are made together.
IN_STEP = {"in step": ("--exchange", "allreduce")}
OTHERS = {
    "without exchange": ("--exchange", "none", "--budget", "per-rank"),
    "shared budget": ("--exchange", "none", "--learning-rate-decay", "none", "--record-every", "1"),
    "gossip": ("--total-steps", "64"),
}


def ends(run: Path, size: int) -> list[Checkpoint]:
    """The last checkpoint of each rank."""
    return [read(CheckpointFolder(run, rank).newest_first()[0], 10**8) for rank in range(size)]


def same(first: Checkpoint, second: Checkpoint) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        np.array_equal(values, second.tensors[name]) for name, values in first.tensors.items()
    )


def make_runs(mpi: Mpi, size: int, runs: Mapping[str, tuple[str, ...]], folder: Path) -> None:
    """Each run with one seed in two launches, `first` and `again`; in the second with another seed too."""
    for launch, seeds in (("first", (5,)), ("again", (5, 6))):
        seeded = {
            f"{name} {seed}": (*CARTPOLE, *args, "--seed", str(seed)) for name, args in runs.items() for seed in seeds
        }
        train_all(mpi, size, seeded, folder / launch)


def check_same(folder: Path, name: str, size: int) -> None:
    """Two runs with one seed are the same to the bit, and one with another is not."""
    places = (f"first/{name} 5", f"again/{name} 5", f"again/{name} 6")
    for first, again, other in zip(*(ends(folder / place, size) for place in places), strict=True):
        assert first.facts.update == again.facts.update > 0
        assert same(first, again) and not same(first, other)


def runs_of_3(once: Once, mpi: Mpi) -> Path:
    """The folder of the runs of 3 ranks with a library."""
    runs = IN_STEP | OTHERS if mpi == either() else IN_STEP
    return once(f"twice-{mpi.name}", lambda folder: make_runs(mpi, 3, runs, folder))


@pytest.mark.parametrize("args", [(), ("--precision", "bfloat16")], ids=["float32", "bfloat16"])
def test_a_run_of_one_rank_is_the_same_to_the_bit_each_time(
    one_mpi: Mpi, args: tuple[str, ...], tmp_path: Path
) -> None:
    make_runs(one_mpi, 1, {"alone": args}, tmp_path)
    check_same(tmp_path, "alone", 1)


def test_a_run_in_step_is_the_same_to_the_bit_each_time(mpi: Mpi, once: Once) -> None:
    check_same(runs_of_3(once, mpi), "in step", 3)


def test_a_run_without_exchange_is_the_same_to_the_bit_each_time(one_mpi: Mpi, once: Once) -> None:
    check_same(runs_of_3(once, one_mpi), "without exchange", 3)


def test_ranks_that_share_nothing_but_the_budget_differ_in_their_ends_alone(one_mpi: Mpi, once: Once) -> None:
    rows = []
    for launch in ("first", "again"):
        for rank in range(3):
            with h5py.File(rank_file(runs_of_3(once, one_mpi) / launch / "shared budget 5", rank), "r") as file:
                rows.append(file["updates"][:])
    for first, again in zip(rows[:3], rows[3:], strict=True):
        count = min(len(first), len(again))
        assert count > 20
        for name in ("agent_steps", "policy_loss", "value_loss", "entropy", "grad_norm", "update_norm"):
            np.testing.assert_array_equal(first[name][:count], again[name][:count], err_msg=name)


def test_gossip_begins_with_the_same_parameters_on_all_ranks_and_streams_of_their_own(one_mpi: Mpi, once: Once) -> None:
    firsts = []
    for launch in ("first", "again"):
        run = runs_of_3(once, one_mpi) / launch / "gossip 5"
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
