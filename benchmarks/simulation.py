"""Discrete-event simulation of many ranks: what gossip and all-reduce make of given update times.

A rank's update is a rest, for which it needs no core, and then work, for which it needs one: its own, or one of a few
that all ranks share, each in its turn. The work ends with what gala-mpi does after an update (see `gossip.gossip`,
`gossip.background`, `gossip.roster` and `train.checkpointer`, whose own rules are used here):

    exchange    the rank mixes the messages that have come, and posts its own to the ranks that the topology says
    board       it writes its row; leaders of nodes take news, and send all rows to a neighbouring node when it is due
    checkpoint  if it is its turn, it waits for the file system, which serves one rank after another

Inside a node a message is there at once. Between nodes it takes the network's time and some looks of couriers; a post
that finds the link busy replaces the one that waits. Couriers take a share of a core, pings included, so work takes
longer by that. Under all-reduce all ranks wait for the slowest at every update, and then for the network.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from gala_mpi.gossip.news import Heirs, round_s
from gala_mpi.gossip.topology import Topology
from gala_mpi.storage.turns import next_turn_s

# Events: a rest is over, work is done, a message has arrived, news has arrived.
RESTED, DONE, MESSAGE, NEWS = range(4)
# One of so many looks at the board is noted.
NOTED = 8


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
    """How ranks are held up: the last one takes `factor` times as long; any pauses, at a share of its updates."""

    factor: float = 1.0
    pause_s: float = 0.0
    pause_share: float = 0.0

    def one(self, time_s: float, last: bool, rng: np.random.Generator) -> float:
        """The time of one update, with what holds the rank up; `last` is the slow one."""
        paused = self.pause_share > 0 and rng.random() < self.pause_share
        return time_s * (self.factor if last else 1.0) + (rng.exponential(self.pause_s) if paused else 0.0)

    def draw(self, measured_s: np.ndarray, ranks: int, updates: int, rng: np.random.Generator) -> np.ndarray:
        """Times of updates (updates, ranks): measured ones, drawn again, with what holds ranks up."""
        times = rng.choice(measured_s, (updates, ranks))
        times[:, -1] *= self.factor
        if self.pause_share > 0:
            paused = rng.random(times.shape) < self.pause_share
            times[paused] += rng.exponential(self.pause_s, int(paused.sum()))
        return times


FREE = Straggling()


@dataclass(frozen=True)
class Checkpoints:
    """Each rank writes one every `every_s`, in its turn; it takes `alone_s` if no other rank writes.

    `together_s` of that the file system works, for one rank at a time.
    """

    every_s: float
    alone_s: float
    together_s: float


@dataclass(frozen=True)
class Cluster:
    """Ranks on nodes of `per_node`, over a topology. Times are seconds.

    exchange_s: what an exchange and the board take of a core. message_s, news_s: of a message between nodes, and of
    one of the board. courier_share: of a core, that the communication thread of each rank takes. cores: that all ranks
    share; None: each has its own. timeout_s: silence after which a rank is lost, by which rounds of news go.
    """

    topology: Topology
    per_node: int
    exchange_s: float = 0.0
    message_s: float = 0.0
    news_s: float = 0.0
    courier_share: float = 0.0
    cores: int | None = None
    checkpoints: Checkpoints | None = None
    timeout_s: float = 60.0

    @property
    def stretch(self) -> float:
        """How much longer work takes, as couriers work too. Raises ValueError if they leave nothing."""
        ranks = self.topology.size
        left = 1 - self.courier_share * (ranks / self.cores if self.cores else 1)
        if left <= 0:
            raise ValueError(f"couriers of {ranks} ranks take all of {self.cores or ranks} cores")
        return 1 / left


@dataclass(frozen=True)
class Outcome:
    """What became of it: means over all ranks, but for `updates_per_s` of each, (ranks,), and what is the most."""

    updates_per_s: np.ndarray
    mixed_share: float
    """Of the updates, those at which a message was mixed."""
    staleness_mean: float
    """Updates since the last mix."""
    staleness_most: int
    messages_mixed: float = 0.0
    """Of an update; so of those that follow."""
    messages_sent: float = 0.0
    news_mean_s: float = 0.0
    """Age of what a rank knows of another."""
    news_oldest_s: float = 0.0
    checkpoint_share: float = 0.0
    """Of a rank's time, that checkpoints take."""


@dataclass
class Link:
    """From one rank to another: whether a message is under way, and one waits."""

    target: int
    between_nodes: bool
    busy: bool = False
    waiting: bool = False


