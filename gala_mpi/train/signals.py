"""Signals: the first asks for the end of the run at the next update, another one ends the process at once.

Its files are whole at any time. Local.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gala_mpi import _native
from gala_mpi.user_code import END_OF_PROCESS

# Launchers may send the same signal twice.
TWICE_WITHIN_S = 1.0
log = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Set from a signal handler, or by an `on_update` callback, to end the run at the next update."""

    reason: str | None = None

    def __call__(self, reason: str) -> None:
        self.reason = self.reason or reason


@contextlib.contextmanager
def heard_by(stop: StopRequest) -> Iterator[None]:
    """SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for the end; another one ends the process, whose files are whole.

    SIGHUP and SIGUSR1 do so unless they are ignored.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Ignored by nohup, so that a run outlives its terminal; and by jobs/outlive.sh: MPICH's launcher tells survivors of
    # another's death by it.
    numbers += [n for n in (signal.SIGHUP, signal.SIGUSR1) if signal.getsignal(n) != signal.SIG_IGN]
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def listen() -> None:
        # Python runs a handler between two steps of its own: not while the main thread waits within a library.
        asked = False
        while found := os.read(heard, 64):
            numbers_found = set(found) & set(numbers)
            if asked and numbers_found:
                END_OF_PROCESS(128 + min(numbers_found))
            if numbers_found:
                asked = True
                # What has come by then belongs to the first, however late this thread is.
                time.sleep(TWICE_WITHIN_S)
                os.set_blocking(heard, False)
                with contextlib.suppress(BlockingIOError):
                    os.read(heard, 4096)
                os.set_blocking(heard, True)
        os.close(heard)

    fd_before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    before = {number: signal.signal(number, lambda n, _: stop(signal.Signals(n).name)) for number in numbers}
    for number in numbers:
        _keep(number)
    _told[:] = [told]
    try:
        yield
    finally:
        _ours.clear()
        _told.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        os.close(told)


def settle() -> None:
    """Hear signals again after MPI has begun, whose libraries put handlers of their own. Main thread only.

    UCX, under both MPICH and Open MPI, takes SIGHUP to print what it is about, and passes it on to nobody. MPICH's own
    handler of SIGUSR1, by which it learns of a rank's death, calls the one that was there before: it stays.
    """
    if signal.SIGUSR1 in _ours:
        _keep(signal.SIGUSR1)
    _take_back()


def hear_again() -> None:
    """Hear signals again where an environment has put handlers of its own, with a warning for the first time.

    Those with a window or an event loop do that. Cheap enough for every update. Main thread only.
    """
    if (taken := _take_back()) and not _warned:
        _warned.append(True)
        log.warning("the environment has taken %s, which end a run in order: taken back", ", ".join(taken))


def _take_back() -> list[str]:
    """Put back what `heard_by` listens with, where other code has replaced it; the names of these signals."""
    taken = [number for number, handler in _ours.items() if _handler(number) != handler]
    for number in taken:
        signal.signal(number, _ours[number][0])
        # With all that C knows of it: another library's handler that calls ours, say.
        _native.restore_handler(number)
    if _told:
        signal.set_wakeup_fd(_told[0], warn_on_full_buffer=False)
    return [signal.Signals(number).name for number in taken]


def _handler(number: int) -> tuple[Any, int]:
    """What a signal does: the function of Python, and the one in C that calls it, which a library may replace."""
    return signal.getsignal(number), _native.handler_of(number)


def _keep(number: int) -> None:
    _ours[number] = _handler(number)
    _native.keep_handler(number)


_ours: dict[int, tuple[Any, int]] = {}
_told: list[int] = []
_warned: list[bool] = []


def _forget() -> None:
    """In a child of fork, such as a simulator in a process of its own: its signals are not the parent's."""
    if _ours:
        signal.set_wakeup_fd(-1)
        for number in _ours:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
