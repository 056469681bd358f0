"""A rank that never comes to MPI's start: the others, which wait for it there, end within a limit, and say so."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Mpi

# Rank 1 does not come.
LATE = 'if [ "${PMI_RANK:-$OMPI_COMM_WORLD_RANK}" = 1 ]; then exec sleep 600; fi; exec "$0" "$@"'
VARIABLE = "GALA_MPI_START_TIMEOUT_S"


def start(mpi: Mpi, command: str, limit: str) -> subprocess.CompletedProcess[str]:
    return replace(mpi, python="sh").run(
        2, "-c", LATE, mpi.python, "-m", "gala_mpi", command, env={VARIABLE: limit}, timeout_s=120
    )


@pytest.mark.parametrize("command", ["train", "doctor", "bench"])
def test_the_others_end(mpi: Mpi, command: str) -> None:
    done = start(mpi, command, "6")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "MPI has not started" in line]
    assert lines == [
        f"gala-mpi {command}: error: MPI has not started within 6 s ({VARIABLE}); some rank has not come so far: "
        "it may have died, or its node is slow"
    ]


@pytest.mark.parametrize("limit", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_limit_that_is_none_is_refused_in_one_line(one_mpi: Mpi, limit: str) -> None:
    done = one_mpi.run(2, "-m", "gala_mpi", "train", env={VARIABLE: limit})
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and f"{VARIABLE}: '{limit}' cannot be used; expected" in done.stderr


@pytest.mark.parametrize("compiler", [True, False])
def test_a_missing_library_is_told_once_with_what_helps(mpich: Mpi, compiler: bool, tmp_path: Path) -> None:
    mpicc = tmp_path / "mpicc"
    if compiler:
        mpicc.touch(0o755)
    env = {"MPI4PY_LIBMPI": "/nonexistent/libmpi.so", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = mpich.run(2, "-m", "gala_mpi", "train", env=env)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "error:" in line]
    assert line.startswith("gala-mpi: error: no MPI library can be loaded (")
    build = f"MPICC={mpicc} pip install --force-reinstall --no-deps --no-cache-dir --no-binary mpi4py mpi4py"
    assert line.endswith(build if compiler else "install one: pip install mpich")
