"""All mailboxes over a directed graph of ranks, with the windows that hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.mailbox import Delivery, Inbox, Outbox, Place, lay_out
from gala_mpi.mpi.window import Window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


class Mailboxes:
    """One mailbox of `nbytes` for each edge of the graph. Making and freeing it are collective.

    `in_edges[r]` lists the ranks that send to rank r. `inboxes` has this rank's receiving end for each of its
    in-neighbours, in their order; `outboxes` its sending end for each of its out-neighbours, ascending. Those between
    ranks that share memory lie in a window of their node, all others in one over all ranks.
    """

    def __init__(self, comm: Intracomm, courier: Courier, in_edges: Sequence[Sequence[int]], nbytes: int) -> None:
        rank = comm.rank
        edges = [(source, target) for target, sources in enumerate(in_edges) for source in sources]
        near = {edge for edge in edges if courier.near(*edge)}
        far = set(edges) - near
        self._windows: list[Window] = []
        inboxes: dict[int, Inbox] = {}
        outboxes: dict[int, Delivery] = {}

        def open_ends(window: Window, places: dict[tuple[int, int], Place], outbox: Callable[..., Delivery]) -> None:
            self._windows.append(window)
            for (source, target), place in places.items():
                if target == rank:
                    inboxes[source] = Inbox(window, place)
                elif source == rank:
                    outboxes[target] = outbox(window, target, place)

        # What is collective is agreed on without a message: all ranks know all edges.
        if near:
            places, total_bytes = _lay_out(in_edges, near, nbytes)
            node = cast("Intracomm", comm.Split(courier.leaders[rank], rank))
            window = Window(node, total_bytes[rank], shared=True)
            node.Free()
            open_ends(window, places, lambda window, target, place: Outbox(window, courier.node_rank(target), place))
        if far:
            places, total_bytes = _lay_out(in_edges, far, nbytes)
            open_ends(Window(comm, total_bytes[rank], polled=courier.needed), places, courier.outbox)
        self.inboxes = {source: inboxes[source] for source in in_edges[rank]}
        self.outboxes = dict(sorted(outboxes.items()))
        # An inbox sets its control word: no sender may be there before.
        comm.Barrier()

    def free(self) -> None:
        """Free the windows. Collective; views of messages must be gone."""
        for window in self._windows:
            window.free()


def _lay_out(
    in_edges: Sequence[Sequence[int]], chosen: set[tuple[int, int]], nbytes: int
) -> tuple[dict[tuple[int, int], Place], list[int]]:
    """The place of each chosen edge's mailbox in its target's memory, and the bytes that each rank needs in all."""
    places: dict[tuple[int, int], Place] = {}
    total_bytes = []
    for target, sources in enumerate(in_edges):
        edges = [(source, target) for source in sources if (source, target) in chosen]
        found, total = lay_out([nbytes] * len(edges))
        places.update(zip(edges, found, strict=True))
        total_bytes.append(total)
    return places, total_bytes
