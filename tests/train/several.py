"""Several runs in one launch: to start Python and torch on every rank is most of what a short run costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from conftest import Mpi

# What `gala-mpi train` does between the start of MPI and its end, once for each run.
RUNS = """
import json, sys
from mpi4py import MPI
from gala_mpi.train import command
from gala_mpi.train.signals import StopRequest
for args in json.loads(sys.argv[1]):
    code = command.run(args, MPI.COMM_WORLD, StopRequest())
    assert code == 0, (code, args)
"""


def train_all(
    mpi: Mpi, size: int, runs: Mapping[str, Sequence[str]], folder: Path, *, first: str = "", timeout_s: float = 240
) -> None:
    """Make each of `runs`, options of `gala-mpi train` by name, in `folder / name`: one after the other.

    All must end with exit code 0. The code `first` is run once, before them.
    """
    folder.mkdir(exist_ok=True)
    args = json.dumps([[*options, "--out", str(folder / name)] for name, options in runs.items()])
    # By `-m mpi4py` an error on one rank ends them all.
    done = mpi.run(size, "-m", "mpi4py", "-c", first + RUNS, args, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
