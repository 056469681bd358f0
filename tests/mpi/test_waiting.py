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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
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
    assert process.communicate(timeout=120)[0] == "went on\n" and process.returncode == 0


def test_what_ends_in_time_goes_on() -> None:
    # Also where the interpreter's lock is held, later and without a limit.
    program = PROGRAM.format("pass") + "ctypes.PyDLL(None).usleep(4_000_000); print('and on')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\nand on\n"), done.stderr


NESTED = """
import ctypes, time
from gala_mpi.mpi import waiting
waiting.LOCKED_FOR_S = 1.0
watchdog = waiting.Watchdog("[0/1]")
for _ in range(2):
    with watchdog.limit({}, "outer"):
        with watchdog.limit({}, "inner"):
            {}
        {}
print("went on")
"""
LOCK = "ctypes.PyDLL(None).usleep(60_000_000)"


@pytest.mark.parametrize("stuck", ["time.sleep(60)", LOCK], ids=["waits", "holds the lock"])
@pytest.mark.parametrize(
    ("limits", "where", "said"),
    [((2, 1000), "inside", "outer"), ((1000, 2), "inside", "inner"), ((2, 1000), "after", "outer")],
)
def test_of_limits_within_each_other_the_nearest_ends_the_process(
    limits: tuple[int, int], where: str, said: str, stuck: str
) -> None:
    """Also the outer one's, once the inner one has ended."""
    inside, after = (stuck, "pass") if where == "inside" else ("pass", stuck)
    program = NESTED.format(*limits, inside, after)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == (-signal.SIGABRT if stuck == LOCK else 1), done.stderr
    assert f"[0/1] error: {said}; every thread" in done.stderr and done.stdout == ""


def test_after_limits_within_each_other_none_is_left() -> None:
    program = (
        NESTED.format(1, 2, "pass", "pass") + "time.sleep(3)\nctypes.PyDLL(None).usleep(3_000_000)\nprint('and on')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\nand on\n"), done.stderr
