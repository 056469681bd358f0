"""Signals: the first asks for the end of the run at the next update, another one ends the process at once.

Its files are whole at any time. Local.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

# Launchers may send the same signal twice.
TWICE_WITHIN_S = 1.0


@dataclass
class StopRequest:
    """Set from a signal handler, or by an `on_update` callback, to end the run at the next update."""

    reason: str | None = None

    def __call__(self, reason: str) -> None:
        self.reason = self.reason or reason


@contextlib.contextmanager
def heard_by(stop: StopRequest) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 ask for the end; another one ends the process, whose files are whole at any time."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Ignored by jobs/outlive.sh: MPICH's launcher tells survivors of another's death by it.
    if signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN:
        numbers.append(signal.SIGUSR1)
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def listen() -> None:
        # Python runs a handler between two steps of its own: not while the main thread waits within a library.
        asked = False
        while found := os.read(heard, 64):
            numbers_found = set(found) & set(numbers)
            if asked and numbers_found:
                os._exit(128 + min(numbers_found))
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
    _heard_here[:] = numbers
    try:
        yield
    finally:
        _heard_here.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        os.close(told)


_heard_here: list[signal.Signals] = []


def _forget() -> None:
    """In a child of fork, such as a simulator in a process of its own: its signals are not the parent's."""
    if _heard_here:
        signal.set_wakeup_fd(-1)
        for number in _heard_here:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
