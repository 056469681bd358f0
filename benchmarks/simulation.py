"""Discrete-event simulation of many ranks: what gossip and all-reduce make of measured update times.

Each rank has a core of its own, and draws the time of an update, without its exchange, from what was measured. What it
does then is what gala-mpi does (see `gala_mpi.gossip.gossip` and `gala_mpi.gossip.background`). Under gossip it
averages if an in-neighbour has left a message, posts, and goes on; a post that finds the link busy replaces the one
that waits. Under all-reduce all ranks wait for the slowest at every update, and then for the network.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UPDATE, ARRIVAL = 0, 1


@dataclass(frozen=True)
class Network:
    """Links of a rank, one for each direction, that it shares with nobody."""

    latency_s: float
    bytes_per_s: float

    def message_s(self, nbytes: int) -> float:
        """Until the next may follow a message: its bytes, and the answer to it (see `background`)."""
        return nbytes / self.bytes_per_s + 2 * self.latency_s

    def allreduce_s(self, ranks: int, nbytes: int) -> float:
        """Recursive halving and doubling (Thakur, Rabenseifner and Gropp, 2005), without the additions."""
        if ranks == 1:
            return 0.0
        return 2 * math.ceil(math.log2(ranks)) * self.latency_s + 2 * (ranks - 1) / ranks * nbytes / self.bytes_per_s


@dataclass(frozen=True)
class Straggling:
    """How ranks are held up: the last one works `factor` times as long; any pauses, at a share of its updates."""

    factor: float = 1.0
    pause_s: float = 0.0
    pause_share: float = 0.0

    def draw(self, measured_s: np.ndarray, ranks: int, updates: int, rng: np.random.Generator) -> np.ndarray:
        """Times of updates (updates, ranks): measured ones, drawn again, with what holds ranks up."""
        times = rng.choice(measured_s, (updates, ranks))
        times[:, -1] *= self.factor
        if self.pause_share > 0:
            paused = rng.random(times.shape) < self.pause_share
            times[paused] += rng.exponential(self.pause_s, int(paused.sum()))
        return times


@dataclass(frozen=True)
class Outcome:
    """Updates a second of each rank (ranks,), the share of updates that mixed, and the updates since the last mix."""

    updates_per_s: np.ndarray
    mixed_share: float
    staleness_mean: float
    staleness_most: int


def gossip(
    times_s: np.ndarray,
    exchange_s: float,
    message_s: float,
    in_neighbours: Sequence[Sequence[int]],
) -> Outcome:
    """Ranks that never wait. `times_s` (updates, ranks) are used up in order; the first rank without one left ends it.

    `exchange_s` is what an exchange takes of the processor, `message_s` how long a message is on its way.
    """
    updates, ranks = times_s.shape
    out: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for target, sources in enumerate(in_neighbours):
        for place, source in enumerate(sources):
            out[source].append((target, place))
    fresh = [[False] * len(sources) for sources in in_neighbours]
    busy, waiting = [[False] * len(links) for links in out], [[False] * len(links) for links in out]
    done, since = [0] * ranks, [0] * ranks
    mixed = stale_sum = stale_most = total = 0
    events = [(float(times_s[0, rank]), UPDATE, rank, 0) for rank in range(ranks)]
    heapq.heapify(events)
    now = 0.0
    while True:
        now, kind, rank, link = heapq.heappop(events)
        if kind == ARRIVAL:
            target, place = out[rank][link]
            fresh[target][place] = True
            busy[rank][link] = waiting[rank][link]
            if waiting[rank][link]:
                waiting[rank][link] = False
                heapq.heappush(events, (now + message_s, ARRIVAL, rank, link))
            continue
        total += 1
        done[rank] += 1
        if any(fresh[rank]):
            fresh[rank] = [False] * len(fresh[rank])
            mixed += 1
            since[rank] = 0
        else:
            since[rank] += 1
        stale_sum += since[rank]
        stale_most = max(stale_most, since[rank])
        for number in range(len(out[rank])):
            if busy[rank][number]:
                waiting[rank][number] = True
            else:
                busy[rank][number] = True
                heapq.heappush(events, (now + message_s, ARRIVAL, rank, number))
        if done[rank] == updates:
            return Outcome(np.array(done) / now, mixed / total, stale_sum / total, stale_most)
        heapq.heappush(events, (now + exchange_s + float(times_s[done[rank], rank]), UPDATE, rank, 0))


def allreduce(times_s: np.ndarray, allreduce_s: float) -> Outcome:
    """Ranks in step: each update takes the time of the slowest rank, and that of the all-reduce."""
    updates, ranks = times_s.shape
    total = float(times_s.max(axis=1).sum()) + updates * allreduce_s
    return Outcome(np.full(ranks, updates / total), 1.0, 0.0, 0)


def ring(ranks: int) -> list[list[int]]:
    """In-neighbours of a directed ring."""
    return [[(rank - 1) % ranks] if ranks > 1 else [] for rank in range(ranks)]
