"""All mailboxes over a directed graph of ranks, with the windows that hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from gala_mpi.gossip import background
from gala_mpi.gossip.background import BackgroundInbox, BackgroundOutbox
from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.mailbox import Delivery, Inbox, Outbox, Place, lay_out
from gala_mpi.mpi.window import Window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    InEdges = Sequence[Sequence[int]]


class Mailboxes:
    """One mailbox of `nbytes` for each edge of the graph. Making and freeing it are collective.

    `in_edges[r]` lists the ranks that send to rank r. `inboxes` has this rank's receiving end for each of its
    in-neighbours, in their order; `outboxes` its sending end for each of its out-neighbours, ascending. Those between
    ranks that share memory lie in a window of their node, all others in one over all ranks.
    """

    def __init__(self, comm: Intracomm, courier: Courier, in_edges: InEdges, nbytes: int) -> None:
        self._rank, self._nbytes, self._courier = comm.rank, nbytes, courier
        self._windows: list[Window] = []
        self.inboxes: dict[int, Inbox | BackgroundInbox] = {}
        self.outboxes: dict[int, Delivery] = {}
        # What is collective is agreed on without a message: all ranks know all edges.
        near = _chosen(in_edges, courier.near)
        far = _chosen(in_edges, lambda source, target: not courier.near(source, target))
        if any(near):
            node = cast("Intracomm", comm.Split(courier.leaders[comm.rank], comm.rank))
            self._open(node, near, courier.node_rank, shared=True)
            node.Free()
        if any(far) and courier.needed:
            self._open_background(comm, far)
        elif any(far):
            self._open(comm, far, lambda rank: rank, shared=False)
        self.inboxes = {source: self.inboxes[source] for source in in_edges[comm.rank]}
        self.outboxes = dict(sorted(self.outboxes.items()))
        # An inbox sets its control word: no sender may be there before.
        comm.Barrier()

    def _open(self, comm: Intracomm, in_edges: InEdges, number: Callable[[int], int], *, shared: bool) -> None:
        """Mailboxes that the learner itself writes, in a window over `comm`, where a rank has that number."""

        def places(target: int) -> dict[int, Place]:
            found, _ = lay_out([self._nbytes] * len(in_edges[target]))
            return dict(zip(in_edges[target], found, strict=True))

        _, total_bytes = lay_out([self._nbytes] * len(in_edges[self._rank]))
        window = Window(comm, total_bytes, shared=shared)
        self._windows.append(window)
        for source, place in places(self._rank).items():
            self.inboxes[source] = Inbox(window, place)
        for target in _targets(in_edges, self._rank):
            self.outboxes[target] = Outbox(window, number(target), places(target)[self._rank])

    def _open_background(self, comm: Intracomm, in_edges: InEdges) -> None:
        """Mailboxes that the courier carries."""

        def places(rank: int) -> tuple[dict[int, int], dict[int, int], int]:
            targets = _targets(in_edges, rank)
            slots, answers, total = background.lay_out([self._nbytes] * len(in_edges[rank]), len(targets))
            return dict(zip(in_edges[rank], slots, strict=True)), dict(zip(targets, answers, strict=True)), total

        slots, answers, total_bytes = places(self._rank)
        window = Window(comm, total_bytes)
        self._windows.append(window)
        for source, slot in slots.items():
            inbox = BackgroundInbox(window, source, slot, places(source)[1][self._rank], self._nbytes)
            self.inboxes[source] = self._courier.add(inbox, source)
        for target, answer in answers.items():
            outbox = BackgroundOutbox(window, target, places(target)[0][self._rank], answer, self._nbytes)
            self.outboxes[target] = self._courier.add(outbox, target)

    def free(self) -> None:
        """Free the windows. Collective; views of messages must be gone."""
        for window in self._windows:
            window.free()


def _chosen(in_edges: InEdges, chooses: Callable[[int, int], bool]) -> list[list[int]]:
    """The chosen edges of the graph."""
    return [[source for source in sources if chooses(source, target)] for target, sources in enumerate(in_edges)]


def _targets(in_edges: InEdges, rank: int) -> list[int]:
    """To whom the rank sends, ascending."""
    return [target for target, sources in enumerate(in_edges) if rank in sources]
