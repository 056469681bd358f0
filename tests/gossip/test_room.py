"""Windows in a shared memory that is too small for them: refused on all ranks, before any is made."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace

import pytest
from conftest import Mpi

from gala_mpi.mpi.library import family
from gala_mpi.mpi.room import FAR_ONES_MOVED_BY, MOVED_BY, SHARED_MEMORY, place_of_windows

SMALL = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size="$0" tmpfs /dev/shm && exec "$@"')
# 1.6 M parameters: 19 MB for each in-neighbour.
PROGRAM = """
import sys
import torch
from mpi4py import MPI
import gala_mpi
comm = MPI.COMM_WORLD
def gossip(features):
    return gala_mpi.Gossip(torch.nn.Linear(features, 1000, bias=False), comm, sys.argv[1])
said = ""
try:
    gossip(1600)
except MemoryError as error:
    assert isinstance(error, gala_mpi.NoRoomError)
    said = str(error)
# Nothing is left behind: a smaller one fits.
with gossip(2) as small:
    small.step()
sys.stdout.write(f"rank {comm.rank}: {said}\\n")
"""


def on_a_small_node(mpi: Mpi, size: str) -> Mpi:
    """The library where /dev/shm has `size`."""
    if subprocess.run([*SMALL, size, "true"], check=False, capture_output=True).returncode:
        if os.environ.get("GALA_MPI_REQUIRE_CLUSTER"):
            pytest.fail("a small /dev/shm is required: only root may mount one")
        pytest.skip("only root may mount a small /dev/shm")
    return replace(mpi, prefix=(*SMALL, size))


# In the last there is room for the mailboxes, but not for what is kept for survivors.
@pytest.mark.parametrize(
    ("topology", "size"), [("ring", "48m"), ("hierarchical", "48m"), ("complete", "48m"), ("ring", "72m")]
)
def test_the_library_refuses_what_does_not_fit_on_all_ranks(mpi: Mpi, topology: str, size: str) -> None:
    done = on_a_small_node(mpi, size).run(3, "-m", "mpi4py", "-c", PROGRAM, topology)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"rank {rank}: ")]
        assert "the windows need" in line and "of /dev/shm" in line and "what helps: docker run --shm-size=" in line


@pytest.mark.parametrize("command", ["train", "bench"])
def test_commands_refuse_it_in_one_line(one_mpi: Mpi, command: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("out") / "run"
    args = {
        "train": ("--preset", "cartpole", "--hidden", "1200", "1200", "--topology", "hierarchical", "--out", str(out)),
        "bench": ("--parameters", "1_600_000", "--topology", "complete", "--no-gloo", "--deadline-s", "60"),
    }
    done = on_a_small_node(one_mpi, "48m").run(3, "-m", "gala_mpi", command, *args[command])
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "the windows need" in line and "of /dev/shm" in line
    assert not out.exists()


def test_a_directory_that_open_mpi_is_given_is_where_windows_lie() -> None:
    environ = {MOVED_BY: "/scratch", FAR_ONES_MOVED_BY: "/scratch"}
    assert place_of_windows("Open MPI v5.0.11", {MOVED_BY: "/scratch"}) == SHARED_MEMORY
    assert str(place_of_windows("Open MPI v5.0.11", environ)) == "/scratch"
    assert place_of_windows("Open MPI v5.0.11", {}) == place_of_windows("MPICH Version: 5.0.2", environ)
    assert place_of_windows("", environ) == SHARED_MEMORY and family("") == "other"
