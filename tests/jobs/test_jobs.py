"""The job scripts with stand-ins for what a scheduler offers; tests/jobs/test_slurm.py has a real one."""

from __future__ import annotations

import os
import shutil
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
from slurm import wait_for
from test_cli import SLOW, assert_closed, start_long_run

ENVIRONMENT = Path(sys.executable).parent.parent
SLURM = MappingProxyType(
    {"SLURM_JOB_NAME": "test", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1"}
)
CARTPOLE = ("--preset", "cartpole")
# In a stand-in for srun: steps that only take a number, and the question for what it offers.
OTHER_STEPS = '[[ "$*" == *" true" ]] && echo another step && exit\n[ "$1" = --mpi=list ] && echo pmi2 && exit'


def command(folder: Path, name: str, script: str) -> Path:
    """Put a stand-in for a command into a folder of the path."""
    path = folder / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def start(
    folder: Path,
    *args: str,
    script: str = "train.sbatch",
    launcher: str = "mpirun",
    environment: Path = ENVIRONMENT,
    given: Mapping[str, str] = SLURM,
) -> subprocess.Popen[str]:
    """Run a job script as its scheduler would, with a queue that only writes down what it is asked."""
    state = "JobState=RUNNING Reason=None Restarts=${SLURM_RESTART_COUNT:-0} PreemptTime=None TimeLimit=08:00:00"
    command(folder, "scontrol", f'[ "$1" = show ] && echo "{state}" || echo "$@" >> {folder}/queue')
    clean = {k: v for k, v in os.environ.items() if not k.startswith((*LAUNCHER_VARIABLES, "GALA_MPI_"))}
    ours = {"GALA_MPI_ENV": str(environment), "GALA_MPI_LAUNCHER": launcher, "GALA_MPI_OUT": str(folder / "run")}
    where = {"SLURM_SUBMIT_DIR": str(ROOT), "PBS_O_WORKDIR": str(ROOT), "LS_SUBCWD": str(ROOT)}
    return subprocess.Popen(
        ["bash", str(ROOT / "jobs" / script), *args],
        env={**clean, **ours, **where, **given, "PATH": f"{folder}/bin:{clean['PATH']}"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def begun(folder: Path) -> None:
    """Wait until the second rank of the job's run has its first checkpoint."""
    wait_for(lambda: list(folder.glob("run/checkpoints/rank-00001/segment-0-*")), "the first checkpoint")


def stand_ins(folder: Path, library: str = "MPICH Version: 5.0.2") -> Path:
    """An environment whose launchers say what they are told, and whose runs never begin."""
    environment = folder / "env"
    for name in ("srun", "mpirun", "mpiexec.hydra"):
        command(
            environment,
            name,
            f'[ "$1" = --mpi=list ] && echo "pmi2 pmix" || echo {name} "$@" with $OMP_NUM_THREADS threads',
        )
    command(environment, "python", f"echo '{library}'")
    command(environment, "gala-mpi", "exit 2")
    (environment / "bin" / "activate").write_text(f'PATH="{environment}/bin:$PATH"\n')
    return environment


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "mpirun").exists(), reason="the environment brings no mpirun")
def test_a_job_that_is_told_of_its_limit_queues_itself_and_goes_on(tmp_path: Path) -> None:
    first = start(tmp_path, *CARTPOLE, "--total-steps", "100_000_000")
    begun(tmp_path)
    first.send_signal(signal.SIGUSR1)
    ended = finish(first, 60)
    assert ended.returncode == 75, ended.stderr
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
    # What Slurm starts again is the same script with the same arguments.
    again = finish(start(tmp_path, *CARTPOLE, "--total-steps", "1000"), 60)
    assert again.returncode == 0, again.stderr
    assert "changed: --total-steps" in again.stdout and (tmp_path / "run" / "segment-1" / "rank-00000.h5").exists()
    assert (tmp_path / "queue").read_text() == "requeue 7\n"


@pytest.mark.skipif(not (ENVIRONMENT / "bin" / "mpirun").exists(), reason="the environment brings no mpirun")
def test_a_job_that_fails_is_not_queued_again(tmp_path: Path) -> None:
    ended = finish(start(tmp_path, *CARTPOLE, "--simulators", "0"), 60)
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
    ("library", "launcher", "given", "launched"),
    [
        (
            "MPICH",
            "auto",
            {"SLURM_CPUS_PER_TASK": "4"},
            "srun --mpi=pmi2 --kill-on-bad-exit=0 --cpus-per-task=4 gala-mpi train",
        ),
        # With pmix Slurm ends a step that has lost a rank.
        ("Open MPI v5.0.11", "auto", {}, "mpirun --enable-recovery -n 2 gala-mpi train"),
        (
            "Open MPI v5.0.11",
            "auto",
            {"GALA_MPI_PMI": "pmix_v4"},
            "srun --mpi=pmix_v4 --kill-on-bad-exit=0 --cpus-per-task=1 gala-mpi train",
        ),
        ("CRAY MPICH", "auto", {}, "aprun"),
        ("Open MPI v5.0.11", "mpirun", {}, "mpirun --enable-recovery -n 2 gala-mpi train"),
        ("Intel(R) MPI Library 2021.18", "mpirun", {}, "mpiexec.hydra -n 2 gala-mpi train"),
        ("MPICH", "mpirun", {}, f"mpirun -disable-auto-cleanup -n 2 sh {ROOT}/jobs/outlive.sh gala-mpi train"),
        (
            "Open MPI v5.0.11",
            "mpirun",
            {"SLURM_NTASKS": "", "SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "8"},
            "mpirun --enable-recovery -n 24 gala-mpi train",
        ),
        ("MPICH", "mpirun", {"SLURM_NTASKS": ""}, ""),
    ],
)
def test_the_launcher_is_that_of_the_library_and_ranks_get_the_cores_that_the_job_has(
    library: str, launcher: str, given: dict[str, str], launched: str, tmp_path: Path
) -> None:
    """srun takes over no --cpus-per-task since Slurm 22.05, and Slurm may set no number of tasks."""
    environment = stand_ins(tmp_path, library)
    command(environment, "aprun", 'echo aprun "$@" with $OMP_NUM_THREADS threads')
    ended = finish(start(tmp_path, environment=environment, launcher=launcher, given={**SLURM, **given}), 60)
    if launched:
        # No run has come of it, whatever the launcher said.
        assert ended.returncode == 1 and f"\n{launched}" in ended.stdout, ended
        assert f"with {given.get('SLURM_CPUS_PER_TASK', '1')} threads" in ended.stdout
    else:
        assert ended.returncode == 2 and ended.stderr.startswith("SLURM_NTASKS: is not set") and ended.stdout == ""


def test_a_job_that_is_told_before_its_ranks_are_up_goes_on_later(tmp_path: Path) -> None:
    """srun gives the greatest code of all ranks, that of one that a signal ended."""
    environment = stand_ins(tmp_path)
    command(environment, "srun", f"{OTHER_STEPS}\ntrap 'exit 138' USR1\ntouch started\nwhile :; do sleep 0.1; done")
    job = start(tmp_path, launcher="srun", environment=environment)
    wait_for((tmp_path / "started").exists, "the launcher")
    job.send_signal(signal.SIGUSR1)
    assert finish(job, 60).returncode == 75
    assert (tmp_path / "queue").read_text() == "requeue 7\n"


def test_a_run_that_comes_no_further_is_not_begun_for_ever(tmp_path: Path) -> None:
    """Each start is told at once, and the run stays where it was."""
    environment = stand_ins(tmp_path)
    (tmp_path / "run").mkdir()
    starts = tmp_path / "starts"
    command(environment, "srun", f"{OTHER_STEPS}\necho >> {starts}\nkill -USR1 $PPID\nsleep 1")
    command(environment, "gala-mpi", f'echo 75 "$(wc -l < {starts})" 4000 stopped')
    starts.touch()
    said = []
    for restart in range(3):
        # As many steps as there were starts before: none has the number of another.
        given = {**SLURM, "SLURM_RESTART_COUNT": str(restart)}
        said.append(finish(start(tmp_path, launcher="srun", environment=environment, given=given), 60).stdout)
        assert said[-1].count("another step\n") == restart
    assert (tmp_path / "queue").read_text() == "requeue 7\n" * 2
    assert "the last 3 starts came no further than 4000 steps" in said[2] and "no further" not in said[1]
    assert not (tmp_path / "runs").exists()


def test_under_pbs_a_job_tells_itself_of_its_limit_and_submits_itself_again(tmp_path: Path) -> None:
    """A stand-in for PBS: its limit is near as soon as the job begins."""
    environment = stand_ins(tmp_path)
    nodes = tmp_path / "nodes"
    nodes.write_text("n1\nn1\nn2\nn2\n")
    command(tmp_path, "qstat", "echo '    Resource_List.walltime = 00:10:01'")
    command(tmp_path, "qsub", f'echo "$@" with $GALA_MPI_OUT $GALA_MPI_ARGS >> {tmp_path}/queue')
    command(tmp_path, "sleep", '[ "$1" = 301 ] && exec /bin/sleep 0.5 || exec /bin/sleep "$1"')
    command(environment, "mpirun", "trap 'exit 138' USR1\necho mpirun \"$@\"\nwhile :; do /bin/sleep 0.1; done")
    given = {"PBS_JOBID": "9.server", "PBS_JOBNAME": "night", "PBS_NODEFILE": str(nodes), "GALA_MPI_ARGS": "--seed 2"}
    ended = finish(start(tmp_path, script="train.pbs", launcher="auto", environment=environment, given=given), 60)
    assert ended.returncode == 75, ended
    assert "job: 4 ranks of 1 core(s) on n1,n2\n" in ended.stdout
    assert (
        f"mpirun -disable-auto-cleanup -n 4 sh {ROOT}/jobs/outlive.sh gala-mpi train --out {tmp_path}/run --seed 2"
        in ended.stdout
    )
    assert (tmp_path / "queue").read_text() == (
        f"-V -W depend=afterany:9.server {ROOT}/jobs/train.pbs with {tmp_path}/run --seed 2\n"
    )


def test_under_lsf_a_job_that_was_told_ends_with_the_code_that_queues_it_again(tmp_path: Path) -> None:
    """A stand-in for LSF."""
    environment = stand_ins(tmp_path)
    command(environment, "mpirun", "trap 'exit 138' USR1\ntouch started\nwhile :; do sleep 0.1; done")
    given = {"LSB_JOBID": "9", "LSB_JOBNAME": "night", "LSB_DJOB_NUMPROC": "4", "LSB_MCPU_HOSTS": "n1 2 n2 2"}
    job = start(tmp_path, script="train.lsf", launcher="auto", environment=environment, given=given)
    wait_for((tmp_path / "started").exists, "the launcher")
    job.send_signal(signal.SIGUSR1)
    ended = finish(job, 60)
    assert ended.returncode == 85 and "LSF queues it again for exit code 85" in ended.stdout, ended


@pytest.mark.parametrize("there", [True, False])
def test_mps_is_started_on_each_node_and_ended_with_the_job(there: bool, tmp_path: Path) -> None:
    """Stand-ins for srun's steps and NVIDIA's daemon."""
    environment = stand_ins(tmp_path)
    if there:
        daemon = ("mkdir -p $CUDA_MPS_PIPE_DIRECTORY", "touch $CUDA_MPS_PIPE_DIRECTORY/control", "echo $$ > daemon")
        command(tmp_path, "nvidia-cuda-mps-control", "\n".join([*daemon, "exec /bin/sleep 600"]))
    command(
        environment,
        "srun",
        'while [[ "$1" == --* ]]; do shift; done\n[ "$1" = bash ] && exec "$@"\n'
        'echo "$@" with MPS "$CUDA_MPS_PIPE_DIRECTORY"',
    )
    given = {**SLURM, "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": f"7{os.getpid()}"}
    folder = Path(f"/tmp/mps-{given['SLURM_JOB_ID']}")  # of the job script
    try:
        job = start(tmp_path, script="train-gpu.sbatch", launcher="srun", environment=environment, given=given)
        ended = finish(job, 60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert f"gala-mpi train --out {tmp_path}/run --device cuda" in ended.stdout, ended
    if there:
        assert "job: MPS runs on n1\n" in ended.stdout and f"with MPS {folder}" in ended.stdout
        pid = int((tmp_path / "daemon").read_text())
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the end of MPS")
    else:
        assert "nvidia-cuda-mps-control: not found" in ended.stdout and f"with MPS {folder}" not in ended.stdout


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
