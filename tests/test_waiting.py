"""The watchdog ends a process that is stuck, wherever it is."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

PROGRAM = """
import ctypes, sys, time
from gala_mpi import waiting
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
    "in C, with the interpreter's lock": "time.sleep(0.7); ctypes.PyDLL(None).usleep(60_000_000)",
}


@pytest.mark.parametrize("where", STUCK)
def test_a_process_that_is_stuck_ends_with_its_stack(where: str) -> None:
    begin = time.monotonic()
    program = PROGRAM.format(STUCK[where])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1 and done.stdout == "" and "<module>" in done.stderr, done.stderr
    assert where.endswith("lock") or "[0/1] error: stuck; every thread was here:" in done.stderr
    assert time.monotonic() - begin < 40


def test_what_ends_in_time_goes_on() -> None:
    program = PROGRAM.format("pass") + "time.sleep(4); print('and on')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\nand on\n"), done.stderr