class Board:
    """Who knows what of whom: for each node the times at which rows were written, as its leader has them."""

    def __init__(self, cluster: Cluster) -> None:
        size = cluster.topology.size
        leaders = [rank - rank % cluster.per_node for rank in range(size)]
        heirs = Heirs(leaders)
        self._per_node = cluster.per_node
        self.written = np.zeros(size)
        self.known = {leader: np.zeros(size) for leader in dict.fromkeys(leaders)}
        self._neighbours = {leader: [there[0] for there in heirs.neighbours_of(leader)] for leader in self.known}
        self._next, self._sent_at_s = dict.fromkeys(self.known, 0), dict.fromkeys(self.known, 0.0)
        degree = max(len(theirs) for theirs in self._neighbours.values())
        self._round_s = round_s(size, degree, cluster.timeout_s)
        self._come: dict[int, list[np.ndarray]] = {leader: [] for leader in self.known}

    def come_by(self, rank: int, now_s: float) -> tuple[int, np.ndarray] | None:
        """Write a row; what a leader sends, if that is due, and to whom."""
        self.written[rank] = now_s
        if rank not in self.known:
            return None
        here, known = slice(rank, rank + self._per_node), self.known[rank]
        known[here] = self.written[here]
        for rows in self._come[rank]:
            np.maximum(known, rows, out=known)
        self._come[rank].clear()
        if not self._neighbours[rank] or now_s - self._sent_at_s[rank] < self._round_s:
            return None
        self._sent_at_s[rank] = now_s
        target = self._neighbours[rank][self._next[rank]]
        self._next[rank] = (self._next[rank] + 1) % len(self._neighbours[rank])
        return target, known.copy()

    def take(self, leader: int, rows: np.ndarray) -> None:
        """News comes to a node, and lies there until its leader comes by."""
        self._come[leader].append(rows)

    def ages(self, rank: int, now_s: float) -> tuple[float, float]:
        """Mean and greatest age of what a rank knows of others that it has heard of."""
        leader = rank - rank % self._per_node
        rows = self.known[leader].copy()
        here = slice(leader, leader + self._per_node)
        rows[here] = self.written[here]
        rows[rank] = 0.0
        found = now_s - rows[rows > 0]
        return (float(found.mean()), float(found.max())) if found.size else (0.0, 0.0)


@dataclass
class Counts:
    """Sums over all ranks, after the warm-up."""

    begun_s: float = 0.0
    updates: int = 0
    mixing: int = 0
    mixed: int = 0
    sent: int = 0
    stale: int = 0
    stale_most: int = 0
    checkpoint_s: float = 0.0
    ages: list[tuple[float, float]] = field(default_factory=list)


