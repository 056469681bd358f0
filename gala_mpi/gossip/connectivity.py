"""Whether those that are left of a topology are one graph, and the ring that makes them one. All is local."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from gala_mpi.gossip.topology import Topology


def ring_neighbours(topology: Topology, rank: int, gone: npt.NDArray[np.bool_]) -> tuple[int | None, int | None]:
    """The ranks before and after this one in the ring of those that are there, where the topology does not serve.

    None where it does: those that are there are strongly connected without it, or the edge is the topology's own.
    """
    here = np.flatnonzero(~gone)
    there = here[here != rank]
    if not len(there) or is_one_graph(topology, gone, rank):
        return None, None
    after = int(there[np.searchsorted(there, rank) % len(there)])
    before = int(there[np.searchsorted(there, rank) - 1])
    return (
        None if before in topology.in_neighbours(rank) else before,
        None if after in topology.out_neighbours(rank) else after,
    )


def is_one_graph(topology: Topology, gone: npt.NDArray[np.bool_], rank: int) -> bool:
    """Whether news goes from each rank that is there to each other, by others that are there. `rank` is one of them.

    Takes time of all their edges, but ends as soon as all are reached.
    """
    there = ~gone
    there[rank] = True
    return all(_reached(there, rank, ask) for ask in (topology.out_neighbours, topology.in_neighbours))


def _reached(there: npt.NDArray[np.bool_], rank: int, ask: Callable[[int], Sequence[int]]) -> bool:
    left = there.copy()
    left[rank] = False
    waiting, missing = [rank], int(left.sum())
    while waiting and missing:
        for other in ask(waiting.pop()):
            if left[other]:
                left[other] = False
                missing -= 1
                waiting.append(other)
    return not missing
