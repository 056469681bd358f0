"""Standard output and error: what cannot be written there is dropped, and the program goes on.

A reader may leave, a terminal be closed, a disk fill, a descriptor be closed from the start, and a letter may not be
one of the encoding's. None of these is a reason to end a run. The guard lies below Python's own streams, so it holds
for all that is printed: lines of this package, logs, tracebacks, and what a user's environment prints.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

# A reader that is there but does not read (a pager, a terminal that is held) is waited for so long, once.
PATIENCE_S = 10.0
# What a pipe with room takes at once (POSIX's PIPE_BUF on Linux).
PIECE_BYTES = 4096
STDOUT, STDERR = 1, 2


class _Guarded(io.FileIO):
    """A descriptor that takes everything: what cannot be written is dropped. Its writes end, whoever reads."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._patient, self._told = True, False

    def write(self, data: Any, /) -> int:
        """Write at most PIECE_BYTES of `data`; how many bytes are done with."""
        view = memoryview(data).cast("B")[:PIECE_BYTES]
        try:
            if self._has_room():
                # None: another process has made the descriptor a non-blocking one, and the room is gone.
                return super().write(view) or 0
        except OSError as error:
            self._tell(error)
        return len(view)

    def _has_room(self) -> bool:
        """Whether a write would not wait; a reader that had room before is waited for."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        self._patient = bool(poll.poll(PATIENCE_S * 1000 if self._patient else 0))
        return self._patient

    def _tell(self, error: OSError) -> None:
        """Say once, where it can be, that there is no standard output; one that has been left is no news."""
        if not self._told and self.fileno() == STDOUT and error.errno not in (errno.EPIPE, errno.EIO):
            self._told = True
            print(f"warning: standard output cannot be written ({error.strerror}): going on without", file=sys.stderr)


def guard() -> None:
    """Put the guard under standard output and error; before anything else opens a file. Local.

    Streams that are not those of the process (a test's, say) stay as they are.
    """
    for descriptor in range(3):
        _open_if_closed(descriptor)
    for name, descriptor in (("stdout", STDOUT), ("stderr", STDERR)):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError, ValueError, AttributeError):
            before.flush()
        guarded = io.TextIOWrapper(
            io.BufferedWriter(_Guarded(descriptor)),
            encoding=getattr(before, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=getattr(before, "line_buffering", False),
            write_through=getattr(before, "write_through", False),
        )
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
