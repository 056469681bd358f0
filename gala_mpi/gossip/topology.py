"""Who sends to whom, and with what weight: directed graphs over the ranks.

A topology is a pure function of its name, the number of ranks, their placement on nodes and the update, so
every rank knows the whole graph without a message. Mixing weights are row-stochastic: a rank's own weight and
those of its in-neighbours are positive and sum to 1. All kinds but a user's own edge list are doubly stochastic
(what a rank gives away sums to 1 too), so that mixing keeps the mean of all ranks.

    ring                  r -> r + 1
    bidirectional-ring    r -> r - 1 and r + 1
    exponential           r -> r + 2^k for every 2^k < N
    one-peer-exponential  r -> r + 2^(u mod p) at update u, with p = ceil(log2 N): one message an update
    hypercube             r -> r with one bit changed; N is a power of two
    torus                 the four neighbours on the most nearly square grid of N ranks, row by row. Edges that
                          coincide on a side of two are one; on a grid of one row it is a bidirectional ring
    star                  every rank <-> rank 0, the hub
    complete              everyone -> everyone
    hierarchical          complete inside a node, and one or two rings over the nodes; see `_hierarchical`

A name that is none of these and is the path of a file is read as an edge list (`edge_list`).

Sources: one-peer exponential graphs, Assran et al. 2019 (Stochastic Gradient Push, arXiv:1811.10792) and Ying et
al. 2021 (arXiv:2110.13363); weights of undirected graphs, Xiao, Boyd and Kim 2007 (Distributed average consensus
with least-mean-square deviation), the Metropolis-Hastings rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gala_mpi.config import ConfigError, at_home, reaching
from gala_mpi.gossip.edge_list import InWeights, read_edge_list

InEdges = Iterable[Iterable[int]]
ONE_PEER = "one-peer-exponential"
HIERARCHICAL = "hierarchical"
# Share of a rank's weight that the rings over the nodes get. Of 1/(1+k), 1/4, 1/2, 2/3 and 3/4, 1/2 gives the
# largest spectral gap, or nearly, for 2 to 16 nodes of 4 to 16 ranks.
BETWEEN_NODES = 0.5


@dataclass(frozen=True)
class Topology:
    """A directed graph over `size` ranks. Every method is local.

    `in_edges[r]` lists the ranks whose messages rank r mixes, over all updates and in ascending order: the order
    of the mailboxes in r's window. `in_weights[r]` are their weights, in the same order.

    In a `rotating` topology a rank sends to one peer at each update, and hears from one. It does not wait for all
    its in-neighbours: it mixes those messages that have come, each with the weight 1 / (1 + how many).
    """

    name: str
    size: int
    in_edges: tuple[tuple[int, ...], ...]
    in_weights: tuple[tuple[float, ...], ...]
    rotating: bool = False

    def in_neighbours(self, rank: int) -> tuple[int, ...]:
        """Ranks that send to `rank`, at whatever update, ascending."""
        return self.in_edges[rank]

    def out_neighbours(self, rank: int) -> tuple[int, ...]:
        """Ranks that `rank` sends to, at whatever update, ascending."""
        return self._out_edges[rank]

    def targets(self, rank: int, update: int) -> tuple[int, ...]:
        """Ranks that `rank` sends to at this update (the first is 1); repeats after `period` updates."""
        if self.rotating and self.size > 1:
            return ((rank + (1 << update % self.period)) % self.size,)
        return self._out_edges[rank]

    def weights(self, rank: int) -> tuple[float, tuple[float, ...]]:
        """Mixing weights of `rank`: its own, and one for each in-neighbour, of sum 1.

        Of a rotating topology they are those of the mix of one phase, in which one of the in-neighbours sends:
        1/2 of its own, and 1/2 for whichever in-neighbour it is.
        """
        theirs = self.in_weights[rank]
        return 1 - (theirs[0] if self.rotating and theirs else math.fsum(theirs)), theirs

    @property
    def period(self) -> int:
        """Updates after which the targets repeat: 1 for a graph that stays the same."""
        return max(1, (self.size - 1).bit_length()) if self.rotating else 1

    def mixing_matrix(self, update: int = 1) -> np.ndarray:
        """W with x <- W x at this update if every message arrives at once: (N, N) float64, row-stochastic."""
        matrix = np.zeros((self.size, self.size))
        for rank, sources in enumerate(self.in_edges):
            own, weights = self.weights(rank)
            if self.rotating:
                now = [rank in self.targets(source, update) for source in sources]
                matrix[rank, list(sources)] = np.where(now, weights, 0.0)
            else:
                matrix[rank, list(sources)] = weights
            matrix[rank, rank] = own
        return matrix

    @cached_property
    def _out_edges(self) -> tuple[tuple[int, ...], ...]:
        out: list[list[int]] = [[] for _ in range(self.size)]
        for target, sources in enumerate(self.in_edges):
            for source in sources:
                out[source].append(target)
        return tuple(map(tuple, out))


def _circulant(size: int, steps: Iterable[int]) -> InEdges:
    """r -> r + step for each of the steps."""
    steps = tuple(steps)
    return ({(rank - step) % size for step in steps} - {rank} for rank in range(size))


def _exponential(size: int) -> InEdges:
    return _circulant(size, (1 << bit for bit in range((size - 1).bit_length())))


def _complete(size: int) -> InEdges:
    ranks = tuple(range(size))
    return (ranks[:rank] + ranks[rank + 1 :] for rank in ranks)


def _hypercube(size: int) -> InEdges:
    if size & (size - 1):
        raise ConfigError("topology", "hypercube", f"a number of ranks that is a power of two, not {size}")
    return ({rank ^ (1 << bit) for bit in range(size.bit_length() - 1)} for rank in range(size))


def _torus(size: int) -> InEdges:
    rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)
    columns = size // rows
    for rank in range(size):
        row, column = divmod(rank, columns)
        vertical = {(row + step) % rows * columns + column for step in (-1, 1)}
        horizontal = {row * columns + (column + step) % columns for step in (-1, 1)}
        yield (vertical | horizontal) - {rank}


def _star(size: int) -> InEdges:
    return (range(1, size) if rank == 0 else (0,) for rank in range(size))


TOPOLOGIES: dict[str, Callable[[int], InEdges]] = {
    "ring": lambda size: _circulant(size, (1,)),
    "bidirectional-ring": lambda size: _circulant(size, (-1, 1)),
    "exponential": _exponential,
    ONE_PEER: _exponential,
    "hypercube": _hypercube,
    "torus": _torus,
    "star": _star,
    "complete": _complete,
    # On one node; several have a builder of their own, which looks at the placement.
    HIERARCHICAL: _complete,
}


def make_topology(name: str, size: int, nodes: Sequence[str] | None = None) -> Topology:
    """The topology `name` over `size` ranks: a kind, or the path of an edge list. Local.

    `nodes[r]` names the node that rank r runs on; `hierarchical` alone looks at it, and without it takes all
    ranks to be on one node. Raises ConfigError for a name that is not known, a size that the topology cannot
    serve, or an edge list that cannot be used.
    """
    if nodes is not None and len(nodes) != size:
        raise ValueError(f"{len(nodes)} nodes for {size} ranks: expected the node of every rank")
    if name == HIERARCHICAL and nodes is not None and len(set(nodes)) > 1:
        return _weighted(name, size, _hierarchical(nodes))
    if name in TOPOLOGIES:
        in_edges = tuple(tuple(sorted(sources)) for sources in TOPOLOGIES[name](size))
        rotating = name == ONE_PEER
        in_weights = tuple((0.5,) * len(sources) for sources in in_edges) if rotating else _metropolis(in_edges)
        return Topology(name, size, in_edges, in_weights, rotating)
    path = at_home("topology", Path(name))
    with reaching("topology", name):
        is_file = path.is_file()
    if is_file:
        return _weighted(name, size, read_edge_list(path, size))
    raise ConfigError(
        "topology", name, f"one of {', '.join(TOPOLOGIES)}, or the path of an edge list (there is no such file)"
    )


def _metropolis(in_edges: tuple[tuple[int, ...], ...]) -> tuple[tuple[float, ...], ...]:
    """1 / (1 + the larger degree of the two ends): doubly stochastic for every undirected graph.

    Also for a directed one in which each rank has as many in- as out-neighbours as any other: all are then equal.
    """
    shared = [1 / (1 + degree) for degree in range(len(in_edges))]
    degrees = [len(sources) for sources in in_edges]
    return tuple(
        tuple(shared[max(degree, degrees[source])] for source in sources)
        for degree, sources in zip(degrees, in_edges, strict=True)
    )


def _weighted(name: str, size: int, in_weights: InWeights) -> Topology:
    edges = [sorted(weights.items()) for weights in in_weights]
    return Topology(
        name,
        size,
        tuple(tuple(source for source, _ in pairs) for pairs in edges),
        tuple(tuple(weight for _, weight in pairs) for pairs in edges),
    )


def _hierarchical(nodes: Sequence[str]) -> InWeights:
    """Dense inside a node, where a message is a copy in memory; sparse between nodes, where it costs a network.

    Inside a node of k ranks everyone mixes with everyone. Up to four nodes are joined in a directed ring; more in
    two, of steps 1 and round(sqrt(nodes)). A node thus sends and receives one message an update, or two,
    whatever its number of ranks and of nodes. Of 8 to 32 nodes of 4 or 8 ranks, the two rings have a larger
    spectral gap (32 x 8 ranks: 0.021) than one ring (0.003) and than an exponential graph over the nodes
    (0.018), whose traffic grows with their number.

    The first rank of each node carries the first ring, the second rank the second, both ends of it: so no rank
    waits for two messages of the network, and only the carriers need a thread that makes progress there.

    W = (1 - b) J + b / m (P_1 + ... + P_m), where J averages inside the nodes and P_j moves the parameters of
    ring j's carriers one step on, and leaves all others where they are. A mean of doubly stochastic matrices,
    it is doubly stochastic, even if the nodes differ in size.
    """
    members: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    groups = list(members.values())
    steps = (1,) if len(groups) <= 4 else (1, round(math.sqrt(len(groups))))
    in_weights: list[dict[int, float]] = [{} for _ in nodes]
    for group in groups:
        for rank in group:
            in_weights[rank] = {mate: (1 - BETWEEN_NODES) / len(group) for mate in group if mate != rank}
    for ring, step in enumerate(steps):
        carriers = [group[ring % len(group)] for group in groups]
        for place, rank in enumerate(carriers):
            in_weights[rank][carriers[place - step]] = BETWEEN_NODES / len(steps)
    return tuple(in_weights)
