"""How well a topology mixes, if every message arrives at once: mixing of all ranks at once, and effective neighbours.

Effective neighbours n_W(gamma): ranks that take independent noise at each update, keep gamma of the variance of before
and mix, have the variance that n_W ranks would have who share everything. It tells by how many ranks' samples a rank
profits, and so how far the learning rate may rise. Source: Vogels, Hendrikx and Jaggi 2022 (Beyond spectral gap,
arXiv:2206.03093). All of this is local, and needs all edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gala_mpi.gossip.topology import Topology

GAMMA = 0.99
LARGEST_GAMMA = 0.9999
# Up to here the covariance of all ranks is computed, in a second; beyond, random directions are followed.
EXACT_RANKS = 512
DIRECTIONS = 128
SMALLEST_SHARE = 1e-7
# Values that a mix gathers at once.
GATHERED = 2**23

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Round:
    """The mixing matrix of one round, by its entries: row by row, each row's own among them."""

    columns: npt.NDArray[np.int64]
    weights: Values
    starts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, topology: Topology, turn: int) -> Round:
        """Ask the rule for every rank."""
        rows = []
        for rank in range(topology.size):
            sources = topology.rule.sources(rank, turn)
            rows.append({rank: 1 - math.fsum(sources.values()), **sources})
        starts = np.cumsum([0, *map(len, rows[:-1])])
        columns = np.fromiter((column for row in rows for column in row), np.int64)
        return cls(columns, np.fromiter((weight for row in rows for weight in row.values()), float), starts)

    def mix(self, values: Values) -> Values:
        """W x for values of all ranks (N, m)."""
        mixed = np.empty_like(values)
        step = max(1, GATHERED // len(self.columns))
        for first in range(0, values.shape[1], step):
            part = slice(first, first + step)
            mixed[:, part] = np.add.reduceat(self.weights[:, None] * values[:, part][self.columns], self.starts, axis=0)
        return mixed


def spectra(topology: Topology) -> Values:
    """Of a circulant topology the eigenvalues' moduli in each round, by frequency: (period, N)."""
    rows = np.zeros((topology.period, topology.size))
    for turn, row in enumerate(rows):
        sources = topology.rule.sources(0, turn)
        row[list(sources)] = list(sources.values())
        row[0] = 1 - math.fsum(sources.values())
    return np.abs(np.fft.fft(rows))


def effective_neighbours(topology: Topology, gamma: float = GAMMA) -> float:
    """n_W(gamma), from 1 to the number of ranks; a mean over ranks, and over the rounds of a period.

    Circulant graphs go through the Fourier transform. Others are exact up to EXACT_RANKS ranks, and estimated beyond,
    within about 3 %.
    """
    if topology.rule.circulant:
        excess = _of_spectra(spectra(topology), gamma)
    else:
        rounds = [Round.of(topology, turn) for turn in range(topology.period)]
        excess = (_of_covariance if topology.size <= EXACT_RANKS else _of_directions)(rounds, gamma)
    # All noise has a part that is common to all ranks, which is as if they shared everything, and one that is not.
    return topology.size / (1 + (1 - gamma) * excess)


def _of_spectra(moduli: Values, gamma: float) -> float:
    """The variance that is not common, summed over ranks, from the eigenvalues in each round; noise has variance 1."""
    kept, gained = np.ones(moduli.shape[1]), np.zeros(moduli.shape[1])
    for power in moduli**2:
        kept, gained = kept * gamma * power, (gained * gamma + 1) * power
    variance = gained / (1 - kept)
    total = 0.0
    for power in moduli**2:
        variance = (variance * gamma + 1) * power
        total += float(variance[1:].sum())
    return total / len(moduli)


def _of_covariance(rounds: list[Round], gamma: float) -> float:
    """The same from the covariance of all ranks, to which each update adds that of noise without its common part."""
    size = len(rounds[0].starts)
    noise = np.eye(size) - 1 / size

    def one_period(covariance: Values) -> tuple[Values, float]:
        total = 0.0
        for turn in rounds:
            covariance = turn.mix(turn.mix(gamma * covariance + noise).T)
            total += float(np.trace(covariance))
        return covariance, total / len(rounds)

    covariance, _ = one_period(np.zeros_like(noise))
    kept = np.eye(size)
    for turn in rounds:
        kept = math.sqrt(gamma) * turn.mix(kept)
    # The sum of kept^n covariance kept^n^T over all n: each turn doubles the number of terms.
    while np.abs(kept).max() > SMALLEST_SHARE:
        covariance = covariance + kept @ covariance @ kept.T
        kept = kept @ kept
    return one_period(covariance)[1]


def _of_directions(rounds: list[Round], gamma: float) -> float:
    """An estimate of the same: what is left, after each number of updates, of random directions of length sqrt(N)."""
    size = len(rounds[0].starts)
    number = math.ceil(DIRECTIONS / len(rounds))
    total = 0.0
    for begin in range(len(rounds)):
        values = np.random.default_rng(begin).choice([-1.0, 1.0], (size, number))
        values -= values.mean(axis=0)
        share, update, found = 1.0, begin, 0.0
        while True:
            values = rounds[update % len(rounds)].mix(values)
            left = share * float((values**2).sum()) / number
            found += left
            # All that follows is less than left / (1 - gamma).
            if left <= 1e-3 * (1 - gamma) * found:
                break
            share, update = share * gamma, update + 1
        total += found
    return total / len(rounds)
