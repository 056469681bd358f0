"""Standard output and error: what cannot be written there is dropped, and the program goes on.

A reader may leave, or stay and not read; a terminal be closed or held; a disk fill; a descriptor be closed from the
start, or by a user's code; and a letter may not be one of the encoding's. None of these is a reason to end a run, or to
hold it up. The guard lies below Python's own streams, so it holds for all that is printed: lines of this package, logs,
tracebacks, and what a user's environment prints.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import sys
import time
from typing import Any, TextIO

# A reader that is there but does not read (a pager, a terminal that is held) is waited for so long, once.
PATIENCE_S = 10.0
PIECE_BYTES = 4096
STDOUT, STDERR = 1, 2
NAMES = {STDOUT: "stdout", STDERR: "stderr"}
_streams: dict[int, TextIO] = {}


def stdout() -> TextIO:
    """Standard output: the guarded one, wherever a user's code has sent `sys.stdout`."""
    return _of_process(STDOUT)


def stderr() -> TextIO:
    """Standard error, likewise."""
    return _of_process(STDERR)


def _of_process(descriptor: int) -> TextIO:
    stream: TextIO = getattr(sys, NAMES[descriptor])
    # Where somebody reads along (a test), what is said goes there.
    return _streams.get(descriptor, stream)


def say(text: str) -> None:
    """Print to standard output, at once."""
    print(f"{text}\n", end="", file=stdout(), flush=True)


def complain(text: str) -> None:
    """Print to standard error, at once."""
    # With its end in one piece: launchers join the lines of several ranks.
    print(f"{text}\n", end="", file=stderr(), flush=True)


class _Guarded(io.FileIO):
    """A descriptor that takes everything: what cannot be written is dropped. Its writes end, whoever reads."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._way = _without_waiting(descriptor)
        self._patient, self._told = True, False

    def write(self, data: Any, /) -> int:
        """Write some of `data`, at most PIECE_BYTES; how many bytes are done with."""
        view = memoryview(data).cast("B")[:PIECE_BYTES]
        until = time.monotonic() + (PATIENCE_S if self._patient else 0.0)
        while True:
            try:
                done = os.write(self._way, view)
            except BlockingIOError:
                self._patient = time.monotonic() < until
            except OSError as error:
                self._tell(error)
                return len(view)
            else:
                self._patient = True
                return done
            if not self._patient:
                return len(view)
            self._wait()

    def _wait(self) -> None:
        """Wait a little for room."""
        poll = select.poll()
        poll.register(self._way, select.POLLOUT)
        if poll.poll(50):
            # A terminal may say that it has room, and take nothing.
            time.sleep(0.002)

    def _tell(self, error: OSError) -> None:
        """Say once, where it can be, that there is no standard output; one that has been left is no news."""
        if not self._told and self.fileno() == STDOUT and error.errno not in (errno.EPIPE, errno.EIO):
            self._told = True
            complain(f"warning: standard output cannot be written ({error.strerror}): going on without")


def _without_waiting(descriptor: int) -> int:
    """The same pipe or terminal by a descriptor of our own, whose writes never wait; others share the given one.

    Of anything else, and where that cannot be had, the given one.
    """
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(kind) or os.isatty(descriptor):
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        pass
    return descriptor


class _Unbuffered(io.BufferedWriter):
    """What is written goes out at once, as PYTHONUNBUFFERED asks for."""

    def write(self, data: Any, /) -> int:
        """Write all of `data`."""
        done = super().write(data)
        self.flush()
        return done


class _Stream(io.TextIOWrapper):
    """A stream that a user's code cannot close for all others."""

    def close(self) -> None:
        """Flush alone."""
        self.flush()


def guard() -> None:
    """Put the guard under standard output and error; before anything else opens a file. Local.

    Streams that are not those of the process (a test's, say) stay as they are.
    """
    for descriptor in range(3):
        _open_if_closed(descriptor)
    for descriptor, name in NAMES.items():
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            before.flush()
        at_once = getattr(before, "write_through", False)
        guarded = _Stream(
            (_Unbuffered if at_once else io.BufferedWriter)(_Guarded(descriptor)),
            encoding=getattr(before, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=getattr(before, "line_buffering", False),
            write_through=at_once,
        )
        _streams[descriptor] = guarded
        setattr(sys, name, guarded)
        setattr(sys, f"__{name}__", guarded)


def _open_if_closed(descriptor: int) -> None:
    """Give a daemon what it has not: else the next file, of metrics, say, gets the number, and all that is said."""
    try:
        os.fstat(descriptor)
    except OSError:
        # The lowest number that is free is this one.
        opened = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(opened, True)
