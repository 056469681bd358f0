"""What the roster costs and how fast it spreads news, by the number of ranks.

    python benchmarks/roster.py --out benchmarks/results/roster.json

All ranks are pretended, 64 on each node, within one process. Windows and mailboxes are plain memory, with the same
atomics, copies and checksums as real ones; a fence is an atomic swap. So what is timed is the local part, all that a
rank does itself. Before each call all of a block of 32 MB is changed, as an update leaves nothing of the roster in the
caches, its code neither: without that the times are less than half of these.

    quiet     nothing is new
    ordinary  all ranks of the node have written, and an heir has left newer rows of all ranks of other nodes
    leader    all ranks of the node have written, a message has newer rows of all others, and one is sent

News is simulated on a clock of its own: the leaders of all nodes come by once an update, each at its own phase. The age
of a row is that of what a leader knows of some rank. A flag is raised by one rank, and told until every leader has it.

Traffic is computed: the bytes of a node's messages in a round. Beside it stands what the parameters take on a ring, of
all topologies the one with the least between nodes: one message of a node for each update.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gala_mpi import _native
from gala_mpi.gossip import roster as module
from gala_mpi.gossip.mailbox import HEADER
from gala_mpi.gossip.news import ROW_BYTES, ROW_WORDS, Heirs, heirs_among, round_s
from gala_mpi.gossip.roster import Roster, roster_bytes
from gala_mpi.gossip.shared_rows import BEAT, FLAGS, shared_bytes

PER_NODE = 64
TIMEOUT_S = 60.0
SIZES = (16, 64, 256, 1_024, 4_096)
REPEATS = 400
WARM_UP_S, AGES_OVER_S = 60.0, 10.0
# Pong by the preset gala-atari: trained parameters, and the update of a rank on one core (benchmarks/held_up.py).
PARAMETERS = 866_439
UPDATE_S = 0.0704
STOP = 2


class Memory:
    """A node's shared window: the part of each of its ranks, as one of them sees it."""

    def __init__(self, parts: list[np.ndarray], rank: int) -> None:
        self._parts, self.rank = parts, rank
        self._word = np.zeros(8, np.uint8)

    def shared_memory(self, target: int, offset: int, nbytes: int) -> np.ndarray:
        return self._parts[target][offset : offset + nbytes]

    def load(self, target: int, offset: int) -> int:
        return _native.load(self._parts[target][offset : offset + 8])

    def swap(self, target: int, offset: int, value: int) -> int:
        return _native.swap(self._parts[target][offset : offset + 8], value)

    def sync(self) -> None:
        _native.swap(self._word, 0)


class Inbox:
    """The newest message, checked as a real one."""

    def __init__(self) -> None:
        self.payload: np.ndarray | None = None

    def take(self) -> SimpleNamespace | None:
        payload, self.payload = self.payload, None
        if payload is None:
            return None
        _native.checksum(payload)
        return SimpleNamespace(payload=payload)


class Outbox:
    """Copies and seals what is posted; into an inbox, if it has one."""

    def __init__(self, inbox: Inbox | None) -> None:
        self._inbox = inbox
        self._copy = np.zeros(0, np.uint8)

    def post(self, payload: np.ndarray, **_: Any) -> None:
        payload = payload.reshape(-1).view(np.uint8)
        if self._inbox is not None:
            self._inbox.payload = payload.copy()
            return
        if len(self._copy) != len(payload):
            self._copy = np.zeros(len(payload), np.uint8)
        self._copy[:] = payload
        _native.checksum(self._copy)


class Cluster:
    """Pretended nodes, of which some ranks have a roster."""

    def __init__(self, size: int) -> None:
        self.size, self.here = size, min(PER_NODE, size)
        self.leaders = [rank - rank % PER_NODE for rank in range(size)]
        heirs = heirs_among(self.here)
        self.parts = {
            leader: [np.zeros(shared_bytes(k, self.here, size, heirs), np.uint8) for k in range(self.here)]
            for leader in sorted(set(self.leaders))
        }
        self.inboxes: dict[tuple[int, int], Inbox] = {}

    def local_rows(self, leader: int) -> np.ndarray:
        """The rows of a node's own ranks."""
        return self.parts[leader][0][: ROW_BYTES * self.here].view(np.int64).reshape(-1, ROW_WORDS)

    def roster(self, rank: int, *, delivers: bool) -> Roster:
        """The roster of a rank; what it posts goes to other ranks if it `delivers`, else nowhere."""
        leader = self.leaders[rank]
        node = SimpleNamespace(rank=rank - leader, Free=lambda: None)
        comm: Any = SimpleNamespace(rank=rank, size=self.size, Split=lambda *_: node)

        def mailboxes(_: Any, __: Any, graph: Heirs, ___: int) -> SimpleNamespace:
            targets, sources = graph.out_neighbours(rank), graph.in_neighbours(rank)
            inboxes = {source: self.inboxes.setdefault((source, rank), Inbox()) for source in sources}
            ends = {t: self.inboxes.setdefault((rank, t), Inbox()) if delivers else None for t in targets}
            return SimpleNamespace(inboxes=inboxes, outboxes={target: Outbox(end) for target, end in ends.items()})

        module.Window = lambda *_, **__: Memory(self.parts[leader], rank - leader)  # type: ignore[assignment, misc]
        module.ask_for_room = lambda *_: None
        module.Mailboxes = mailboxes  # type: ignore[assignment, misc]
        return Roster(comm, SimpleNamespace(leaders=self.leaders), TIMEOUT_S)  # type: ignore[arg-type]


