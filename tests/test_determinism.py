"""What the seed fixes: the same run twice gives the same to the bit, where the documentation says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Mpi

from gala_mpi.checkpoint import Checkpoint, CheckpointFolder, read

TRAIN = ("-m", "gala_mpi", "train", "--preset", "cartpole", "--total-steps", "12_800")


def ends(run: Path, size: int) -> list[Checkpoint]:
    """The last checkpoint of each rank."""
    return [read(CheckpointFolder(run, rank).newest_first()[0], 10**8) for rank in range(size)]


def same(first: Checkpoint, second: Checkpoint) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        np.array_equal(values, second.tensors[name]) for name, values in first.tensors.items()
    )


@pytest.mark.parametrize(
    ("size", "args"),
    [
        (1, ()),
        (1, ("--precision", "bfloat16")),
        (3, ("--exchange", "allreduce")),
        (3, ("--exchange", "none", "--budget", "per-rank")),
    ],
    ids=["one rank", "bfloat16", "allreduce", "none"],
)
def test_a_run_is_the_same_to_the_bit_each_time(one_mpi: Mpi, size: int, args: tuple[str, ...], tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((5, 5, 6)):
        run = tmp_path / str(number)
        done = one_mpi.run(size, *TRAIN, *args, "--seed", str(seed), "--out", str(run))
        assert done.returncode == 0, done.stderr
        found.append(ends(run, size))
    for first, again, other in zip(*found, strict=True):
        assert first.facts.update == again.facts.update > 0
        assert same(first, again) and not same(first, other)


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
