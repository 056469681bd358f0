"""The template for Slurm, run by hand: a signal before the limit puts the job into the queue again, which goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LAUNCHER_VARIABLES, ROOT, finish

ENVIRONMENT = Path(sys.executable).parent.parent


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    """Run the template as Slurm would, with a queue that only writes down what it is asked."""
    queue = folder / "bin" / "scontrol"
    queue.parent.mkdir(exist_ok=True)
    queue.write_text(f'#!/bin/sh\necho "$@" >> {folder}/queue\n')
    queue.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    slurm = {"SLURM_JOB_NAME": "test", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
    ours = {"GALA_MPI_ENV": str(ENVIRONMENT), "GALA_MPI_LAUNCHER": "mpirun", "GALA_MPI_OUT": str(folder / "run")}
    return subprocess.Popen(
        ["bash", str(ROOT / "jobs" / "train.sbatch"), "--preset", "cartpole", *args],
        env={**clean, **slurm, **ours, "PATH": f"{queue.parent}:{clean['PATH']}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "mpirun").exists(), reason="the environment brings no mpirun")
def test_a_job_that_is_told_of_its_limit_queues_itself_and_goes_on(tmp_path: Path) -> None:
    first = start(tmp_path, "--total-steps", "100_000_000")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("run/checkpoints/rank-00001/segment-0-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    first.send_signal(signal.SIGUSR1)
    ended = finish(first, 60)
    assert ended.returncode == 75, ended.stderr
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
    # What Slurm starts again is the same script with the same arguments.
    again = finish(start(tmp_path, "--total-steps", "1000"), 60)
    assert again.returncode == 0, again.stderr
    assert "changed: --total-steps" in again.stdout and (tmp_path / "run" / "rank-00000.1.h5").exists()
    assert (tmp_path / "queue").read_text() == "requeue 7\n"


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "mpirun").exists(), reason="the environment brings no mpirun")
def test_a_job_that_fails_is_not_queued_again(tmp_path: Path) -> None:
    ended = finish(start(tmp_path, "--simulators", "0"), 60)
    assert ended.returncode == 2 and "--simulators: 0" in ended.stderr
    assert not (tmp_path / "queue").exists()