def times_us(roster: Roster, prepare: Any) -> dict[str, float]:
    """Of `come_by`, each after `prepare`."""
    found, block = [], np.zeros(4_000_000)
    for _ in range(REPEATS):
        prepare()
        block += 1
        begin = time.perf_counter()
        roster.come_by()
        found.append(1e6 * (time.perf_counter() - begin))
    found.sort()
    return {"median": round(statistics.median(found), 1), "90 of 100": round(found[int(0.9 * REPEATS)], 1)}


def time_come_by(size: int) -> dict[str, dict[str, float]]:
    """The time of `come_by` of each kind of rank, in us."""
    cluster = Cluster(size)
    several = size > PER_NODE
    leader, heir, ordinary = (cluster.roster(rank, delivers=False) for rank in (0, heirs_among(cluster.here)[1], 1))
    local, others = cluster.local_rows(0), np.arange(size) >= PER_NODE
    newest = np.zeros((size, ROW_WORDS), np.int64)

    def all_write() -> None:
        local[2:, BEAT] += 1

    def all_is_new_to_an_ordinary_rank() -> None:
        all_write()
        if several:
            heir.rows[others, BEAT] += 1
            heir._shared.leave(heir.rows)

    def all_is_new_to_the_leader() -> None:
        all_write()
        if several:
            newest[others, BEAT] += 1
            inbox = cluster.inboxes[(int(np.argmax(others)), 0)]
            inbox.payload = newest.copy().reshape(-1).view(np.uint8)
            # As where updates are no longer than a round.
            leader._sent_at_s = time.monotonic() - leader._round_s

    return {
        "quiet": times_us(ordinary, lambda: None),
        "ordinary": times_us(ordinary, all_is_new_to_an_ordinary_rank),
        "leader": times_us(leader, all_is_new_to_the_leader),
    }


def spread(size: int) -> dict[str, float]:
    """How old what leaders know is, and how long a flag is on its way to all of them, in seconds."""
    random, clock, real = np.random.default_rng(1), SimpleNamespace(now_s=1_000.0), module.time
    module.time = SimpleNamespace(monotonic=lambda: clock.now_s, time=lambda: clock.now_s)  # type: ignore[assignment]
    cluster = Cluster(size)
    rosters = [cluster.roster(leader, delivers=True) for leader in cluster.parts]
    due_s = clock.now_s + UPDATE_S * random.random(len(rosters))
    ages, raised_at_s, told_s = [], clock.now_s + WARM_UP_S + AGES_OVER_S, []
    while len(told_s) < len(rosters):
        place = int(np.argmin(due_s))
        clock.now_s = float(due_s[place])
        due_s[place] += UPDATE_S * random.uniform(0.9, 1.1)
        roster, local = rosters[place], cluster.local_rows(place * PER_NODE)
        # The other ranks of the node write at the same time.
        local[1:, BEAT] += 1
        local[1:, 2] = roster.mine[2] = int(1e6 * clock.now_s)
        if clock.now_s >= raised_at_s and place == 0:
            local[-1, FLAGS] |= STOP
        knew = bool(roster.rows[:, FLAGS].any())
        roster.come_by()
        if raised_at_s - AGES_OVER_S < clock.now_s < raised_at_s:
            ages.append(clock.now_s - roster.rows[:, 2] / 1e6)
        if roster.rows[:, FLAGS].any() and not knew:
            told_s.append(clock.now_s - raised_at_s)
    module.time = real
    found = np.concatenate(ages)
    return {
        "mean_age_s": round(float(found.mean()), 2),
        "oldest_s": round(float(found.max()), 2),
        "flag_to_all_s": round(max(told_s), 2),
    }


def traffic(size: int) -> dict[str, float]:
    """Computed: bytes a second that a node sends, beside those of the parameters on a ring; memory of an heir."""
    nodes = -(-size // PER_NODE)
    steps = [1 << bit for bit in range((nodes - 1).bit_length())]
    neighbours = len({step % nodes for step in steps} | {-step % nodes for step in steps})
    every_s = round_s(size, neighbours, TIMEOUT_S)
    roster_per_s = (size * ROW_BYTES + HEADER.itemsize) / every_s if nodes > 1 else 0.0
    parameters_per_s = (4 * PARAMETERS + HEADER.itemsize) / UPDATE_S
    return {
        "neighbours": neighbours,
        "round_s": round(every_s, 3),
        "bytes_per_s": round(roster_per_s),
        "parameters_bytes_per_s": round(parameters_per_s),
        "share_percent": round(100 * roster_per_s / parameters_per_s, 2),
        "heirs_window_bytes": roster_bytes(0, [rank - rank % PER_NODE for rank in range(size)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "command": "python benchmarks/roster.py",
        "machine": f"{platform.machine()}, shared with other work",
        "ranks_per_node": PER_NODE,
        "sizes": {},
    }
    for size in SIZES:
        of_size: dict[str, Any] = {"come_by_us": time_come_by(size), "traffic": traffic(size)}
        if size > PER_NODE:
            of_size["news"] = spread(size)
        found["sizes"][size] = of_size
        print(size, json.dumps(of_size), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
