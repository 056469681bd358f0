"""MPI's end waits for ranks that do not come there: the process ends without it, with the exit code of its command."""

from __future__ import annotations

from conftest import Mpi

# Rank 1 does not come to MPI's end.
LATE = """
import sys, time
from mpi4py import MPI
from gala_mpi import cli
cli.END_WITHIN_S = 3.0
def work(comm):
    if comm.rank:
        time.sleep(600)
    return 4
sys.exit(cli.under_mpi("train", work))
"""


def test_a_rank_that_never_comes_to_the_end_holds_nobody(mpi: Mpi) -> None:
    done = mpi.run(2, "-c", LATE, timeout_s=120)
    assert done.returncode != 0
    line = "gala-mpi: warning: the end of MPI has not returned within 3 s; this process ends without it"
    assert done.stderr.count(line) == 1, done.stderr
