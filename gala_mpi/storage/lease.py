"""The lease of a run: tells a second start that a first one still goes on, before it has written anything too.

`lease.json` names the run, and the segment of it that holds the folder. Some ranks touch the file every BEAT_S, each
from a thread of its own: rank 0, also while the ranks set up; then two of each node, so that one may die; and the one
that speaks for the run, which notes there how the segment has ended. A start that finds a lease without that note waits
for WAIT_S: if the file was touched meanwhile, the run goes on. The file is compared with itself alone, so clocks need
not agree. Whoever finds the lease of an earlier segment, from a start that was slow to write it, writes its own again;
whoever finds that of a later one, or of another run, ends. All is local.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from gala_mpi.files import first_line, read_file, write_file

LEASE_FILE = "lease.json"
LARGEST_BYTES = 1024
LARGEST = 2**63
BEAT_S = 1.0
# Some beats: file systems round times, and may be slow.
WAIT_S = 5.0
REMEDY = "if no job goes on with the run, remove it"
log = logging.getLogger(__name__)


class LeaseError(Exception):
    """The run cannot be gone on with; the text says why."""


class HeldError(LeaseError):
    """Another start goes on with the run."""


@dataclass(frozen=True)
class End:
    """How a segment has ended; by default it was killed, or goes on."""

    ended: bool = False
    """In order: with a checkpoint of every rank that was there."""
    code: int | None = None
    """The exit code of the run; None if none was noted."""
    steps: int | None = None
    """Agent steps of all ranks together; None if they were not noted."""


GOES_ON = End()


@dataclass(frozen=True)
class _Found:
    """What a lease says, and what identifies the file and its last touch."""

    touched: tuple[int, int]
    run_id: str
    segment: int
    end: End


def write_lease(folder: Path, run_id: str, segment: int, end: End = GOES_ON) -> None:
    """Say that a segment of a run holds the folder, or held it and how that ended. Raises OSError."""
    content = {"run_id": run_id, "segment": segment, "ended": end.ended}
    noted = {name: value for name, value in (("code", end.code), ("steps", end.steps)) if value is not None}
    write_file(folder / LEASE_FILE, json.dumps(content | noted).encode())


def check_free(folder: Path, last: int) -> End:
    """How the run's last segment, `last`, has ended. Raises LeaseError; HeldError if it has not.

    May wait for WAIT_S.
    """
    before = _look(folder)
    if end := _noted(before, last):
        return end
    log.warning("%s: has not ended in order; waiting %g s to see whether it still goes on", folder, WAIT_S)
    return _watch(folder, before, last)


def how_it_ended(folder: Path, last: int) -> End:
    """The same for who only looks: without a word, and at once if its exit code was noted."""
    before = _look(folder)
    if before is not None and before.segment >= last and before.end.code is not None:
        return before.end
    return _noted(before, last) or _watch(folder, before, last)


def _noted(found: _Found | None, last: int) -> End | None:
    """The orderly end of segment `last`, if there was one."""
    # A segment later than the lease is one that is only being begun, or was killed there.
    if found is not None and found.segment >= last and found.end.ended:
        return found.end
    return None


def _watch(folder: Path, before: _Found | None, last: int) -> End:
    """What the lease says of segment `last`. Raises HeldError if it is touched within WAIT_S."""
    time.sleep(WAIT_S)
    now = _look(folder)
    if end := _noted(now, last):
        return end
    if now != before:
        raise HeldError(f"{LEASE_FILE} is still being touched: end the job that holds it by a signal, or wait for it")
    return before.end if before is not None and before.segment >= last else End()


def _look(folder: Path) -> _Found | None:
    """The lease, if there is one. Raises LeaseError if it cannot be read."""
    path = folder / LEASE_FILE
    try:
        content = json.loads(read_file(path, LARGEST_BYTES))
        about = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise LeaseError(f"{LEASE_FILE} cannot be read ({first_line(error)}): {REMEDY}") from error
    if not isinstance(content, dict):
        content = {}
    run_id, segment = content.get("run_id"), content.get("segment")
    code, steps = content.get("code"), content.get("steps")
    # Older versions noted no more than whether it ended in order.
    whole = all(noted is None or (type(noted) is int and 0 <= noted < LARGEST) for noted in (code, steps))
    if not isinstance(run_id, str) or type(segment) is not int or not whole:
        raise LeaseError(f"{LEASE_FILE} is not one of gala-mpi: {REMEDY}")
    return _Found((about.st_ino, about.st_mtime_ns), run_id, segment, End(content.get("ended") is True, code, steps))


class Lease:
    """A rank's part in holding `folder` for a segment of a run."""

    def __init__(self, folder: Path, run_id: str, segment: int) -> None:
        self._folder, self._run_id, self._segment = folder, run_id, segment
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self.lost = False
        """Whether another start holds the folder now: this one was suspended, say, and taken for dead."""

    def hold(self) -> None:
        """Touch the file from now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
            self._thread.start()

    def let_go(self) -> bool:
        """Touch the file no more; whether this rank did."""
        if self._thread is None:
            return False
        self._ending.set()
        self._thread.join(WAIT_S)
        return True

    def end(self, end: End) -> None:
        """Note how the segment has ended, if this rank holds the run."""
        self._note(self._segment, end)

    def give_back(self, before: End) -> None:
        """Note, if this rank holds the run, that this segment has not begun, and how the one before had ended."""
        self._note(self._segment - 1, before)

    def _note(self, segment: int, end: End) -> None:
        if not self.let_go():
            return
        # Without the note the next start only waits for longer.
        with contextlib.suppress(OSError, LeaseError):
            self._look_for_another()
            if not self.lost:
                write_lease(self._folder, self._run_id, segment, end)

    def _look_for_another(self) -> None:
        found = _look(self._folder)
        if found is None:
            return
        self.lost |= found.run_id != self._run_id or found.segment > self._segment
        if found.segment < self._segment and not self.lost and not self._ending.is_set():
            # Of an earlier start, which was slow to write it: so it will see this one, and end.
            write_lease(self._folder, self._run_id, self._segment)

    def _run(self) -> None:
        while not self._ending.wait(BEAT_S):
            # What cannot be read or touched is no sign of another: the folder may be away for a while.
            with contextlib.suppress(OSError, LeaseError):
                self._look_for_another()
                if not self.lost:
                    os.utime(self._folder / LEASE_FILE, follow_symlinks=False)
