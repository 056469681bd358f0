"""What is measured between ranks: the path and the speed to every out-neighbour, and the clocks of the nodes.

Links are measured in rounds. In a round no node takes part in two links, or they would share its cores, its
memory bus and its network card; ranks of other links sleep, and only look now and then whether the round is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from gala_mpi.doctor.findings import Finding
from gala_mpi.doctor.peers import Peers
from gala_mpi.units import in_units

if TYPE_CHECKING:
    from gala_mpi.mpi.window import Window

# In the window: a control word, and on the next page the payload.
WORD_AT, PAYLOAD_AT = 0, 4096
# The network of the published method, in float32: 1.68 M parameters.
PAYLOAD_BYTES = 6_720_000
REPEATS = 5
MEASURE_FOR_S = 0.5
ATOMICS = 200
SILENCE_S = 0.5
LONGEST_SILENCE_S = 2.0
# By then the target has its order, and has left MPI.
SETTLE_S = 0.1
# A round takes about that long on a fast path.
ROUND_S = 0.8
PINGS = 20
ORDER, CLOCK = 101, 102

Edge = tuple[int, int]


@dataclass(frozen=True)
class Link:
    """A measured link. `silent_s`: Put and Flush begun while the target stays out of MPI for another `silence_s`."""

    origin: int
    target: int
    put_s: float = 0.0
    atomic_s: float = 0.0
    silent_s: float = 0.0
    silence_s: float = 0.0
    failure: str = ""

    @property
    def put_mb_per_s(self) -> float:
        """Speed of Put and Flush to a target that is inside MPI."""
        return PAYLOAD_BYTES / self.put_s / 1e6

    @property
    def needs_progress(self) -> bool:
        """Whether a Put completes only when the target enters MPI."""
        return self.silent_s > self.silence_s / 2


def rounds_of(edges: Iterable[Edge], nodes: Sequence[str]) -> list[list[Edge]]:
    """The edges in rounds, each of which has at most one edge at any node."""
    rounds: list[tuple[list[Edge], set[str]]] = []
    first_free: dict[str, int] = {}
    for edge in edges:
        ends = {nodes[edge[0]], nodes[edge[1]]}
        # No round before this one is free at either end.
        index = max(first_free.get(node, 0) for node in ends)
        while index < len(rounds) and rounds[index][1] & ends:
            index += 1
        if index == len(rounds):
            rounds.append(([], set()))
        rounds[index][0].append(edge)
        rounds[index][1].update(ends)
        for node in ends:
            at = first_free.get(node, 0)
            while at < len(rounds) and node in rounds[at][1]:
                at += 1
            first_free[node] = at
    return [edges for edges, _ in rounds]


@dataclass(frozen=True)
class Measured:
    """What a rank measured. `complete`: all ranks came through; `windows`: why there are none; None: not known."""

    links: list[Link]
    complete: bool
    windows: str | None


def no_room(findings: Iterable[Finding]) -> str:
    """Why the windows to measure links cannot be made, by the findings on /dev/shm; empty if they can.

    Touching a page of a window for which there is no room ends the process.
    """
    for finding in findings:
        if finding.check == "memory.shm" and finding.values:
            need = 1.1 * (PAYLOAD_AT + PAYLOAD_BYTES) * len(finding.ranks)
            if need > finding.values.get("free_bytes", 0):
                return f"/dev/shm has no room for the {in_units(need)} that this takes"
    return ""


def measure(peers: Peers, rounds: Sequence[Sequence[Edge]], threaded: bool) -> Measured:
    """The links that begin at this rank, round after round. Collective.

    Without threads in MPI a link that does not answer can be ended by the watch only.
    """
    # Not at the top: what is pure here can be had without MPI.
    from gala_mpi.mpi.window import Window

    rank = peers.comm.rank
    links: list[Link] = []
    peers.watch.doing = "making the window to measure links"
    if not peers.meet(peers.watch.patience_s()):
        return Measured(links, False, None)
    try:
        window = Window(peers.comm, PAYLOAD_AT + (PAYLOAD_BYTES if rounds else 0))
    except RuntimeError as error:
        return Measured(links, True, str(error))
    for number, edges in enumerate(rounds):
        said = ", ".join(f"{origin} -> {target}" for origin, target in edges[:3])
        peers.watch.doing = f"measuring the links {said} (round {number + 1} of {len(rounds)})"
        patience_s = peers.watch.patience_s()
        for origin, target in edges:
            if rank == origin:
                links.append(_probe(peers, window, target, patience_s, threaded))
            elif rank == target:
                _serve(peers, origin, patience_s)
        if any(link.failure for link in links) or not peers.meet(patience_s):
            return Measured(links, False, "")
    window.free()
    return Measured(links, True, "")


def _serve(peers: Peers, origin: int, patience_s: float) -> None:
    """Be the target: stay inside MPI, except for the seconds that the origin asks for."""
    while True:
        came, silence_s = peers.receive(origin, ORDER, patience_s, spin=True)
        if not came or silence_s is None:
            return
        time.sleep(silence_s)


def _probe(peers: Peers, window: Window, target: int, patience_s: float, threaded: bool) -> Link:
    """Be the origin, in a thread of its own that may be given up."""
    origin = peers.comm.rank
    results: list[Link] = []
    failures: list[str] = []

    def run() -> None:
        try:
            results.append(_timings(peers, window, target))
        except RuntimeError as error:
            failures.append(str(error).splitlines()[0])

    if threaded:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(patience_s)
    else:
        run()
    if results:
        return results[0]
    failure = failures[0] if failures else f"no answer within {patience_s:.3g} s"
    return Link(origin, target, failure=failure)


def _timings(peers: Peers, window: Window, target: int) -> Link:
    payload = np.ones(PAYLOAD_BYTES, np.uint8)

    def put() -> float:
        begin = time.perf_counter()
        window.put(payload, target, PAYLOAD_AT)
        window.flush(target)
        return time.perf_counter() - begin

    def atomic() -> float:
        begin = time.perf_counter()
        window.load(target, WORD_AT)
        return time.perf_counter() - begin

    # The first one pays for pages and connections, and waits for the target to come.
    put()
    put_s = min(_repeat(put, REPEATS))
    atomic_s = median(_repeat(atomic, ATOMICS))
    silence_s = min(max(SILENCE_S, 4 * put_s), LONGEST_SILENCE_S)
    peers.send(silence_s + SETTLE_S, target, ORDER)
    time.sleep(SETTLE_S)
    silent_s = put()
    peers.send(None, target, ORDER)
    return Link(peers.comm.rank, target, put_s, atomic_s, silent_s, silence_s)


def _repeat(timed: Callable[[], float], times: int) -> list[float]:
    """Up to `times` timings, fewer if they take long."""
    end, found = time.monotonic() + MEASURE_FOR_S, [timed()]
    while len(found) < times and time.monotonic() < end:
        found.append(timed())
    return found


def clock_offset(peers: Peers, other: int) -> tuple[float, float] | None:
    """Seconds by which the clock of rank `other` is ahead of rank 0's, and the error bound; None: no answer.

    The shortest of some round trips bounds the error by half of it (Cristian, Probabilistic clock
    synchronization, 1989). For rank 0, while the other is in `answer_clock`.
    """
    trips = []
    for _ in range(PINGS):
        begin = time.time()
        peers.send(True, other, CLOCK)
        came, remote = peers.receive(other, CLOCK, peers.watch.patience_s(), spin=True)
        if not came:
            return None
        trips.append((begin, remote, time.time()))
    peers.send(False, other, CLOCK)
    return offset_of(trips)


def answer_clock(peers: Peers) -> None:
    """Tell rank 0 the time, until it has asked often enough."""
    while True:
        came, go_on = peers.receive(0, CLOCK, peers.watch.left_s(), spin=False)
        if not came or not go_on:
            return
        peers.send(time.time(), 0, CLOCK)


def offset_of(trips: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Offset and error bound from (sent, the other's time, received), by the shortest trip."""
    begin, remote, end = min(trips, key=lambda trip: trip[2] - trip[0])
    return remote - (begin + end) / 2, (end - begin) / 2
