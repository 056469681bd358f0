"""The watchdog ends a process that is stuck, wherever it is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import ctypes, sys, time
from gala_mpi.mpi import waiting
waiting.LOCKED_FOR_S = 1.0
watchdog = waiting.Watchdog("[0/1]")
with watchdog.limit(1.0, "stuck"):
    {}
print("went on")
"""
# The last one is as HDF5 on a file system that does not answer: no other thread of Python runs meanwhile.
STUCK = {
    "in Python": "time.sleep(60)",
    "in C": "ctypes.CDLL(None).usleep(60_000_000)",
    "in C, with the interpreter's lock": "ctypes.PyDLL(None).usleep(60_000_000)",
}


@pytest.mark.parametrize("where", STUCK)
def test_a_process_that_is_stuck_ends_with_its_stack(where: str) -> None:
    program = PROGRAM.format(STUCK[where])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout == "" and "<module>" in done.stderr, done.stderr
    if where.endswith("lock"):
        assert done.returncode == -signal.SIGABRT
        assert "[0/1] error: stuck; every thread waits for a library that holds the interpreter's lock" in done.stderr
    else:
        assert done.returncode == 1 and "[0/1] error: stuck; every thread was here:" in done.stderr


def test_a_process_that_was_stopped_for_longer_than_a_limit_goes_on() -> None:
    """As a job that a scheduler suspends."""
    program = PROGRAM.format("print('in', flush=True); time.sleep(0.5)")
    process = subprocess.Popen(
        [sys.executable, "-c", program.replace("limit(1.0", "limit(5.0")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(9)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "went on\n" and process.returncode == 0


def test_what_ends_in_time_goes_on() -> None:
    # Also where the interpreter's lock is held, later and without a limit.
    program = PROGRAM.format("pass") + "ctypes.PyDLL(None).usleep(4_000_000); print('and on')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\nand on\n"), done.stderr
