"""What keeps those that are left one graph, whoever is gone: lost ranks, and those that have finished.

If the topology without them is not strongly connected, the others are joined by a ring as well: each sends to the next
rank that is there, too. Every rank finds this out for itself, from the roster and the topology. For a time their
rosters differ; then a message may come from a rank that this one does not expect, and is not taken, or one may be
missing.

An edge of that ring is a mailbox as between nodes, with numbers, checksums and answers (`background`): a slot and a
word for the answer on each rank, in a window of their own. It bears two that write to one slot at once, each of which
takes itself for the one before it: what is torn is not taken, and sent again. Where all ranks share memory the
learner itself carries these messages, else the courier.

    word     written by                                     read by
    slot     the rank before, in the ring: stores or a Put  this rank, into a copy
    answer   the rank after it: a store or a Put            this rank

Numbers rise over all ranks that this one sends to, so that the answer of an earlier one is none to a later message. It
may land over the answer to that, which then comes again (see `background`; tests/gossip/programs/courier_properties.py
turns such edges in any order).

Growth: a slot and a word in the window, whatever the number of ranks. They are there from the start, used or not:
memory that is asked for only when a rank is lost may not be there then, which would end the process. Beside that three
snapshots for each rank that is sent to, and three copies for each that is heard.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from gala_mpi.gossip.background import BackgroundInbox, BackgroundOutbox, End, lay_out
from gala_mpi.gossip.connectivity import ring_neighbours
from gala_mpi.gossip.courier import Courier, Peer
from gala_mpi.gossip.roster import Roster
from gala_mpi.gossip.topology import Topology
from gala_mpi.mpi.room import ask_for_room
from gala_mpi.mpi.window import PAGE_BYTES, Window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

AnyEnd = TypeVar("AnyEnd", bound=End)
log = logging.getLogger(__name__)


class Survivors:
    """This rank's part in that ring. Making and freeing it are collective; all else is local.

    Raises NoRoomError, on all ranks, if the shared memory of some node has no room for it.
    """

    def __init__(self, comm: Intracomm, courier: Courier, topology: Topology, nbytes: int, roster: Roster) -> None:
        self._rank, self._courier, self._topology, self._roster = comm.rank, courier, topology, roster
        self._version, self._number = roster.version, 0
        (self._slot,), (self._answer,), total_bytes = lay_out([nbytes], 1)
        self._nbytes = nbytes
        shared = len(set(courier.leaders)) == 1 and not courier.needed
        # A window has a page more than it is asked for.
        ask_for_room(comm, courier.leaders, total_bytes + PAGE_BYTES)
        self._window = Window(comm, total_bytes, shared=shared)
        self._peers: dict[int, Peer] = {}
        self._outboxes: dict[int, BackgroundOutbox] = {}
        self._inboxes: dict[int, BackgroundInbox] = {}
        self.outbox: BackgroundOutbox | None = None
        """To the next rank that is there, if it is one that this one does not send to anyway."""
        self.inbox: BackgroundInbox | None = None
        """From the one before, likewise."""
        self.source: int | None = None

    @property
    def share(self) -> float:
        """The share of all ranks that is there, this one included."""
        there = ~self._roster.gone
        return (int(there.sum()) + bool(not there[self._rank])) / len(there)

    def look(self) -> bool:
        """Follow the roster, and carry what the courier does not; whether the ring has changed."""
        if not self._courier.needed:
            for peer in self._peers.values():
                peer.carry()
        if self._version == self._roster.version:
            return False
        self._version = self._roster.version
        before, after = ring_neighbours(self._topology, self._rank, self._roster.gone)
        if (before, after) == (self.source, None if self.outbox is None else self.outbox.target):
            return False
        self._turn_to(before, after)
        return True

    def _turn_to(self, before: int | None, after: int | None) -> None:
        """Hear the rank `before`, and send to the rank `after`, beside the topology's; None for none."""
        if self.outbox is not None:
            self._number = self.outbox.end()
        self.source, self.inbox, self.outbox = before, None, None
        for rank, inbox in self._inboxes.items():
            inbox.heeded = rank == before
        if before is not None:
            if before not in self._inboxes:
                inbox = BackgroundInbox(self._window, before, self._slot, self._answer, self._nbytes)
                self._inboxes[before] = self._add(inbox, before)
            self.inbox = self._inboxes[before]
        if after is not None:
            if after not in self._outboxes:
                outbox = BackgroundOutbox(self._window, after, self._slot, self._answer, self._nbytes)
                self._outboxes[after] = self._add(outbox, after)
            self.outbox = self._outboxes[after]
            self.outbox.begin_at(self._number)
            # Towards the end of a run ranks finish one after another: that is nothing to tell.
            level = logging.WARNING if self._roster.lost.any() else logging.DEBUG
            log.log(level, "ranks that are gone have cut the topology: this rank sends to rank %d too", after)

    def _add(self, end: AnyEnd, peer: int) -> AnyEnd:
        if self._courier.needed:
            return self._courier.add(end, peer)
        known = self._peers.setdefault(peer, Peer(peer, None))
        known.add(end)
        return end

    def free(self) -> None:
        """Free the window. Collective."""
        self._window.free()
