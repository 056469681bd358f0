"""Rules: graphs told for one rank and one round at a time, in time and memory of that rank's degree. All is local.

A rule has `period` rounds, which follow each other for ever. In each it says whose messages a rank mixes and with what
weight (the rank's own parameters keep the rest, which is above 0), and to whom the rank sends. A graph that stays the
same has one round. All rules here are doubly stochastic in each round: what a rank gives away sums to 1 too.

Source of the weights of undirected graphs: Xiao, Boyd and Kim 2007 (Distributed average consensus with
least-mean-square deviation), the Metropolis-Hastings rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gala_mpi.config import ConfigError

Weights: TypeAlias = dict[int, float]
"""Of the messages of a round: source -> weight."""


@dataclass(frozen=True)
class Rule:
    """`sources(rank, turn)` and `targets(rank, turn)` for the rounds `turn` from 0 to period - 1.

    A `circulant` rule looks the same from every rank: if r sends to r + d, so does every other.
    """

    sources: Callable[[int, int], Weights]
    targets: Callable[[int, int], Collection[int]]
    period: int = 1
    circulant: bool = False


def rounds_to_double(size: int) -> int:
    """Rounds in which news that doubles its hearers comes from one of `size` members to all: ceil(log2 size)."""
    return (size - 1).bit_length()


def circulant(size: int, rounds: Sequence[Iterable[int]]) -> Rule:
    """In each round r -> r + step for each of its steps, all with the same weight."""
    steps = [sorted({step % size for step in steps} - {0}) for steps in rounds] or [[]]
    return Rule(
        lambda rank, turn: {(rank - step) % size: 1 / (1 + len(steps[turn])) for step in steps[turn]},
        lambda rank, turn: [(rank + step) % size for step in steps[turn]],
        len(steps),
        circulant=True,
    )


def exponential(size: int) -> Rule:
    """R -> r + 2^k for every 2^k < size, all in one round."""
    return circulant(size, [[1 << bit for bit in range(rounds_to_double(size))]])


def one_peer_exponential(size: int) -> Rule:
    """R -> r + 2^k for every 2^k < size, a round each.

    Source: Assran et al. 2019 (Stochastic Gradient Push, arXiv:1811.10792), Ying et al. 2021 (arXiv:2110.13363).
    """
    return circulant(size, [[1 << bit] for bit in range(rounds_to_double(size))])


def undirected(neighbours: Callable[[int], Collection[int]]) -> Rule:
    """Everyone with its neighbours, both ways: the weight of an edge is 1 / (1 + the larger degree of its ends)."""

    def sources(rank: int, _turn: int) -> Weights:
        mine = neighbours(rank)
        return {other: 1 / (1 + max(len(mine), len(neighbours(other)))) for other in mine}

    return Rule(sources, lambda rank, _turn: neighbours(rank))


def hypercube(size: int) -> Rule:
    """R <-> r with one bit changed. Raises ConfigError if `size` is no power of two."""
    if size & (size - 1):
        raise ConfigError("topology", "hypercube", f"a number of ranks that is a power of two, not {size}")
    return undirected(lambda rank: [rank ^ (1 << bit) for bit in range(size.bit_length() - 1)])


def torus(size: int) -> Rule:
    """The four neighbours on the most nearly square grid, row by row."""
    rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)
    columns = size // rows

    def neighbours(rank: int) -> set[int]:
        row, column = divmod(rank, columns)
        vertical = {(row + step) % rows * columns + column for step in (-1, 1)}
        horizontal = {row * columns + (column + step) % columns for step in (-1, 1)}
        return (vertical | horizontal) - {rank}

    return undirected(neighbours)


def star(size: int) -> Rule:
    """Every rank <-> rank 0."""
    return undirected(lambda rank: range(1, size) if rank == 0 else range(1))


def table(rounds: Sequence[Sequence[Weights]]) -> Rule:
    """Graphs of which all edges are known, a round each: `rounds[turn][target][source]`. As large as they are."""
    out: list[list[list[int]]] = [[[] for _ in now] for now in rounds]
    for targets, now in zip(out, rounds, strict=True):
        for target, sources in enumerate(now):
            for source in sources:
                targets[source].append(target)
    return Rule(lambda rank, turn: rounds[turn][rank], lambda rank, turn: out[turn][rank], len(rounds))
