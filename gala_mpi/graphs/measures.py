"""What a topology costs and how fast it mixes, computed from the graph alone. Every function is local.

The spectral gap bounds how fast ranks agree when every message arrives at once: without gradients, the
distance to consensus shrinks by about the factor 1 - gap at each update.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gala_mpi.gossip.mixing import GAMMA, Round, effective_neighbours, spectra
from gala_mpi.gossip.topology import Topology

# Eigenvalues of 2048 ranks take 3 s on two cores, and eight times as long for twice as many.
DENSE_LIMIT = 2048


@dataclass(frozen=True)
class GraphMeasures:
    """Measures of one topology; degrees by rank, and counts of edges over all updates of a period."""

    name: str
    size: int
    nodes: int
    rotating: bool
    period: int
    in_degrees: tuple[int, ...]
    out_degrees: tuple[int, ...]
    edges: int
    edges_between_nodes: int
    messages_per_update: float
    """Messages that all ranks together send at an update, a mean over the period."""
    messages_between_nodes: float
    """Those among them that cross from node to node."""
    doubly_stochastic: bool
    spectral_gap: float | None
    """Per update; None where the matrix is too large, see `spectral_gap`."""
    gamma: float
    effective_neighbours: float
    """Ranks from whose samples a rank gains, see `gossip.mixing`."""
    diameter: int


def measure(topology: Topology, nodes: Sequence[str] | None = None, gamma: float = GAMMA) -> GraphMeasures:
    """All measures of a topology whose rank r runs on `nodes[r]`; without nodes, all ranks are on one."""
    places = np.unique(list(nodes or ["node"] * topology.size), return_inverse=True)[1]
    sources, targets = edges(topology)
    between = int(np.count_nonzero(places[sources] != places[targets]))
    in_degrees = np.bincount(targets, minlength=topology.size)
    sent, crossed = messages(topology, places)
    return GraphMeasures(
        topology.name,
        topology.size,
        int(places.max()) + 1,
        topology.rotating,
        topology.period,
        tuple(in_degrees.tolist()),
        tuple(np.bincount(sources, minlength=topology.size).tolist()),
        len(sources),
        between,
        sent,
        crossed,
        is_doubly_stochastic(topology),
        spectral_gap(topology),
        gamma,
        effective_neighbours(topology, gamma),
        diameter(topology),
    )


def messages(topology: Topology, places: np.ndarray) -> tuple[float, float]:
    """Messages an update, and those among them between nodes: means over a period. `places[r]` numbers r's node."""
    sent = crossed = 0
    for turn in range(topology.period):
        for rank in range(topology.size):
            sources = topology.rule.sources(rank, turn)
            sent += len(sources)
            crossed += sum(places[source] != places[rank] for source in sources)
    return sent / topology.period, crossed / topology.period


def edges(topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """Sources and targets of all edges: (E,) int64 each, by ascending target, then source."""
    degrees = [len(sources) for sources in topology.in_edges]
    sources = np.fromiter(itertools.chain.from_iterable(topology.in_edges), np.int64, sum(degrees))
    return sources, np.repeat(np.arange(topology.size), degrees)


def is_doubly_stochastic(topology: Topology) -> bool:
    """Whether each column of the mixing matrix sums to 1 too, at every update: then mixing keeps the mean."""
    for turn in range(topology.period):
        now = Round.of(topology, turn)
        if not np.allclose(np.bincount(now.columns, now.weights), 1):
            return False
    return True


def spectral_gap(topology: Topology) -> float | None:
    """1 - the second largest modulus of the mixing matrix's eigenvalues; 1 means consensus after one period.

    For a rotating topology, 1 - rho^(1/p), with rho that of the product of one period's p matrices: the gap per
    update. Circulant graphs go through the Fourier transform and symmetric products through a symmetric solver, at any
    size; so does one that is the mean. Others are None above DENSE_LIMIT ranks.
    """
    if topology.size == 1:
        return 1.0
    if topology.rule.circulant:
        # All circulant matrices have the same eigenvectors.
        moduli = spectra(topology).prod(axis=0)
    else:
        product = np.eye(topology.size)
        for turn in range(topology.period):
            product = Round.of(topology, turn).mix(product)
        if np.allclose(product, 1 / topology.size, rtol=0, atol=1e-12):
            return 1.0
        if np.array_equal(product, product.T):
            moduli = np.abs(np.linalg.eigvalsh(product))
        elif topology.size <= DENSE_LIMIT:
            moduli = np.abs(np.linalg.eigvals(product))
        else:
            return None
    second = np.sort(moduli)[-2]
    # A root would make much of a rounding error.
    return float(1 - second ** (1 / topology.period)) if second > 1e-12 else 1.0


def diameter(topology: Topology) -> int:
    """The largest number of edges that news must travel from one rank to another; the graph is connected.

    One bit for each pair of ranks: 0.05 s for 1024 ranks with 32 in-neighbours each, where networkx, which
    searches from every rank, takes 4.5 s.
    """
    size = topology.size
    sources, targets = edges(topology)
    degrees = np.bincount(targets, minlength=size)
    # The n-th in-neighbour of all the ranks that have one, for n = 0, 1, ...: each step is a few large operations.
    nth = np.arange(len(sources)) - np.repeat(np.cumsum(degrees) - degrees, degrees)
    order = np.argsort(nth, kind="stable")
    columns = np.split(order, np.cumsum(np.bincount(nth))[:-1]) if len(order) else []
    heard = np.packbits(np.eye(size, dtype=bool), axis=1)
    everyone = np.packbits(np.ones(size, dtype=bool))
    steps = 0
    while not np.array_equal(heard, np.broadcast_to(everyone, heard.shape)):
        before = heard.copy()
        for column in columns:
            heard[targets[column]] |= before[sources[column]]
        steps += 1
    return steps
