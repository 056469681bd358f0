"""The template for Slurm, run by hand: a signal before the limit puts the job into the queue again, which goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from conftest import LAUNCHER_VARIABLES, ROOT, Mpi, finish, kill
from test_cli import SLOW, assert_closed, start_long_run

ENVIRONMENT = Path(sys.executable).parent.parent


def start(
    folder: Path,
    *args: str,
    launcher: str = "mpirun",
    environment: Path = ENVIRONMENT,
    slurm: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Run the template as Slurm would, with a queue that only writes down what it is asked."""
    queue = folder / "bin" / "scontrol"
    queue.parent.mkdir(exist_ok=True)
    queue.write_text(f'#!/bin/sh\necho "$@" >> {folder}/queue\n')
    queue.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    given = {"SLURM_JOB_NAME": "test", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
    ours = {"GALA_MPI_ENV": str(environment), "GALA_MPI_LAUNCHER": launcher, "GALA_MPI_OUT": str(folder / "run")}
    return subprocess.Popen(
        ["bash", str(ROOT / "jobs" / "train.sbatch"), "--preset", "cartpole", *args],
        env={**clean, **given, **ours, **slurm, "PATH": f"{queue.parent}:{clean['PATH']}"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "mpirun").exists(), reason="the environment brings no mpirun")
def test_a_job_that_is_told_of_its_limit_queues_itself_and_goes_on(tmp_path: Path) -> None:
    first = start(tmp_path, "--total-steps", "100_000_000")
    deadline = time.monotonic() + 240
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
    assert "changed: --total-steps" in again.stdout and (tmp_path / "run" / "segment-1" / "rank-00000.h5").exists()
    assert (tmp_path / "queue").read_text() == "requeue 7\n"


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "mpirun").exists(), reason="the environment brings no mpirun")
def test_a_job_that_fails_is_not_queued_again(tmp_path: Path) -> None:
    ended = finish(start(tmp_path, "--simulators", "0"), 60)
    assert ended.returncode == 2 and "--simulators: 0" in ended.stderr
    assert not (tmp_path / "queue").exists()


@pytest.mark.parametrize("given", ["--out", "--out=mine", "--resume"])
def test_a_folder_among_the_arguments_is_refused(given: str, tmp_path: Path) -> None:
    """The job would not find its run again once it is queued again."""
    ended = finish(start(tmp_path, given, "mine"), 60)
    assert ended.returncode == 2 and ended.stderr.startswith(f"{given}: set GALA_MPI_OUT")


def test_an_environment_that_is_none_is_told(tmp_path: Path) -> None:
    ended = finish(start(tmp_path, environment=tmp_path), 60)
    assert ended.returncode == 2 and ended.stderr.startswith(f"GALA_MPI_ENV: {tmp_path} is no virtual environment")


@pytest.mark.parametrize(
    ("slurm", "launched"),
    [
        ({"SLURM_CPUS_PER_TASK": "4"}, "srun --mpi=pmix --kill-on-bad-exit=0 --cpus-per-task=4 gala-mpi train"),
        ({"GALA_MPI_LAUNCHER": "mpirun"}, "mpirun -n 2 gala-mpi train"),
        (
            {"GALA_MPI_LAUNCHER": "mpirun", "SLURM_NTASKS": "", "SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "8"},
            "mpirun -n 24 gala-mpi train",
        ),
        ({"GALA_MPI_LAUNCHER": "mpirun", "SLURM_NTASKS": ""}, ""),
    ],
)
def test_ranks_get_the_cores_that_the_job_has(slurm: dict[str, str], launched: str, tmp_path: Path) -> None:
    """srun takes over no --cpus-per-task since Slurm 22.05, and Slurm may set no number of tasks."""
    for name in ("srun", "mpirun"):
        launcher = tmp_path / "env" / "bin" / name
        launcher.parent.mkdir(parents=True, exist_ok=True)
        launcher.write_text(f'#!/bin/sh\necho {name} "$@" with $OMP_NUM_THREADS threads\n')
        launcher.chmod(0o755)
    (tmp_path / "env" / "bin" / "activate").write_text(f'PATH="{tmp_path}/env/bin:$PATH"\n')
    ended = finish(start(tmp_path, environment=tmp_path / "env", launcher="srun", slurm=slurm), 60)
    if launched:
        assert ended.returncode == 0 and ended.stdout.startswith(launched), ended
        assert f"with {slurm.get('SLURM_CPUS_PER_TASK', '1')} threads" in ended.stdout
    else:
        assert ended.returncode == 2 and ended.stderr.startswith("SLURM_NTASKS: is not set") and ended.stdout == ""


def test_a_rank_that_is_killed_on_the_way_does_not_keep_a_job_from_the_queue(tmp_path: Path) -> None:
    """srun gives the greatest code of all ranks, that of the killed one."""
    launcher = tmp_path / "bin" / "srun"
    launcher.parent.mkdir()
    launcher.write_text("#!/bin/bash\ntrap 'exit 137' USR1\ntouch started\nwhile :; do sleep 0.1; done\n")
    launcher.chmod(0o755)
    job = start(tmp_path, launcher="srun")
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert finish(job, 30).returncode == 137
    assert (tmp_path / "queue").read_text() == "requeue 7\n"


def test_an_interruptible_launcher_gives_long_updates_the_time_they_need(mpi: Mpi, tmp_path: Path) -> None:
    mpi = replace(mpi, prefix=("bash", str(ROOT / "jobs" / "interruptible.sh")))
    run = tmp_path / "run"
    process = start_long_run(mpi, run, 2, command=SLOW)
    process.send_signal(signal.SIGINT)
    ended = finish(process, 60)
    assert ended.returncode == 75, ended.stderr
    assert_closed(run, 2)


def test_another_signal_ends_a_launcher_that_pays_no_heed(tmp_path: Path) -> None:
    script = "trap : USR1; trap 'exit 3' TERM; echo up; while :; do sleep 0.1; done"
    with subprocess.Popen(
        ["bash", str(ROOT / "jobs" / "interruptible.sh"), "bash", "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "up\n"
            # Two at once are one.
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert process.poll() is None
            deadline = time.monotonic() + 80
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(1.2)
                process.send_signal(signal.SIGINT)
            assert process.returncode == 3
        finally:
            kill(process)
