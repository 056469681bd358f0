"""Who sends to whom, and with what weight: directed graphs over the ranks.

A topology is a pure function of its name, the number of ranks, their placement on nodes and the update, so every rank
knows what it needs without a message. It asks for itself alone: no rank holds the whole graph. Mixing weights are
row-stochastic: a rank's own weight and those of the messages that it mixes are positive and sum to 1. All kinds but a
user's own edge list are doubly stochastic (what a rank gives away sums to 1 too), so that mixing keeps the mean of all
ranks, if every message arrives at once.

A topology has a period. Update u is in round (u - 1) mod period, which fixes targets and weights. A graph that stays
the same has one round.

    ring                  r -> r + 1
    bidirectional-ring    r -> r - 1 and r + 1
    exponential           r -> r + 2^k for every 2^k < N
    one-peer-exponential  r -> r + 2^k, with k = 0, 1, ... in turn: one message an update
    base-2                at most one peer an update; after one period the exact mean, for every N; `base_graph`
    base-3                the same, of at most two peers
    base-4                the same, of at most three peers
    hypercube             r -> r with one bit changed; N is a power of two
    torus                 the four neighbours on the most nearly square grid of N ranks, row by row. Edges that
                          coincide on a side of two are one; on a grid of one row it is a bidirectional ring
    star                  every rank <-> rank 0, the hub
    complete              everyone -> everyone
    hierarchical          one-peer exponential inside a node, and over the nodes; `hierarchy`
    auto                  one of the others, by the number of ranks and their placement; `chosen`

A name that is none of these and is the path of a file is read as an edge list (`edge_list`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gala_mpi.config import ConfigError, at_home, reaching
from gala_mpi.gossip.base_graph import base_graph
from gala_mpi.gossip.edge_list import Edge, edges_by_update, read_edge_list
from gala_mpi.gossip.hierarchy import hierarchical
from gala_mpi.gossip.rules import (
    Rule,
    Weights,
    circulant,
    exponential,
    hypercube,
    one_peer_exponential,
    star,
    table,
    torus,
)

AUTO, HIERARCHICAL, ONE_PEER, RING = "auto", "hierarchical", "one-peer-exponential", "ring"
PLACED = (AUTO, HIERARCHICAL)
"""Topologies that depend on the placement of ranks on nodes."""
# In lockstep a ring of 8 ranks is worth 88 % of them, of 12 it is 75 % (effective neighbours at gamma = 0.99).
RING_SERVES = 8
# The effective neighbours of rings, however long they are, at gamma 0.99; of a star there are fewer the larger it is.
RING_GAINS = {"ring": 11, "bidirectional-ring": 18}
RING_WARNING_FROM = 16

TOPOLOGIES: dict[str, Callable[[int], Rule]] = {
    RING: lambda size: circulant(size, [[1]]),
    "bidirectional-ring": lambda size: circulant(size, [[-1, 1]]),
    "exponential": exponential,
    ONE_PEER: one_peer_exponential,
    "base-2": lambda size: base_graph(size, 2),
    "base-3": lambda size: base_graph(size, 3),
    "base-4": lambda size: base_graph(size, 4),
    "hypercube": hypercube,
    "torus": torus,
    "star": star,
    "complete": lambda size: circulant(size, [range(1, size)]),
    # Where nothing is known of nodes: all ranks are on one.
    HIERARCHICAL: one_peer_exponential,
    AUTO: lambda size: TOPOLOGIES[chosen(size)](size),
}


@dataclass(frozen=True)
class Topology:
    """A directed graph over `size` ranks. Every method is local, and takes time and memory of the rank's degree.

    `mark` tells apart what differs by more than name and size: the placement, or a file's edges.
    """

    name: str
    size: int
    rule: Rule
    mark: str = ""

    @property
    def period(self) -> int:
        """Updates after which targets and weights repeat: 1 for a graph that stays the same."""
        return self.rule.period

    @property
    def rotating(self) -> bool:
        """Whether they change from update to update: a rank then expects no message of most in-neighbours."""
        return self.period > 1

    def rounds(self, rank: int) -> list[Weights]:
        """For each round of the period the messages that `rank` mixes in it: source -> weight."""
        return [self.rule.sources(rank, turn) for turn in range(self.period)]

    def in_neighbours(self, rank: int) -> tuple[int, ...]:
        """Ranks that send to `rank`, at whatever update, ascending: the order of the mailboxes in its window."""
        return tuple(sorted({source for sources in self.rounds(rank) for source in sources}))

    def out_neighbours(self, rank: int) -> tuple[int, ...]:
        """Ranks that `rank` sends to, at whatever update, ascending."""
        turns = range(self.period)
        return tuple(sorted({target for turn in turns for target in self.rule.targets(rank, turn)}))

    def targets(self, rank: int, update: int) -> tuple[int, ...]:
        """Ranks that `rank` sends to at this update (the first is 1), ascending; there may be none."""
        return tuple(sorted(self.rule.targets(rank, self.turn(update))))

    def weights(self, rank: int, update: int = 1) -> tuple[float, tuple[float, ...]]:
        """Mixing weights of `rank` at this update: its own, and one for each in-neighbour, of sum 1.

        That of an in-neighbour which does not send to it at this update is 0.
        """
        now = self.rule.sources(rank, self.turn(update))
        theirs = tuple(now.get(source, 0.0) for source in self.in_neighbours(rank))
        return 1 - math.fsum(theirs), theirs

    def turn(self, update: int) -> int:
        """The round that an update is in."""
        return (update - 1) % self.period

    def mixing_matrix(self, update: int = 1) -> np.ndarray:
        """W with x <- W x at this update if every message arrives at once: (N, N) float64, row-stochastic.

        As large as all pairs of ranks.
        """
        matrix = np.zeros((self.size, self.size))
        for rank in range(self.size):
            sources = self.rule.sources(rank, self.turn(update))
            matrix[rank, list(sources)] = list(sources.values())
            matrix[rank, rank] = 1 - math.fsum(sources.values())
        return matrix

    @cached_property
    def in_edges(self) -> tuple[tuple[int, ...], ...]:
        """In-neighbours of every rank: the whole graph, as large as that is."""
        return tuple(self.in_neighbours(rank) for rank in range(self.size))

    @property
    def digest(self) -> str:
        """The same on all ranks if their graphs are."""
        return _digest(f"{self.name} {self.size} {self.mark}")


def mixing_weights(rounds: Sequence[Mapping[int, float]], heard: Sequence[tuple[int, int]]) -> list[float]:
    """The weights of messages that a mix finds, each of (source, its update); the rank's own parameters keep the rest.

    `rounds` are those of the rank, from `Topology.rounds`. Messages of one round have the weights of that round. If
    ranks are out of step, a mix may find messages of several rounds. A round whose messages weigh t alone then counts
    as t / (1 - t) against 1 for the rank's own parameters: m messages of one-peer rounds have 1 / (1 + m) each.
    """
    if len(rounds) == 1:
        return [rounds[0][source] for source, _ in heard]
    turns = [_turn_of(rounds, source, update) for source, update in heard]
    totals: dict[int, float] = {}
    for turn, (source, _) in zip(turns, heard, strict=True):
        totals[turn] = totals.get(turn, 0.0) + rounds[turn][source]
    if len(totals) <= 1:
        return [rounds[turn][source] for turn, (source, _) in zip(turns, heard, strict=True)]
    own = 1 / (1 + sum(total / (1 - total) for total in totals.values()))
    return [own * rounds[turn][source] / (1 - totals[turn]) for turn, (source, _) in zip(turns, heard, strict=True)]


def _turn_of(rounds: Sequence[Mapping[int, float]], source: int, update: int) -> int:
    """The round of a message. A rank's last goes to all its out-neighbours: then the first in which it sends here."""
    turn = (update - 1) % len(rounds)
    return turn if source in rounds[turn] else next(turn for turn, now in enumerate(rounds) if source in now)


