"""The notice board of a run: what every rank has done, known to all ranks, kept by none.

Each rank holds a copy of the whole board and writes the row that is its own. Copies spread by mailboxes over an
exponential graph of both directions, in log2(size) hops, and are merged row by row: the newer wins. Steps taken,
requests to stop and the end itself thus reach every rank without a server whose death would end the run. A row's
`beat` rises whenever its owner comes by, which is the heartbeat: a rank whose beat stands still counts as lost.

    word                        written by                  read by
    row r of any copy           rank r, then by merging     all ranks, in their own copy
    mailbox from an in-neighbour that rank (mailbox)        its receiver

No call in the training loop is collective, and none waits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.mailbox import lay_out
from gala_mpi.gossip.mailboxes import Mailboxes
from gala_mpi.learning.environments import Episode

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

RECENT_EPISODES = 100
TELL_EVERY_S = 0.05
STOP, FINISHED, DIVERGED, FAILED, UNWRITTEN = 1, 2, 4, 8, 16

ROW = np.dtype(
    [
        ("beat", "<i8"),
        ("agent_steps", "<i8"),
        ("update", "<i8"),
        ("staleness", "<i8"),
        ("episodes", "<i8"),
        ("flags", "<i8"),
    ]
)
RECENT = np.dtype([("time_s", "<f8"), ("episode_return", "<f8"), ("rank", "<i8"), ("number", "<i8")])
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overview:
    """What a rank knows of the whole run."""

    agent_steps: int
    episodes: int
    mean_return: float
    averaged: int
    staleness: int


class Board:
    """This rank's copy. Making and freeing it are collective; all else is local.

    A rank is lost when its row has not changed for `timeout_s` seconds, and back when it does. One that is done may
    fall silent, but not before it meets the others.
    """

    def __init__(self, comm: Intracomm, courier: Courier, timeout_s: float) -> None:
        self._rank, self._timeout_s = comm.rank, timeout_s
        self._copy = np.zeros(1, _copy_type(comm.size))
        self._rows, self._recent = self._copy["rows"][0], self._copy["recent"][0]
        self._mine = self._rows[comm.rank : comm.rank + 1]
        self._mailboxes = Mailboxes(comm, courier, _BothWays(comm.size), self._copy.nbytes)
        self._heard_at_s = np.full(comm.size, math.inf)
        self._lost = np.zeros(comm.size, bool)
        self._told_at_s = 0.0
        self._looked_at_s = math.inf
        self._meeting = False

    @property
    def total_steps(self) -> int:
        """Agent steps of all ranks, as far as this rank knows; exact after `finish`, if no rank is lost."""
        return int(self._rows["agent_steps"].sum())

    @property
    def stop_requested(self) -> bool:
        """Whether some rank asked all to stop."""
        return bool((self._rows["flags"] & STOP).any())

    @property
    def lost(self) -> list[int]:
        """Ranks that count as lost, ascending."""
        return [int(rank) for rank in np.flatnonzero(self._lost)]

    @property
    def diverged(self) -> list[int]:
        """Ranks that ended since their parameters were not finite, ascending."""
        return [int(rank) for rank in np.flatnonzero(self._rows["flags"] & DIVERGED)]

    @property
    def failed(self) -> list[int]:
        """Ranks that ended by an error, ascending."""
        return [int(rank) for rank in np.flatnonzero(self._rows["flags"] & FAILED)]

    @property
    def unwritten(self) -> list[int]:
        """Ranks that could not write all their metrics, or their last checkpoint, ascending."""
        return [int(rank) for rank in np.flatnonzero(self._rows["flags"] & UNWRITTEN)]

    @property
    def speaker(self) -> int:
        """The rank that speaks for the run: the lowest that is not lost."""
        return int(np.argmin(self._lost))

    def go_on_from(self, agent_steps: Sequence[int], update: int, episodes: int) -> None:
        """Begin with the steps that each rank had taken, and this rank's updates and episodes."""
        self._rows["agent_steps"] = agent_steps
        self._mine["update"], self._mine["episodes"] = update, episodes

    def ask_all_to_stop(self) -> None:
        """Let every rank see, within a few beats, that the run is to end."""
        self._mine["flags"] |= STOP

    def note_episodes(self, episodes: list[Episode], time_s: float) -> None:
        """Add finished episodes to the most recent ones of the run."""
        if episodes:
            first = int(self._mine["episodes"][0])
            self._mine["episodes"] += len(episodes)
            rows = [(time_s, e.episode_return, self._rank, first + 1 + k) for k, e in enumerate(episodes)]
            self._keep_recent(np.array(rows, RECENT))

    def report(self, agent_steps: int, update: int, staleness: int) -> None:
        """Write this rank's row, then come by."""
        self._mine["agent_steps"], self._mine["update"], self._mine["staleness"] = agent_steps, update, staleness
        self.come_by()

    def come_by(self) -> None:
        """Read what others have sent, and from time to time send on what is known. To be called while waiting too."""
        self._read()
        if time.monotonic() - self._told_at_s >= TELL_EVERY_S:
            self.tell()

    def tell(self) -> None:
        """Send on what is known, at once."""
        self._told_at_s = time.monotonic()
        self._mine["beat"] += 1
        for outbox in self._mailboxes.outboxes.values():
            outbox.post(self._copy, update=int(self._mine["beat"][0]), time_s=time.time(), agent_steps=0)

    def overview(self) -> Overview:
        """The run as this rank knows it."""
        known = self._recent[self._recent["number"] > 0]
        return Overview(
            agent_steps=self.total_steps,
            episodes=int(self._rows["episodes"].sum()),
            mean_return=float(known["episode_return"].mean()) if len(known) else math.nan,
            averaged=len(known),
            staleness=int(self._rows["staleness"][~self._lost].max(initial=0)),
        )

    def finish(self, *, diverged: bool = False, failed: bool = False, unwritten: bool = False) -> None:
        """Say that this rank is done, and how."""
        self._mine["flags"] |= FINISHED | diverged * DIVERGED | failed * FAILED | unwritten * UNWRITTEN
        self.tell()

    @property
    def all_done(self) -> bool:
        """Whether every rank is done, or lost. Ends: whoever is not heard is lost."""
        return bool(((self._rows["flags"] & FINISHED > 0) | self._lost).all())

    def meet(self) -> None:
        """From now on ranks that are done must be heard too: they come by until all have met."""
        self._meeting = True
        # Whoever waits for a rank that leaves now learns from this copy all that it waits for.
        self.tell()

    def _read(self) -> None:
        now = time.monotonic()
        for inbox in self._mailboxes.inboxes.values():
            if message := inbox.take():
                self._merge(message.payload.view(self._copy.dtype)[0], now)
        self._heard_at_s[self._rank] = now
        self._look_for_lost(now)

    def _merge(self, other: np.void, now: float) -> None:
        newer = other["rows"]["beat"] > self._rows["beat"]
        newer[self._rank] = False
        self._rows[newer] = other["rows"][newer]
        self._heard_at_s[newer] = now
        if not np.array_equal(self._recent, other["recent"]):
            self._keep_recent(other["recent"])

    def _keep_recent(self, more: np.ndarray) -> None:
        """Keep the newest of what is known and `more`; the same episode counts once."""
        both = np.concatenate([self._recent, more])
        _, first = np.unique(both[["rank", "number"]], return_index=True)
        both = both[first]
        both = both[both["number"] > 0]
        newest = both[np.argsort(both["time_s"], kind="stable")][-RECENT_EPISODES:]
        self._recent[:] = 0
        self._recent[: len(newest)] = newest

    def _look_for_lost(self, now: float) -> None:
        # Patience begins with the first look, not while ranks are still being set up.
        # So does it after a time in which this rank itself was stopped, or in a long rollout.
        if now - self._looked_at_s > self._timeout_s / 2:
            self._heard_at_s[:] = now
        self._looked_at_s = now
        self._heard_at_s[np.isinf(self._heard_at_s)] = now
        silent = now - self._heard_at_s > self._timeout_s
        lost = silent & ((self._rows["flags"] & FINISHED == 0) | self._meeting)
        for rank in np.flatnonzero(lost & ~self._lost):
            log.warning("rank %d has not been heard of for %g s: the run goes on without it", rank, self._timeout_s)
        for rank in np.flatnonzero(self._lost & ~lost):
            log.warning("rank %d is back in the run", rank)
        self._lost = lost

    def free(self) -> None:
        """Free the windows. Collective, once all have met."""
        self._mailboxes.free()


def board_bytes(size: int) -> int:
    """Size of the windows that a rank's board needs, in bytes; the same for all ranks but the last few, at most."""
    nbytes = _copy_type(size).itemsize
    graph = _BothWays(size)
    return max(lay_out([nbytes] * len(graph.in_neighbours(rank)))[1] for rank in range(size))


def _copy_type(size: int) -> np.dtype[np.void]:
    return np.dtype([("rows", ROW, (size,)), ("recent", RECENT, (RECENT_EPISODES,))])


class _BothWays:
    """An exponential graph of both directions. The survivors of a dead node still hear each other."""

    def __init__(self, size: int) -> None:
        self._size = size

    def in_neighbours(self, rank: int) -> list[int]:
        steps = [1 << bit for bit in range((self._size - 1).bit_length())]
        return sorted({(rank + sign * step) % self._size for step in steps for sign in (-1, 1)} - {rank})

    out_neighbours = in_neighbours
