"""Output that cannot be written, or that nobody reads, holds no run up and ends none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, Mpi, finish
from test_cli import assert_closed, has_rows

TRAIN = [sys.executable, "-m", "gala_mpi", "train", "--preset", "cartpole"]
SPEAKS = """
import sys
from gala_mpi import output
output.PATIENCE_S = 0.5
output.guard()
for number in range(int(sys.argv[1])):
    print(f"line {number}: {sys.argv[2]}", flush=True)
print("done", file=sys.stderr)
"""


def speaking(lines: int, text: str = "x" * 80) -> list[str]:
    """A program that says so many lines on standard output, and then that it is done on standard error."""
    return [sys.executable, "-c", SPEAKS, str(lines), text]


def test_a_reader_that_has_left_ends_nothing() -> None:
    with subprocess.Popen(speaking(100_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("line 0")
        process.stdout.close()
        # No word of it: who has left knows.
        assert process.stderr.read() == "done\n" and process.wait(60) == 0


def test_a_reader_that_does_not_read_is_not_waited_for() -> None:
    with subprocess.Popen(speaking(20_000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stderr.read() == "done\n" and process.wait(60) == 0
        # What had room is there, whole lines of it, and in order.
        said = process.stdout.read().splitlines()
    assert len(said) > 100 and [line.split(":")[0] for line in said[:-1]] == [f"line {n}" for n in range(len(said) - 1)]


@pytest.mark.parametrize("width", [80, 3000])
def test_a_terminal_that_nobody_drains_is_not_waited_for(width: int) -> None:
    """It says that it has room, and takes no more than it has."""
    master, slave = pty.openpty()
    with subprocess.Popen(speaking(3000, "x" * width), stdout=slave, stderr=subprocess.PIPE, text=True) as process:
        os.close(slave)
        assert process.stderr is not None
        assert process.stderr.read() == "done\n" and process.wait(60) == 0
    os.close(master)


def test_output_that_is_not_to_be_buffered_is_not() -> None:
    """As containers set it: the last words before a crash."""
    code = (
        "import os, sys; from gala_mpi import output; output.guard(); print('o', end='')\n"
        "print('e', end='', file=sys.stderr); os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False, timeout=240)
    assert (done.stdout, done.stderr) == (b"o", b"e")


def test_a_watchdog_whose_words_nobody_reads_ends_the_process() -> None:
    code = (
        "import fcntl, os, time; from gala_mpi.mpi import waiting; waiting.SPEAK_WITHIN_S = 2\n"
        "dog = waiting.Watchdog('x')\n"
        "os.set_blocking(2, False)\n"
        "try:\n    while True: os.write(2, b'x' * 4096)\nexcept BlockingIOError: os.set_blocking(2, True)\n"
        "with dog.limit(0.5, 'too long'): time.sleep(600)\n"
    )
    reads, writes = os.pipe()
    with subprocess.Popen([sys.executable, "-c", code], stderr=writes) as process:
        assert process.wait(60) not in (0, None)
    os.close(reads)
    os.close(writes)


def test_a_pipe_that_does_not_block_loses_nothing_while_it_is_read() -> None:
    """As a terminal that another program has left so."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with subprocess.Popen(speaking(5_000), stdout=writes, stderr=subprocess.PIPE, text=True) as process:
        os.close(writes)
        with os.fdopen(reads) as stream:
            said = stream.read().splitlines()
        assert process.wait(60) == 0
    assert [line.split(":")[0] for line in said] == [f"line {n}" for n in range(5_000)]


