"""What the ranks of a node know of all ranks, in memory that they share: no message passes inside a node.

Each rank has a row of eight words of 8 bytes: one cache line, the first word of which is its beat. The window's first
part holds the rows of the node's own ranks. If there are other nodes, each of some ranks of the node, its *heirs*, has
a copy of all rows in its own part, where it leaves what it hears from other nodes.

    word                          written by                read by
    row of a rank, in part 0      that rank                 all ranks of the node
    version and copy of an heir   that heir                 all ranks of the node

So each word has one writer for its whole life. Words are aligned, so a processor loads and stores each as a whole.
What orders them is that beats and versions count the writings, and are below zero during one:

    writer: swap b to -1 - b, Win_sync, the other words, Win_sync, swap to b + 1
    reader: load, Win_sync, the other words, Win_sync, load again: both from 0 on and equal, or what was read is dropped

Win_sync is a fence in both directions. If the reader saw a word of a later writing, then the swap that stands before
that word in the writer's order was done when the reader loaded again, and the two loads differ. So a row, or a copy, is
taken whole or not at all. Nobody waits: who comes during a writing, which takes some microseconds, finds what was
written the next time. Who is killed during a writing leaves a number below zero for ever, and is read no more.

Merging: a row is replaced by one of a greater beat. Only its owner makes versions of a row, each with a beat of its
own, so every row in any copy is one of those, and the greatest beat wins in whatever order and however often copies
are merged. Therefore it does no harm if two heirs pass rows on at the same time.

Memory of a node with n of N ranks: 64 n bytes, and 64 N for each heir if there are other nodes (64 KiB at N = 1,024).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gala_mpi.gossip.news import ROW_BYTES, ROW_WORDS
from gala_mpi.mpi.window import Window

BEAT, FLAGS = 0, 1

Rows = npt.NDArray[np.int64]


def shared_bytes(number: int, ranks_here: int, size: int, heirs: Sequence[int]) -> int:
    """What a rank's part of the window needs: it is the rank of that number on its node, of `ranks_here`.

    `heirs` are the numbers of those that have a copy.
    """
    rows = ROW_BYTES * ranks_here
    if ranks_here == size or number not in heirs:
        return rows if number == 0 else 0
    return rows + ROW_BYTES + ROW_BYTES * size


def merge(rows: Rows, found: Rows) -> bool:
    """Take over the rows that are newer; whether there were any."""
    newer = found[:, BEAT] > rows[:, BEAT]
    rows[newer] = found[newer]
    return bool(newer.any())


class SharedRows:
    """One rank's hold of them; `window` is shared by the ranks `here`, ascending, and has `shared_bytes` of each.

    Local, all of it. The window stays the caller's; nothing is to be called once it is freed.
    """

    def __init__(self, window: Window, here: Sequence[int], size: int, heirs: Sequence[int]) -> None:
        self._window, self._here = window, np.array(here)
        self._local = _rows(window, 0, 0, len(here))
        # Here lies the version of a copy; the copy begins a cache line further on.
        self._version_at = ROW_BYTES * len(here)
        with_copies = heirs if len(here) < size else ()
        self._copies = {h: _rows(window, h, self._version_at + ROW_BYTES, size) for h in with_copies}
        self._seen = dict.fromkeys(self._copies, 0)

    def write(self, row: Rows) -> None:
        """Store this rank's row (8,), and raise its beat."""
        place, beat = ROW_BYTES * self._window.rank, int(row[BEAT])
        self._window.swap(0, place, -1 - beat)
        self._window.sync()
        self._local[self._window.rank, 1:] = row[1:]
        self._window.sync()
        self._window.swap(0, place, beat + 1)
        row[BEAT] = beat + 1

    def leave(self, rows: Rows) -> None:
        """As an heir: leave all rows (N, 8) for the other ranks of the node."""
        me = self._window.rank
        version = self._seen[me]
        self._window.swap(me, self._version_at, -1 - version)
        self._window.sync()
        self._copies[me][:] = rows
        self._window.sync()
        self._window.swap(me, self._version_at, version + 1)
        self._seen[me] = version + 1

    def read(self, rows: Rows) -> None:
        """Bring rows (N, 8) up to date by all that other ranks of the node have written."""
        for heir in self._copies:
            if heir != self._window.rank:
                self._read_copy(heir, rows)
        beats = self._local[:, BEAT].copy()
        self._window.sync()
        found = self._local.copy()
        self._window.sync()
        # What is below zero is no newer than anything.
        newer = (self._local[:, BEAT] == beats) & (beats > rows[self._here, BEAT])
        rows[self._here[newer]] = found[newer]

    def _read_copy(self, heir: int, rows: Rows) -> None:
        version = self._window.load(heir, self._version_at)
        if version <= self._seen[heir]:
            return
        self._window.sync()
        copy = self._copies[heir]
        newer = np.flatnonzero(copy[:, BEAT] > rows[:, BEAT])
        found = copy[newer]
        self._window.sync()
        if self._window.load(heir, self._version_at) == version:
            rows[newer], self._seen[heir] = found, version


def _rows(window: Window, target: int, offset: int, count: int) -> Rows:
    memory = window.shared_memory(target, offset, ROW_BYTES * count)
    assert memory is not None, "the window is shared"
    return memory.view(np.int64).reshape(count, ROW_WORDS)
