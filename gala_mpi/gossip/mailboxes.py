"""All mailboxes over a directed graph of ranks, with the windows that hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from gala_mpi.gossip import background
from gala_mpi.gossip.background import BackgroundInbox, BackgroundOutbox
from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.mailbox import Delivery, Inbox, Outbox, Place, lay_out
from gala_mpi.mpi.room import ask_for_room
from gala_mpi.mpi.window import PAGE_BYTES, Window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def gossip_bytes(nbytes: int, inline: int, carried: int) -> int:
    """Size of the windows of a rank of gossip, for messages of `nbytes`, in bytes. Local.

    By the number of in-neighbours whose messages come inline, and of those that a courier carries; and with the slot
    that is for survivors.
    """
    by_courier = background.lay_out([nbytes] * carried, carried)[2] if carried else 0
    return lay_out([nbytes] * inline)[1] + by_courier + background.lay_out([nbytes], 1)[2]


class Graph(Protocol):
    """Who sends to whom, asked for one rank at a time; the same on all ranks. A Topology is one."""

    def in_neighbours(self, rank: int) -> Sequence[int]:
        """Ranks that send to `rank`, ascending."""

    def out_neighbours(self, rank: int) -> Sequence[int]:
        """Ranks that `rank` sends to, ascending."""


class Mailboxes:
    """One mailbox of `nbytes` for each edge of the graph. Making and freeing it are collective.

    `inboxes` has this rank's receiving end for each of its in-neighbours, in their order; `outboxes` its sending end
    for each of its out-neighbours, ascending. Those between ranks that share memory lie in a window of their node, all
    others in one over all ranks. A rank computes the places of its own edges alone: from its neighbours' neighbours, so
    that all of it grows with the square of the degree at most, and not with the number of ranks.

    Raises NoRoomError, on all ranks, if some node has not the memory for it.
    """

    def __init__(self, comm: Intracomm, courier: Courier, graph: Graph, nbytes: int) -> None:
        self._rank, self._nbytes, self._courier, self._graph = comm.rank, nbytes, courier, graph
        self._windows: list[Window] = []
        self.inboxes: dict[int, Inbox | BackgroundInbox] = {}
        self.outboxes: dict[int, Delivery] = {}
        near, far = self._some_are(comm, near=True), self._some_are(comm, near=False)
        far_bytes = self._background_places(comm.rank)[2] if courier.needed else self._places(comm.rank, near=False)[1]
        # A window has a page more than it is asked for.
        ask_for_room(comm, courier.leaders, self._places(comm.rank, near=True)[1] + far_bytes + 2 * PAGE_BYTES)
        if near:
            node = cast("Intracomm", comm.Split(courier.leaders[comm.rank], comm.rank))
            self._open(node, courier.node_rank, near=True)
            node.Free()
        if far and courier.needed:
            self._open_background(comm)
        elif far:
            self._open(comm, lambda rank: rank, near=False)
        self.inboxes = {source: self.inboxes[source] for source in graph.in_neighbours(comm.rank)}
        self.outboxes = dict(sorted(self.outboxes.items()))
        # An inbox sets its control word: no sender may be there before.
        comm.Barrier()

    def _some_are(self, comm: Intracomm, *, near: bool) -> bool:
        """Whether any rank has such an edge. Collective."""
        return bool(comm.allreduce(len(self._sources(comm.rank, near=near))))

    def _sources(self, rank: int, *, near: bool) -> list[int]:
        return [source for source in self._graph.in_neighbours(rank) if self._courier.near(source, rank) == near]

    def _targets(self, rank: int, *, near: bool) -> list[int]:
        return [target for target in self._graph.out_neighbours(rank) if self._courier.near(rank, target) == near]

    def _places(self, rank: int, *, near: bool) -> tuple[dict[int, Place], int]:
        """Where the mailboxes of a rank's in-neighbours lie in its window, if none is carried; and the bytes in all."""
        sources = self._sources(rank, near=near)
        found, total_bytes = lay_out([self._nbytes] * len(sources))
        return dict(zip(sources, found, strict=True)), total_bytes

    def _background_places(self, rank: int) -> tuple[dict[int, int], dict[int, int], int]:
        """Where slots of in-neighbours and answers of out-neighbours lie in a rank's window; and the bytes in all."""
        sources, targets = self._sources(rank, near=False), self._targets(rank, near=False)
        slots, answers, total_bytes = background.lay_out([self._nbytes] * len(sources), len(targets))
        return dict(zip(sources, slots, strict=True)), dict(zip(targets, answers, strict=True)), total_bytes

    def _open(self, comm: Intracomm, number: Callable[[int], int], *, near: bool) -> None:
        """Mailboxes that the learner itself writes, in a window over `comm`, where a rank has that number."""
        places, total_bytes = self._places(self._rank, near=near)
        window = Window(comm, total_bytes, shared=near)
        self._windows.append(window)
        for source, place in places.items():
            self.inboxes[source] = Inbox(window, place)
        for target in self._targets(self._rank, near=near):
            self.outboxes[target] = Outbox(window, number(target), self._places(target, near=near)[0][self._rank])

    def _open_background(self, comm: Intracomm) -> None:
        """Mailboxes that the courier carries."""
        slots, answers, total_bytes = self._background_places(self._rank)
        window = Window(comm, total_bytes)
        self._windows.append(window)
        for source, slot in slots.items():
            answer = self._background_places(source)[1][self._rank]
            inbox = BackgroundInbox(window, source, slot, answer, self._nbytes)
            self.inboxes[source] = self._courier.add(inbox, source)
        for target, answer in answers.items():
            slot = self._background_places(target)[0][self._rank]
            outbox = BackgroundOutbox(window, target, slot, answer, self._nbytes)
            self.outboxes[target] = self._courier.add(outbox, target)

    def free(self) -> None:
        """Free the windows. Collective; views of messages must be gone."""
        for window in self._windows:
            window.free()