def test_a_full_disk_is_told_once() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(speaking(1000), stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=240)
    said = done.stderr.splitlines()
    assert done.returncode == 0 and len(said) == 2 and said[1] == "done"
    assert "standard output cannot be written (No space left on device)" in said[0]


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0>&- 1>&- 2>&-"])
def test_a_descriptor_that_is_closed_is_no_other_files(closed: str, tmp_path: Path) -> None:
    """Else the first file to be opened would get its number, and all that is said."""
    code = SPEAKS + f"file = open({str(tmp_path / 'mine')!r}, 'w')\nfor _ in range(9): print('astray', flush=True)\n"
    code += "import os; os.write(1, b'x'); os.write(2, b'x'); file.write(f'mine {file.fileno()}'); file.close()\n"
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", code, "3", "text"],
        capture_output=True,
        check=False,
        timeout=240,
    )
    said = (tmp_path / "mine").read_text()
    assert done.returncode == 0 and said.startswith("mine ") and int(said.split()[1]) > 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_encoding_lacks_are_escaped(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    # The last one is what a name that is no UTF-8 is read as.
    done = subprocess.run(speaking(1, "größe-☃-\udcff"), env=environment, capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode(encoding)
    assert (
        said.endswith("\\udcff\n")
        and said.isascii() == (encoding == "ascii")
        and ("☃" in said) == (encoding == "utf-8")
    )


def test_streams_of_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    from gala_mpi import output

    before = sys.stdout
    output.guard()
    assert sys.stdout is before
    print("heard")
    assert capsys.readouterr().out == "heard\n"


@pytest.mark.parametrize("output", ["1>/dev/full", "1>&- 2>&-"])
def test_a_run_whose_output_cannot_be_written_is_a_run(output: str, tmp_path: Path) -> None:
    run = tmp_path / "größe"
    args = [*TRAIN, "--total-steps", "10_000", "--progress-every-s", "0.01", "--out", str(run)]
    command = ["bash", "-c", f'exec "$0" "$@" {output}', *args]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False, timeout=360
    )
    assert done.returncode == 0, done.stderr
    assert b"Error" not in done.stderr
    assert_closed(run, 1)


@pytest.mark.parametrize(("ignored", "code"), [(False, 75), (True, 0)])
def test_a_terminal_that_is_closed_ends_a_run_in_order_or_not_at_all(ignored: bool, code: int, tmp_path: Path) -> None:
    """SIGHUP comes to its foreground process group; nohup has it ignored from the start."""
    run = tmp_path / "run"
    # A terminal of no size is none that somebody sees.
    limit_s = "10" if ignored else "600"
    args = [*TRAIN, "--total-steps", "1_000_000_000", "--time-limit-s", limit_s, "--flush-every-s", "0.5"]
    args += ["--progress-every-s", "1", "--out", str(run)]
    child, master = pty.fork()
    if child == 0:
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execv(args[0], args)
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    deadline, said = time.monotonic() + 240, b""
    while not (b"steps/s" in said and has_rows(run / "rank-00000.h5", 1)) and time.monotonic() < deadline:
        if select.select([master], [], [], 0.2)[0]:
            with contextlib.suppress(OSError):
                said += os.read(master, 4096)
    os.close(master)
    assert b"steps/s" in said
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == code
    assert_closed(run, 1)


def test_a_launcher_whose_output_cannot_be_written_is_kept_by_the_script(mpi: Mpi, tmp_path: Path) -> None:
    """MPICH's own ends the job then, Open MPI's when the reader has left: every rank without a checkpoint."""
    run = tmp_path / "run"
    mpi = replace(mpi, prefix=("bash", str(ROOT / "jobs" / "interruptible.sh")))
    process = mpi.start(2, *TRAIN[1:], "--total-steps", "20_000", "--progress-every-s", "0.01", "--out", str(run))
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    done = finish(process, 90)
    assert done.returncode == 0, done.stderr
    assert_closed(run, 2)


def test_the_script_leaves_nothing_behind_without_any_output(tmp_path: Path) -> None:
    """What passes output on would else hold its own input open, for ever."""
    script = tmp_path / "interruptible.sh"
    script.write_bytes((ROOT / "jobs" / "interruptible.sh").read_bytes())
    command = ["bash", "-c", f'exec bash {script} bash -c "echo x; exit 7" >&- 2>&-']
    assert subprocess.run(command, check=False, timeout=240).returncode == 7
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            assert str(script).encode() not in path.read_bytes()


def test_the_script_passes_on_what_the_launcher_says() -> None:
    program = ["bash", "-c", "for n in {1..500}; do echo out $n; echo err $n >&2; done; printf last; exit 7"]
    done = subprocess.run(
        ["bash", str(ROOT / "jobs" / "interruptible.sh"), *program],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 7
    assert done.stdout.split("\n") == [*(f"out {n}" for n in range(1, 501)), "last"]
    assert done.stderr.splitlines() == [f"err {n}" for n in range(1, 501)]
