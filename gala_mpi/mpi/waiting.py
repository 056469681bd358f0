"""Waiting for other ranks: with a deadline, or for what is sure to come since whoever is silent becomes lost."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gala_mpi import _native, output
from gala_mpi.user_code import END_OF_PROCESS

YIELD_FOR_S = 0.002
LONGEST_SLEEP_S = 0.001
WATCH_EVERY_S = 0.5
SPEAK_WITHIN_S = 10
STDERR = 2
# Beyond a limit, for a process that is busy rather than locked.
LOCKED_FOR_S = 5.0
LONGEST_S = 1e7
LOCKED = "every thread waits for a library that holds the interpreter's lock"


def wait_until(done: Callable[[], bool], timeout_s: float) -> bool:
    """Call `done` until it returns True; False if it has not within `timeout_s` seconds.

    The first 2 ms only yield the core, since what is waited for is mostly near; then sleeps grow to 1 ms, so
    that ranks that share a core with the one waited for do not hold it up.
    """
    begin = time.monotonic()
    sleep_s = 20e-6
    while not done():
        waited_s = time.monotonic() - begin
        if waited_s > timeout_s:
            return False
        if waited_s < YIELD_FOR_S:
            os.sched_yield()
        else:
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, LONGEST_SLEEP_S)
    return True


@dataclass(frozen=True)
class _Limit:
    """`deadline_s` is an instant of `_native.running_s`."""

    deadline_s: float
    complaint: str


NO_LIMIT = _Limit(float("inf"), "")


class Watchdog:
    """A deadline for calls that block inside MPI, where nothing else can be done any more: the process ends.

    Its exit without MPI_Finalize makes the launcher end the whole job. For collective calls, which are faster
    when they block than when they are polled. Time for which the process was stopped does not count.

    Code that holds the interpreter's lock for ever (HDF5 on a file system that does not answer, a simulator in C) stops
    the thread that watches, too: some seconds later one without Python ends the process. That one is alone in its
    process, so a process has one watchdog.

    Limits nest: of those that hold the nearest counts. All are set by one thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Written whole by the thread that sets limits, and read by the one that watches.
        self._limit = NO_LIMIT
        # It prints the stack of a process that ends by SIGABRT.
        faulthandler.enable(STDERR)
        # By this one exits from within C do so, see `user_code`.
        faulthandler.register(signal.SIGRTMAX, STDERR, all_threads=False)
        _native.running_s()
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def limit(self, timeout_s: float, complaint: str) -> Iterator[None]:
        """End the process with `complaint` if the block takes over `timeout_s` seconds.

        Within another limit that ends sooner, that one and its complaint hold.
        """
        outer = self._limit
        self._arm(min(outer, _Limit(_native.running_s() + timeout_s, complaint), key=lambda limit: limit.deadline_s))
        try:
            yield
        finally:
            self._arm(outer)

    def _arm(self, limit: _Limit) -> None:
        """Let this limit hold, in place of the one before."""
        self._limit = limit
        if limit is NO_LIMIT:
            _native.watch(0, "")
            return
        left_s = max(limit.deadline_s - _native.running_s(), 0.0) + LOCKED_FOR_S
        _native.watch(min(left_s, LONGEST_S), f"{self._name} error: {limit.complaint}; {LOCKED}\n")

    def _watch(self) -> None:
        while _native.running_s() < (limit := self._limit).deadline_s:
            time.sleep(WATCH_EVERY_S)
        # Nobody may read the words.
        _native.end_within(SPEAK_WITHIN_S)
        try:
            output.complain(f"{self._name} error: {limit.complaint}; every thread was here:")
            faulthandler.dump_traceback(STDERR, all_threads=True)
        finally:
            END_OF_PROCESS(1)