def chosen(size: int, nodes: Sequence[str] | None = None) -> str:
    """What `auto` stands for with so many ranks, of which rank r runs on `nodes[r]`.

    A ring as long as it serves. Then one message an update for each rank, and between nodes one for each node.
    """
    if size <= RING_SERVES:
        return RING
    occupied = len(set(nodes or [""]))
    return HIERARCHICAL if 1 < occupied < size else ONE_PEER


def called(asked: str, topology: Topology) -> str:
    """The name of what was asked for as `asked`, which it tells too where that is another one."""
    return topology.name if asked == topology.name else f"{topology.name} ({asked})"


def warning_of(topology: Topology) -> str | None:
    """What speaks against this topology at its size, if anything does."""
    gains = RING_GAINS.get(topology.name)
    if gains is None or topology.size < RING_WARNING_FROM * gains / RING_GAINS[RING]:
        return None
    return (
        f"a {topology.name.replace('-', ' ')} of {topology.size} ranks mixes slowly: however long it is, a rank gains "
        f"from about {gains} of them (the topology {AUTO} goes by the number of ranks)"
    )


def make_topology(name: str, size: int, nodes: Sequence[str] | None = None) -> Topology:
    """The topology `name` over `size` ranks: a kind, or the path of an edge list. Local.

    `nodes[r]` names the node that rank r runs on; `hierarchical` and `auto` alone look at it, and without it take all
    ranks to be on one node. `auto` gives the topology that it stands for, under that one's name. Raises ConfigError for
    a name that is not known, a size that the topology cannot serve, or an edge list that cannot be used.
    """
    if nodes is not None and len(nodes) != size:
        raise ValueError(f"{len(nodes)} nodes for {size} ranks: expected the node of every rank")
    if name == AUTO:
        name = chosen(size, nodes)
    if name == HIERARCHICAL and nodes is not None:
        numbers = {node: str(number) for number, node in enumerate(dict.fromkeys(nodes))}
        return Topology(name, size, hierarchical(nodes), _digest(" ".join(numbers[node] for node in nodes)))
    if name in TOPOLOGIES:
        return Topology(name, size, TOPOLOGIES[name](size), _digest(" ".join(["0"] * size)))
    path = at_home("topology", Path(name))
    with reaching("topology", name):
        is_file = path.is_file()
    if is_file:
        return with_edges(name, read_edge_list(path, size))
    raise ConfigError(
        "topology", name, f"one of {', '.join(TOPOLOGIES)}, or the path of an edge list (there is no such file)"
    )


