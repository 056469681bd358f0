"""The roster: who takes part, who has finished and who is lost, as each rank knows it, kept by none.

Every rank has a row of eight words: its beat, flags, and six words for the layer above. It writes its own whenever it
comes by. Whose row stands still for the timeout is lost, and back when it moves again (`patience`). Finished and lost
ranks are gone.

Inside a node rows lie in memory that its ranks share (`shared_rows`). Between nodes they go in messages:

    word                        written by                           read by
    `rows` of a rank            that rank alone                      that rank
    row, copies of a node       see `shared_rows`                    all ranks of the node
    mailbox from another node   the leader there, see `mailbox`      an heir of this node

Three ranks of a node are its heirs (`news`), and each has a mailbox from each heir of each neighbouring node, over an
exponential graph of nodes in both directions. The leader is the lowest heir that does not waver, that is, was not
silent for a quarter of the timeout. It alone sends, and in each round all rows to one of its neighbours, in turn
(where an update is longer than a round, for all rounds that have passed):
there to the lowest heir that does not waver, or to all if all do. Heirs take what comes whether they lead or not. So
a leader's death stops its node's news for a quarter of the timeout, not long enough for anybody else to be lost; that
two lead at once (each sees the other as it was) does no harm, see `shared_rows`. Ranks of a node that has lost all
heirs, and those elsewhere, are lost to each other.

Why all rows: those of all live ranks change between two messages, so changes alone would save nothing, and a mailbox
replaces what was not read yet. Why one neighbour a round: rows spread as fast as by a few rounds more, at an n-th of
the traffic. A flag that rises (a request to stop, an end) is passed on at once to all neighbours, once a round at most.

Growth with N ranks on M nodes. A row has 64 bytes, and a node d neighbours, 2 log2(M) at most:

    bytes a second that a node sends   64 N / round: at most 256 KiB, as a round takes longer the more ranks there are
    a round                            0.05 s up to 204 ranks, 0.25 s at 1,024, 1 s at 4,096
    memory of an heir                  messages of 64 N: 3 d in windows (9 d without a courier) and 18 d copies of
                                       its own: 9.6 MB at 1,024 ranks on 16 nodes (d = 7)
    memory of any other rank           90 N
    time of `come_by`                  0.05 ms, and 0.03 us N where all rows are new, with cold caches, less than half
                                       with warm ones (benchmarks/roster.py). It calls MPI for fences alone, and on an
                                       heir for its mailboxes

With a short timeout a round is shorter: all neighbours hear of a node four times within the timeout.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.mailbox import lay_out
from gala_mpi.gossip.mailboxes import Mailboxes
from gala_mpi.gossip.news import ROW_BYTES, ROW_WORDS, Heirs, heirs_among, round_s
from gala_mpi.gossip.patience import Patience
from gala_mpi.gossip.shared_rows import BEAT, FLAGS, Rows, SharedRows, merge, shared_bytes
from gala_mpi.mpi.room import NoRoomError, ask_for_room
from gala_mpi.mpi.window import PAGE_BYTES, Window
from gala_mpi.units import spans

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

FINISHED = 1
log = logging.getLogger(__name__)


class Roster:
    """This rank's view of all ranks. Making and freeing it are collective; all else is local, and never waits.

    timeout_s: silence after which a rank is lost. Whoever is to be heard must come by, while waiting too.
    Raises NoRoomError, on all ranks, if the shared memory of some node has no room for it.
    """

    def __init__(self, comm: Intracomm, courier: Courier, timeout_s: float) -> None:
        heirs = Heirs(courier.leaders)
        here, self._neighbours = heirs.node_of(comm.rank), heirs.neighbours_of(comm.rank)
        self.rows: Rows = np.zeros((comm.size, ROW_WORDS), np.int64)
        """What this rank knows of each: beat, flags and six words of the layer above, which may change its own."""
        self.mine = self.rows[comm.rank]
        self.gone = np.zeros(comm.size, np.bool_)
        """For each rank whether it is lost or has finished; a new array whenever that changes."""
        self.version = 0
        """Rises with each change of `gone`."""
        self._lost, self._meeting = self.gone, False
        self._patience = Patience(comm.size, timeout_s)
        number = here.index(comm.rank)
        heirs_here = heirs_among(len(here))
        nbytes = shared_bytes(number, len(here), comm.size, heirs_here)
        # A window has a page more than it is asked for.
        ask_for_room(comm, courier.leaders, nbytes + PAGE_BYTES)
        node = cast("Intracomm", comm.Split(courier.leaders[comm.rank], comm.rank))
        self._window = Window(node, nbytes, shared=True)
        node.Free()
        self._shared = SharedRows(self._window, here, comm.size, heirs_here)
        self._mailboxes: Mailboxes | None = None
        if self._neighbours:
            try:
                self._mailboxes = Mailboxes(comm, courier, heirs, self.rows.nbytes)
            except NoRoomError:
                self.free()
                raise
        self._is_heir, self._heirs_before = number in heirs_here, [here[heir] for heir in heirs_here if heir < number]
        self._round_s = round_s(comm.size, len(self._neighbours), timeout_s)
        self._next, self._sent_at_s, self._told_at_s = 0, 0.0, 0.0
        # Sums of all flags now, when `gone` was found, and when they were told: as flags only rise, so do sums of them.
        self._flags = self._settled = self._told = 0
        self._missing = False

    @property
    def lost(self) -> npt.NDArray[np.bool_]:
        """For each rank whether it counts as lost."""
        return self._lost

    def come_by(self) -> None:
        """Write this rank's row, read what others have written, and pass it on if that is due."""
        self._shared.write(self.mine)
        self._shared.read(self.rows)
        if self._mailboxes is not None and self._is_heir:
            self._take()
        now_s = time.monotonic()
        self._patience.look(self.rows[:, BEAT], now_s)
        self._flags = int(self.rows[:, FLAGS].sum())
        self._settle()
        if self._leads():
            self._send_if_due(now_s)

    def tell(self) -> None:
        """Come by, and pass on what is known to all neighbours at once."""
        self.come_by()
        if self._leads():
            self._tell(time.monotonic())

    def finish(self) -> None:
        """Say that this rank is done. It may fall silent once all are gone, but not before it meets the others."""
        self.mine[FLAGS] |= FINISHED
        self.tell()

    def meet(self) -> None:
        """From now on ranks that are done must be heard too: they come by until all have met."""
        self._meeting = True
        # Whoever waits for a rank that leaves now learns from this one all that it waits for.
        self.tell()

    def _take(self) -> None:
        """Take over the newer rows of messages, and leave them for the others of the node."""
        assert self._mailboxes is not None
        news = False
        for inbox in self._mailboxes.inboxes.values():
            if message := inbox.take():
                news |= merge(self.rows, message.payload.view(np.int64).reshape(-1, ROW_WORDS))
        if news:
            self._shared.leave(self.rows)

    def _settle(self) -> None:
        """Find who is lost, and who is gone."""
        if self._patience.unbroken and self._flags == self._settled and not self._missing:
            return
        finished = self.rows[:, FLAGS] & FINISHED != 0
        lost = self._patience.exhausted() & (~finished | self._meeting)
        self._tell_of(np.flatnonzero(lost & ~self._lost).tolist(), np.flatnonzero(self._lost & ~lost).tolist())
        self._settled, self._missing = self._flags, bool(lost.any())
        self._lost, gone = lost, lost | finished
        if not np.array_equal(gone, self.gone):
            self.gone, self.version = gone, self.version + 1

    def _tell_of(self, missed: list[int], found: list[int]) -> None:
        """In one line each, though a whole node may be lost at once."""
        if missed:
            has, them = ("has", "it") if len(missed) == 1 else ("have", "them")
            silent_s = self._patience.timeout_s
            log.warning(
                "%s %s not been heard of for %g s: the run goes on without %s", spans(missed), has, silent_s, them
            )
        if found:
            log.warning("%s %s back in the run", spans(found), "is" if len(found) == 1 else "are")

    def _leads(self) -> bool:
        """Whether this rank speaks for its node: it is an heir, and all heirs before it waver."""
        return self._is_heir and bool(self._neighbours) and all(map(self._patience.wavers, self._heirs_before))

    def _send_if_due(self, now_s: float) -> None:
        if self._flags != self._told and now_s - self._told_at_s >= self._round_s:
            self._tell(now_s)
        elif now_s - self._sent_at_s >= self._round_s:
            # Where updates are longer than a round, as many as it would have been.
            due = min(int((now_s - self._sent_at_s) / self._round_s), len(self._neighbours))
            self._sent_at_s = now_s
            for _ in range(due):
                self._send(self._neighbours[self._next])
                self._next = (self._next + 1) % len(self._neighbours)

    def _tell(self, now_s: float) -> None:
        self._sent_at_s = self._told_at_s = now_s
        self._told = self._flags
        for heirs in self._neighbours:
            self._send(heirs)

    def _send(self, heirs: Sequence[int]) -> None:
        """Send all rows to a node."""
        assert self._mailboxes is not None
        firm = [heir for heir in heirs if not self._patience.wavers(heir)]
        for target in firm[:1] or heirs:
            outbox = self._mailboxes.outboxes[target]
            outbox.post(self.rows, update=int(self.mine[BEAT]), time_s=time.time(), agent_steps=0)

    def free(self) -> None:
        """Free the windows. Collective, once all have met."""
        # It holds views of the window's memory.
        del self._shared
        if self._mailboxes is not None:
            self._mailboxes.free()
        self._window.free()


def roster_bytes(rank: int, leaders: Sequence[int]) -> int:
    """Size of the windows that a rank's roster needs, in bytes; with a courier those of mailboxes are a third of it.

    `leaders` has the lowest rank of each rank's node.
    """
    heirs, size = Heirs(leaders), len(leaders)
    here, sources = heirs.node_of(rank), heirs.in_neighbours(rank)
    mailboxes = lay_out([size * ROW_BYTES] * len(sources))[1] if sources else 0
    return shared_bytes(here.index(rank), len(here), size, heirs_among(len(here))) + mailboxes
