"""The lease of a run: tells a second start that a first one still goes on, before it has written anything too.

`lease.json` names the segment that holds it. Some ranks touch the file every BEAT_S, each from a thread of its own:
rank 0, also while the ranks set up; then two of each node, so that one may die; and the one that speaks for the run,
which notes an orderly end there. A start that finds a lease without that note waits for WAIT_S: if the file was touched
meanwhile, the run goes on. The file is compared with itself alone, so clocks need not agree. All is local.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from pathlib import Path

from gala_mpi.files import first_line, read_file, write_file

LEASE_FILE = "lease.json"
LARGEST_BYTES = 1024
BEAT_S = 1.0
# Some beats: file systems round times, and may be slow.
WAIT_S = 5.0
log = logging.getLogger(__name__)


class LeaseError(Exception):
    """The run cannot be gone on with; the text says why."""


def write_lease(folder: Path, segment: int, *, ended: bool = False) -> None:
    """Say that a segment holds the run, or held it. Raises OSError."""
    write_file(folder / LEASE_FILE, json.dumps({"segment": segment, "ended": ended}).encode())


def check_free(folder: Path, last: int) -> None:
    """Raise LeaseError if somebody holds the run, whose last segment is `last`. May wait for WAIT_S."""
    before = _look(folder)
    # A segment later than the lease is one that is only being begun, or was killed there.
    if before is not None and before[1] >= last and before[2]:
        return
    log.warning("%s: has not ended in order; waiting %g s to see whether it still goes on", folder, WAIT_S)
    time.sleep(WAIT_S)
    if _look(folder) != before:
        raise LeaseError(f"{LEASE_FILE} is still being touched: end the job that holds it by a signal, or wait for it")


def _look(folder: Path) -> tuple[tuple[int, int], int, bool] | None:
    """What identifies the file and its last touch, the segment, and whether it ended. Raises LeaseError."""
    path = folder / LEASE_FILE
    try:
        content = json.loads(read_file(path, LARGEST_BYTES))
        about = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise LeaseError(f"{LEASE_FILE} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict) or type(content.get("segment")) is not int:
        raise LeaseError(f"{LEASE_FILE} is not one of gala-mpi")
    return (about.st_ino, about.st_mtime_ns), content["segment"], content.get("ended") is True


class Lease:
    """A rank's part in holding the run in `folder` for `segment`."""

    def __init__(self, folder: Path, segment: int) -> None:
        self._folder, self._segment = folder, segment
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self.lost = False
        """Whether another start holds the run now: this one was suspended, say, and taken for dead."""

    def hold(self) -> None:
        """Touch the file from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
            self._thread.start()

    def end(self, *, begun: bool = True) -> None:
        """Note an orderly end, if this rank holds the run: of the segment before, if this one has not begun."""
        if self._thread is None:
            return
        self._ending.set()
        self._thread.join(WAIT_S)
        # Without the note the next start only waits for longer.
        with contextlib.suppress(OSError, LeaseError):
            self._look_for_another()
            if not self.lost:
                write_lease(self._folder, self._segment - (not begun), ended=True)

    def _look_for_another(self) -> None:
        found = _look(self._folder)
        self.lost |= found is not None and found[1] > self._segment

    def _run(self) -> None:
        while not self._ending.wait(BEAT_S):
            # What cannot be read or touched is no sign of another: the folder may be away for a while.
            with contextlib.suppress(OSError, LeaseError):
                self._look_for_another()
                if not self.lost:
                    os.utime(self._folder / LEASE_FILE, follow_symlinks=False)