def with_edges(name: str, in_weights: Sequence[Weights]) -> Topology:
    """A graph of which all edges are known, as a file has them: `in_weights[target][source]`. Local."""
    return Topology(name, len(in_weights), table([in_weights]), _digest(repr(in_weights)))


def make_changing_topology(edges: Callable[[int], Iterable[Edge]], size: int, period: int) -> Topology:
    """A topology over `size` ranks that is `edges(update)` at each update from 1 to `period`, and then again. Local.

    `edges` gives (source, target), or (source, target, weight) for each edge, as a line of an edge list does; a rank
    may send to nobody at an update. It must be the same function on all ranks. As every rank has a mailbox for each
    that ever sends to it, `edges` is called here, for all updates; a rank holds all edges of a period. A neighbour is
    lost once it was silent for the timeout of the exchange, and for more than four periods.

    Raises ValueError for a size or period below 1, and ConfigError for edges that cannot be used: over a period they
    must be strongly connected, and at each update be there once, with weights into a rank that sum to less than 1.
    """
    if size < 1 or period < 1:
        raise ValueError(f"a topology of {size} ranks and {period} updates: expected 1 or more of both")
    rounds = edges_by_update(edges, size, period)
    return Topology("changing", size, table(rounds), _digest(repr(rounds)))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()