class Gossip:
    """Ranks that never wait for each other. Rests and work (updates, ranks) are used up in order.

    The first rank without any left ends it. What comes before `warm_up_s` is not counted.
    """

    def __init__(self, cluster: Cluster, rests_s: np.ndarray, works_s: np.ndarray, warm_up_s: float = 0.0) -> None:
        self._cluster, self._rests, self._works = cluster, rests_s, cluster.stretch * (works_s + cluster.exchange_s)
        self._warm_up_s, self._updates = warm_up_s, len(rests_s)
        topology, per_node = cluster.topology, cluster.per_node
        ranks = range(topology.size)
        self._targets = [[topology.targets(rank, turn + 1) for turn in range(topology.period)] for rank in ranks]
        self._links = [
            {t: Link(t, rank // per_node != t // per_node) for t in topology.out_neighbours(rank)} for rank in ranks
        ]
        self._fresh: list[set[int]] = [set() for _ in ranks]
        self._done, self._since, self._before = [0] * len(ranks), [0] * len(ranks), [0] * len(ranks)
        self._free = len(ranks) if cluster.cores is None else cluster.cores
        self._queue: deque[int] = deque()
        self._files_free_s = 0.0
        points = cluster.checkpoints
        self._due_s = [next_turn_s(0.0, points.every_s, rank / len(ranks)) if points else math.inf for rank in ranks]
        self._board = Board(cluster)
        self._counts = Counts()
        self._events: list[tuple[float, int, int, object]] = []
        self._number = 0

    def run(self) -> Outcome:
        """The whole of it."""
        for rank in range(len(self._done)):
            self._at(float(self._rests[0, rank]), RESTED, rank)
        while True:
            now, _, (kind, rank), about = heapq.heappop(self._events)  # type: ignore[misc]
            if kind == RESTED:
                self._queue.append(rank)
            elif kind == MESSAGE:
                self._arrive(rank, about, now)
            elif kind == NEWS:
                self._board.take(rank, about)
            elif self._end_update(rank, now):
                return self._outcome(now)
            while self._free and self._queue:
                self._free -= 1
                worker = self._queue.popleft()
                self._at(now + float(self._works[self._done[worker], worker]), DONE, worker)

    def _at(self, when_s: float, kind: int, rank: int, about: object = None) -> None:
        self._number += 1
        heapq.heappush(self._events, (when_s, self._number, (kind, rank), about))  # type: ignore[arg-type]

    def _end_update(self, rank: int, now: float) -> bool:
        """Exchange, come by, and rest again; whether the rank has no update left."""
        self._free += 1
        counts = self._counts
        if counts.begun_s < self._warm_up_s <= now:
            self._counts = counts = Counts(begun_s=now)
            self._before = self._done.copy()
        self._mix(rank)
        self._done[rank] += 1
        for target in self._targets[rank][(self._done[rank] - 1) % len(self._targets[rank])]:
            self._post(rank, self._links[rank][target], now)
        news = self._board.come_by(rank, now)
        if news is not None:
            self._at(now + self._cluster.news_s, NEWS, *news)
        if self._done[rank] % NOTED == 0:
            counts.ages.append(self._board.ages(rank, now))
        if self._done[rank] == self._updates:
            return True
        stalled_s = self._checkpoint_s(rank, now)
        counts.checkpoint_s += stalled_s
        self._at(now + stalled_s + float(self._rests[self._done[rank], rank]), RESTED, rank)
        return False

    def _mix(self, rank: int) -> None:
        counts, fresh = self._counts, self._fresh[rank]
        self._since[rank] = 0 if fresh else self._since[rank] + 1
        counts.updates += 1
        counts.mixing += bool(fresh)
        counts.mixed += len(fresh)
        counts.stale += self._since[rank]
        counts.stale_most = max(counts.stale_most, self._since[rank])
        fresh.clear()

    def _post(self, rank: int, link: Link, now: float) -> None:
        self._counts.sent += 1
        if not link.between_nodes:
            self._fresh[link.target].add(rank)
        elif link.busy:
            link.waiting = True
        else:
            link.busy = True
            self._at(now + self._cluster.message_s, MESSAGE, rank, link)

    def _arrive(self, rank: int, link: Link, now: float) -> None:
        self._fresh[link.target].add(rank)
        link.busy, link.waiting = link.waiting, False
        if link.busy:
            self._at(now + self._cluster.message_s, MESSAGE, rank, link)

    def _checkpoint_s(self, rank: int, now: float) -> float:
        """How long the rank's checkpoint takes, if it is its turn."""
        points = self._cluster.checkpoints
        if points is None or now < self._due_s[rank]:
            return 0.0
        begin = max(now, self._files_free_s)
        self._files_free_s = begin + points.together_s
        self._due_s[rank] = next_turn_s(now, points.every_s, rank / len(self._done))
        return begin - now + points.alone_s

    def _outcome(self, now: float) -> Outcome:
        counts = self._counts
        seconds, updates = now - counts.begun_s, max(counts.updates, 1)
        return Outcome(
            updates_per_s=(np.array(self._done) - np.array(self._before)) / seconds,
            mixed_share=counts.mixing / updates,
            staleness_mean=counts.stale / updates,
            staleness_most=counts.stale_most,
            messages_mixed=counts.mixed / updates,
            messages_sent=counts.sent / updates,
            news_mean_s=float(np.mean([mean for mean, _ in counts.ages])) if counts.ages else 0.0,
            news_oldest_s=max((oldest for _, oldest in counts.ages), default=0.0),
            checkpoint_share=counts.checkpoint_s / (seconds * len(self._done)),
        )


def gossip(cluster: Cluster, rests_s: np.ndarray, works_s: np.ndarray, warm_up_s: float = 0.0) -> Outcome:
    """See `Gossip`."""
    return Gossip(cluster, rests_s, works_s, warm_up_s).run()


def allreduce(times_s: np.ndarray, allreduce_s: float, checkpoints: Checkpoints | None = None) -> Outcome:
    """Ranks in step: each update takes the time of the slowest rank, and that of the all-reduce.

    Checkpoints are written by all ranks at once, and all wait for the last.
    """
    updates, ranks = times_s.shape
    total = float(times_s.max(axis=1).sum()) + updates * allreduce_s
    stalled = 0.0
    if checkpoints is not None:
        stalled = (checkpoints.alone_s + (ranks - 1) * checkpoints.together_s) / checkpoints.every_s
    return Outcome(
        np.full(ranks, updates / total / (1 + stalled)), 1.0, 0.0, 0, checkpoint_share=stalled / (1 + stalled)
    )
