"""Who sends to whom, and with what weight: directed graphs over the ranks.

A topology is a pure function of its name, the number of ranks and the update, so every rank knows the whole
graph without a message. Mixing weights are row-stochastic: a rank's own weight and those of its
in-neighbours sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gala_mpi.config import ConfigError


@dataclass(frozen=True)
class Topology:
    """A directed graph over `size` ranks.

    `in_edges[r]` lists the ranks whose messages rank r mixes, in ascending order: the order of the mailboxes
    in r's window.
    """

    name: str
    size: int
    in_edges: tuple[tuple[int, ...], ...]

    def in_neighbours(self, rank: int) -> tuple[int, ...]:
        """Ranks that send to `rank`, ascending."""
        return self.in_edges[rank]

    def out_neighbours(self, rank: int) -> tuple[int, ...]:
        """Ranks that `rank` sends to, ascending."""
        return tuple(target for target in range(self.size) if rank in self.in_edges[target])

    def weights(self, rank: int) -> tuple[float, tuple[float, ...]]:
        """Mixing weights of `rank`: its own, and one for each in-neighbour; all equal, of sum 1."""
        degree = len(self.in_edges[rank])
        return 1 / (1 + degree), (1 / (1 + degree),) * degree


def _ring(size: int) -> list[set[int]]:
    return [{(rank - 1) % size} - {rank} for rank in range(size)]


def _complete(size: int) -> list[set[int]]:
    return [set(range(size)) - {rank} for rank in range(size)]


def _hypercube(size: int) -> list[set[int]]:
    if size & (size - 1):
        raise ConfigError("topology", "hypercube", f"a number of ranks that is a power of two, not {size}")
    return [{rank ^ (1 << bit) for bit in range(size.bit_length() - 1)} for rank in range(size)]


TOPOLOGIES: dict[str, Callable[[int], list[set[int]]]] = {
    "ring": _ring,
    "complete": _complete,
    "hypercube": _hypercube,
}


def make_topology(name: str, size: int) -> Topology:
    """The topology `name` over `size` ranks.

    Raises ConfigError for a name that is not known, or a size that the topology cannot serve.
    """
    if name not in TOPOLOGIES:
        raise ConfigError("topology", name, f"one of {', '.join(TOPOLOGIES)}")
    return Topology(name, size, tuple(tuple(sorted(edges)) for edges in TOPOLOGIES[name](size)))
