"""The command under mpirun: bad input, exceptions and signals end the job at once, with one message."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, Mpi, finish, rank_process
from rights import without_rights

from gala_mpi import cli
from gala_mpi.storage.checkpoint import CheckpointFolder, read

COMMAND = ("-m", "gala_mpi", "train", "--preset", "cartpole")


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--env", "NoSuchTask-v1"], "--env: 'NoSuchTask-v1'"),
        (["--env", "ALE/NoSuchGame-v5"], "--env: 'ALE/NoSuchGame-v5'"),
        (["--env", "Pendulum-v1"], "--env: 'Pendulum-v1'"),
        (["--preset", "none-such"], "--preset: 'none-such'"),
        (["--topology", "moebius"], "--topology: 'moebius'"),
        (["--simulators", "0"], "--simulators: 0"),
        (["--total-steps", "-5"], "--total-steps: -5"),
        (["--out", "taken"], "--out: 'taken'"),
        (["--out", "file.txt"], "--out: 'file.txt'"),
        (["--out", "file.txt/below"], "--out: 'file.txt/below'"),
        (["--out", "a" * 300], "--out: 'aaa"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    one_mpi: Mpi, size: int, args: list[str], named: str, tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("mine")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "rank-00000.h5").write_bytes(b"an older run")
    before = sorted(tmp_path.rglob("*"))
    done = one_mpi.run(size, *COMMAND, *args, timeout_s=90, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("gala-mpi: error:")]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1 and named in said[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    assert (taken / "rank-00000.h5").read_bytes() == b"an older run"


@pytest.mark.check
@pytest.mark.parametrize("name", ["mpich", "openmpi"])
def test_exit_code_2_on_both_libraries(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    mpi = request.getfixturevalue("mpis")[name]
    done = mpi.run(3, *COMMAND, "--topology", "hypercube", timeout_s=90, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("a number of ranks that is a power of two, not 3") == 1


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    """Run without the rights that let root write anywhere."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = subprocess.run(
        [*without_rights(), sys.executable, *COMMAND, "--out", str(closed / "run")],
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "--out" in done.stderr and "Permission denied" in done.stderr
    assert list(closed.iterdir()) == []


