"""A topology that all ranks have alike: an edge list is read by rank 0 alone, and told to the others.

The others may not see the file, or another one of that name. What rank 0 cannot use, all ranks refuse alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gala_mpi.gossip.topology import TOPOLOGIES, Topology, make_topology, with_edges
from gala_mpi.mpi.collective import alike_on_all_ranks

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def known_here(name: str, comm: Intracomm, nodes: Sequence[str] | None = None) -> Topology | None:
    """The topology `name` over the ranks of `comm`; None where rank 0 has to tell it. Raises ConfigError. Local."""
    return make_topology(name, comm.size, nodes) if name in TOPOLOGIES or comm.rank == 0 else None


def told_by_rank_0(name: str, known: Topology | None, comm: Intracomm) -> Topology:
    """The topology `name`, given what is `known_here` on each rank. Collective."""
    if name in TOPOLOGIES:
        assert known is not None, "every rank knows it"
        return known
    # As large as the file. Rules themselves are functions, which cannot be sent.
    edges = None if known is None else [dict(known.rule.sources(rank, 0)) for rank in range(known.size)]
    return with_edges(name, comm.bcast(edges))


def topology_on_all_ranks(name: str, comm: Intracomm, nodes: Sequence[str] | None = None) -> Topology:
    """The topology `name`, which is the same on all ranks of `comm`, over those ranks. Collective.

    `nodes[r]` names the node that rank r runs on. Raises DisagreementError (a UsageError), on all ranks, if there is
    none.
    """
    known: Topology | None = alike_on_all_ranks(comm, lambda: (known_here(name, comm, nodes), {}))
    return told_by_rank_0(name, known, comm)
