"""The board of a run: sums are exact at the end, and requests and ends are known to all."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Mpi

PROGRAM = str(Path(__file__).parent / "programs" / "board_properties.py")


def test_whoever_sees_that_all_of_two_nodes_are_done_knows_all_that_they_did(mpi: Mpi) -> None:
    done = mpi.run(8, PROGRAM, "4")
    assert done.returncode == 0 and "as promised" in done.stdout, done.stderr


@pytest.mark.parametrize(("size", "per_node"), [(8, 8), (5, 3), (8, 1)])
def test_whoever_sees_that_all_are_done_knows_all_that_they_did(one_mpi: Mpi, size: int, per_node: int) -> None:
    done = one_mpi.run(size, PROGRAM, str(per_node))
    assert done.returncode == 0 and "as promised" in done.stdout, done.stderr
