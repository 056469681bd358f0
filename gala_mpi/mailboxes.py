"""All mailboxes over a directed graph of ranks, with the window that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gala_mpi.courier import Courier
from gala_mpi.mailbox import Inbox, lay_out
from gala_mpi.window import Window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


class Mailboxes:
    """One mailbox of `nbytes` for each edge of the graph. Making and freeing it are collective.

    `in_edges[r]` lists the ranks that send to rank r. `inboxes` has this rank's receiving end for each of its
    in-neighbours, in their order; `outboxes` its sending end for each of its out-neighbours, ascending.
    """

    def __init__(self, comm: Intracomm, courier: Courier, in_edges: Sequence[Sequence[int]], nbytes: int) -> None:
        places, total_bytes = zip(*(lay_out([nbytes] * len(sources)) for sources in in_edges), strict=True)
        self._window = window = Window(comm, max(total_bytes[comm.rank], 1), polled=courier.needed)
        self.inboxes = {
            source: Inbox(window, place) for source, place in zip(in_edges[comm.rank], places[comm.rank], strict=True)
        }
        self.outboxes = {
            target: courier.outbox(window, target, places[target][sources.index(comm.rank)])
            for target, sources in enumerate(in_edges)
            if comm.rank in sources
        }
        # An inbox sets its control word: no sender may be there before.
        comm.Barrier()

    def free(self) -> None:
        """Free the window. Collective; views of messages must be gone."""
        self._window.free()