def test_paths_below_a_folder_that_may_not_be_entered_are_refused(tmp_path: Path) -> None:
    drop = without_rights()
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "x").mkdir()
    locked.chmod(0)
    commands = [(*COMMAND, option, f"{locked}/x") for option in ("--out", "--resume", "--topology")]
    commands += [("-m", "gala_mpi", "train", "--preset", f"{locked}/x.toml")]
    commands += [("-m", "gala_mpi", "bench", "--json", f"{locked}/x.json")]
    commands += [("-m", "gala_mpi", "topology", f"{locked}/x", "--size", "4")]
    commands += [("-m", "gala_mpi", "topology", "ring", "--size", "4", "--draw", f"{locked}/x.png")]
    started = [
        subprocess.Popen([*drop, sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process, command in zip(started, commands, strict=True):
        said = finish(process, 90).stderr
        assert process.returncode == 2, (command, said)
        assert said.count("gala-mpi: error:") == 1 and "Permission denied" in said and "Traceback" not in said
    locked.chmod(0o700)
    assert list((locked / "x").iterdir()) == []


def test_help_is_printed_once_and_starts_no_mpi(one_mpi: Mpi) -> None:
    done = one_mpi.run(4, "-m", "gala_mpi", "train", "--help", timeout_s=90)
    assert done.returncode == 0
    assert done.stdout.count("--neighbour-timeout-s") == 1
    code = "import sys; from gala_mpi import cli; cli.train_help([]); assert 'mpi4py.MPI' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_help_begins_with_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gala-mpi", "--help"])
        cli.main()
    said = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command} " in said and f"gala-mpi {command}" in said
    assert len(said.splitlines()) < 25


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_is_whole_lines_with_every_default(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line ends early, as those of a setting's docstring do in the code."""
    monkeypatch.setenv("COLUMNS", "90")
    lines = cli.HELP[command]([]).splitlines()
    indent = " " * 28
    for line, following in itertools.pairwise(lines):
        assert len(line) <= 90 or not line.startswith(" ")
        if line.startswith(indent) and following.startswith(indent):
            assert len(line) + 1 + len(following.split()[0]) > 90 or "(default:" in following


@pytest.mark.parametrize("preset", [("--preset", "cartpole"), ("--preset=cartpole",)])
def test_help_has_the_defaults_of_the_preset(preset: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gala-mpi", *preset, "--help"])
        cli.main()
    assert "CartPole-v1" in capsys.readouterr().out


def test_help_of_an_unknown_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gala-mpi", "train", "--preset", "nope", "--help"])
        cli.main()
    said = capsys.readouterr().err
    assert said.startswith("gala-mpi: error: --preset: 'nope'") and len(said.splitlines()) == 1


@pytest.mark.check
def test_version(one_mpi: Mpi) -> None:
    done = one_mpi.run(2, "-m", "gala_mpi", "--version", timeout_s=90)
    assert done.returncode == 0 and re.fullmatch(r"gala-mpi \d+\.\d+\.\d+\n", done.stdout)


RAISES = """
import sys
from gala_mpi import cli
from gala_mpi.learning import rollout
from mpi4py import MPI
collect, calls = rollout.Collector.collect, []
def failing(self):
    calls.append(1)
    if MPI.COMM_WORLD.rank == 1 and len(calls) == 20:
        raise RuntimeError("the simulator broke")
    return collect(self)
rollout.Collector.collect = failing
sys.exit(cli.train(sys.argv[1:]))
"""


def test_an_exception_on_one_rank_alone_ends_the_job_with_its_traceback(mpi: Mpi, tmp_path: Path) -> None:
    """With exchanges: test_faults.py."""
    args = ("--preset", "cartpole", "--total-steps", "100_000_000", "--exchange", "none", "--out", "run")
    done = mpi.run(3, "-c", RAISES, *args, timeout_s=90, cwd=tmp_path)
    assert done.returncode == 1
    assert "[1/3] RuntimeError: the simulator broke" in done.stderr
    assert "[1/3] Traceback (most recent call last):" in done.stderr


def has_rows(path: Path, count: int) -> bool:
    """Whether the file of a rank that may still run has so many rows of updates."""
    try:
        with h5py.File(path, "r", swmr=True, locking=False) as file:
            return len(file["updates"]) >= count
    except (OSError, KeyError, RuntimeError):
        return False


def start_long_run(
    mpi: Mpi, folder: Path, size: int, *args: str, command: Collection[str] = COMMAND
) -> subprocess.Popen[str]:
    """A run that would take hours, already past its first rows."""
    process = mpi.start(
        size, *command, "--total-steps", "1_000_000_000", "--flush-every-s", "0.5", "--out", str(folder), *args
    )
    deadline = time.monotonic() + 360
    while time.monotonic() < deadline and process.poll() is None:
        if all(has_rows(folder / f"rank-{rank:05d}.h5", 1) for rank in range(size)):
            return process
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"the run did not start: {process.communicate(timeout=120)}")


@pytest.mark.parametrize(
    ("exchange", "number"),
    [
        ("gossip", signal.SIGINT),
        ("gossip", signal.SIGTERM),
        ("gossip", signal.SIGUSR1),
        ("gossip", signal.SIGHUP),
        ("allreduce", signal.SIGTERM),
    ],
)
def test_a_signal_to_one_rank_ends_all_with_closed_files(
    mpi: Mpi, exchange: str, number: signal.Signals, tmp_path: Path
) -> None:
    process = start_long_run(mpi, tmp_path / "run", 3, "--exchange", exchange)
    told = {signal.SIGINT: 0, signal.SIGTERM: 1, signal.SIGUSR1: 2, signal.SIGHUP: 1}[number]
    os.kill(rank_process(process.pid, told), number)
    done = finish(process, 60)
    assert done.returncode == 75, done.stderr
    assert "stopped" in done.stdout
    assert_closed(tmp_path / "run", 3)


def test_an_all_reduce_does_not_wait_for_ever(mpi: Mpi, tmp_path: Path) -> None:
    process = start_long_run(mpi, tmp_path / "run", 3, "--exchange", "allreduce", "--neighbour-timeout-s", "3")
    stopped = rank_process(process.pid, 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        done = finish(process, 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGKILL)
    assert done.returncode != 0
    assert "some rank did not come within 3 s" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_ends_all_with_closed_files(mpi: Mpi, number: signal.Signals, tmp_path: Path) -> None:
    if mpi.name == "openmpi" and number != signal.SIGUSR1:
        # Its mpirun kills the ranks a quarter of a second after the signal; this stands between.
        mpi = replace(mpi, prefix=("bash", str(ROOT / "jobs" / "interruptible.sh")))
    process = start_long_run(mpi, tmp_path / "run", 2)
    os.kill(process.pid, number)
    done = finish(process, 60)
    assert done.returncode == 75, done.stderr
    assert_closed(tmp_path / "run", 2)


SLOW_UPDATES = """
import sys, time
from gala_mpi import cli
from gala_mpi.train import agent
update = agent.Agent._one_update
def slow(self):
    update(self)
    time.sleep(0.3)
agent.Agent._one_update = slow
sys.exit(cli.train(sys.argv[1:]))
"""
SLOW = ("-c", SLOW_UPDATES, "--preset", "cartpole", "--record-every", "1")


def test_a_signal_to_a_rank_is_known_to_all_within_some_updates(one_mpi: Mpi, tmp_path: Path) -> None:
    """News doubles its readers with each update: log2(8) of them, the one that is under way, and one for the end."""
    run = tmp_path / "run"
    process = start_long_run(one_mpi, run, 8, command=SLOW)
    told_at_s = time.time()
    os.kill(rank_process(process.pid, 2), signal.SIGTERM)
    done = finish(process, 60)
    assert done.returncode == 75, done.stderr
    ended_at_s = {}
    for rank in range(8):
        with h5py.File(run / f"rank-{rank:05d}.h5") as file:
            ended_at_s[rank] = np.concatenate([[0.0], file["updates"]["time_s"]]) + file.attrs["t0"]
    slowest_s = max(np.diff(times).max() for times in ended_at_s.values())
    assert max(times[-1] for times in ended_at_s.values()) - told_at_s <= 5 * slowest_s


def test_a_signal_before_mpi_has_begun_ends_all_before_their_first_update(mpi: Mpi, tmp_path: Path) -> None:
    """An exception in one rank would leave the others in MPI's start."""
    run = tmp_path / "run"
    process = mpi.start(3, *COMMAND, "--total-steps", "1_000_000_000", "--out", str(run))
    deadline = time.monotonic() + 240
    rank = None
    while rank is None or not listens(rank, signal.SIGUSR1):
        assert time.monotonic() < deadline and process.poll() is None
        with contextlib.suppress(pytest.fail.Exception):
            rank = rank_process(process.pid, 1)
    os.kill(rank, signal.SIGINT)
    done = finish(process, 60)
    assert done.returncode == 75, done.stderr
    assert "stopped" in done.stdout and "KeyboardInterrupt" not in done.stderr
    for number in range(3):
        assert read(CheckpointFolder(run, number).newest_first()[0], 10**8).facts.update < 10


def listens(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return bool(int(status.partition("SigCgt:\t")[2].split()[0], 16) >> (number - 1) & 1)
    return False


STUCK = """
import ctypes, sys, time
from gala_mpi import cli
from gala_mpi.learning import rollout
where = sys.argv.pop(1)
collect, calls = rollout.Collector.collect, []
def slow(self):
    calls.append(1)
    if len(calls) == 30:
        print("stuck", flush=True)
        if where == "in Python":
            time.sleep(600)
        # As an MPI call that waits for a dead rank: it is not left for a signal.
        mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    return collect(self)
rollout.Collector.collect = slow
sys.exit(cli.train(sys.argv[1:]))
"""
FLUSHED = ("--preset", "cartpole", "--flush-every-s", "0.001", "--record-every", "1")


@pytest.mark.parametrize("where", ["in Python", "in C"])
def test_a_second_signal_ends_a_run_at_once_with_files_that_can_be_read(where: str, tmp_path: Path) -> None:
    args = (*FLUSHED, "--out", str(tmp_path / "run"))
    with subprocess.Popen(
        [sys.executable, "-c", STUCK, where, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "stuck\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        # At once it may be the same one, passed on twice.
        for pause_s in (0.3, 1.2):
            time.sleep(pause_s)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=40)
    assert process.returncode == 128 + signal.SIGINT
    assert_readable(tmp_path / "run", 1)


FORKS = """
import os, signal, time
from gala_mpi.train.signals import StopRequest, heard_by
stop = StopRequest()
with heard_by(stop):
    for _ in range(2):
        child = os.fork()
        if child == 0:
            time.sleep(60)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        time.sleep(1.5)
print(stop.reason)
"""


def test_signals_to_a_child_of_fork_are_its_own() -> None:
    """A simulator may have processes of its own, and end them so."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGTERM}\n{-signal.SIGTERM}\nNone\n"), done.stderr


def test_a_second_signal_to_one_rank_ends_the_job(mpi: Mpi, tmp_path: Path) -> None:
    process = mpi.start(2, "-c", STUCK, "in C", *FLUSHED, "--exchange", "none", "--out", str(tmp_path / "run"))
    assert process.stdout is not None
    stuck = 0
    while stuck < 2:
        line = process.stdout.readline()
        assert line, "ended before it was stuck"
        stuck += line == "stuck\n"
    rank = rank_process(process.pid, 1)
    os.kill(rank, signal.SIGTERM)
    time.sleep(1.5)
    os.kill(rank, signal.SIGTERM)
    assert finish(process, 30).returncode not in (0, 75)
    assert_readable(tmp_path / "run", 2)


def assert_readable(folder: Path, size: int) -> None:
    """The files of a run that was ended in its 30th update, which had written a checkpoint at its begin only."""
    for rank in range(size):
        with h5py.File(folder / f"rank-{rank:05d}.h5", "r", swmr=True, locking=False) as file:
            assert file["updates"]["update"].tolist() == list(range(1, 30))
        assert read(CheckpointFolder(folder, rank).newest_first()[0], 10**8).facts.update == 0


def assert_closed(folder: Path, size: int, failed: Collection[int] = ()) -> None:
    """A file that its writer did not close refuses to be opened for appending. The checkpoint is of its last moment."""
    for rank in range(size):
        with h5py.File(folder / f"rank-{rank:05d}.h5", "r+") as file:
            last = file["updates"]["update"][-1]
        newest = read(CheckpointFolder(folder, rank).newest_first()[0], 10**8).facts
        # Rows are of every tenth update. A rank that failed has no checkpoint of its end.
        assert rank in failed or (newest.update > 0 and 0 <= newest.update - last < 10)
