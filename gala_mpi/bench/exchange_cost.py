"""Times an exchange, its parts, and what is compared with them, in turn on the same buffers (names: `costs`).

Two modes. `one`: one rank is at work, and the others sleep, but for a look into MPI every 0.5 ms: without it no
message would move over a network that needs its target's help. `all`: every rank does the same at the same time, from
a barrier on, as in training; a round's cost is the mean over the ranks, so it holds the contention for memory and
cores, and for an all-reduce the wait for each other. An all-reduce has no other mode.

What makes the figures comparable: the cases take turns, forwards and backwards alternately, and the first round is
not counted. Before each the parameters are written anew, as the optimiser would, and the case runs once without the
clock (what empties a mailbox cannot). memcpy writes by turns to two slots, as `post` does while nothing is taken. In
the mode `one` that leaves one difference: lines of the target's slot may be in the cache of another core.

On a busy machine everything takes longer, but not alike: MPICH yields the core once in every flush and atomic, so
twice in a post, and Open MPI never does. Where others wait for the core, a yield costs a turn of theirs, which
memcpy does not pay. So the share of calls that lost their core is shown too: figures with many are of the load.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from gala_mpi import _native
from gala_mpi.bench.costs import (
    ALL,
    ALLREDUCE,
    AVERAGE,
    DELIVERY,
    EXCHANGE,
    GLOO,
    MEMCPY,
    MIX,
    ONE,
    PACK,
    POST,
    TAKE,
    Costs,
    Timing,
    over_ranks,
)
from gala_mpi.bench.gloo import Gloo
from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.gossip import Gossip
from gala_mpi.gossip.mailbox import Message, lay_out
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.mpi.window import Window

if TYPE_CHECKING:
    from gala_mpi.doctor.peers import Watch
    from gala_mpi.gossip.topology import Topology

REST_S = 0.0005
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """What is timed: `call`, after `warm`. `filled`: every mailbox holds a message before."""

    name: str
    warm: Callable[[], object]
    call: Callable[[], object]
    filled: bool = False
    modes: tuple[str, ...] = (ONE, ALL)


class Measurement:
    """The measurement of one size over one topology. Making, running and freeing it are collective."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        parameters: int,
        *,
        wire: str,
        topology: Topology,
        delivery: str,
        gloo: Gloo | None,
        watch: Watch,
    ) -> None:
        self._comm, self._wire, self._gloo, self._watch = comm, wire, gloo, watch
        self._start = np.random.default_rng(np.random.SeedSequence([0, comm.rank])).random(parameters, np.float32)
        self._flat = FlatParameters(nn.ParameterList([nn.Parameter(torch.zeros(parameters))]))
        self._courier = Courier(comm, delivery)
        self._gossip = Gossip(self._flat, comm, topology, wire=wire, delivery=self._courier)
        self._state = self._flat.host()
        nbytes = parameters * _native.WIRE_ITEMSIZE[wire]
        self._payload = self._state.view(np.uint8) if wire == "float32" else np.empty(nbytes, np.uint8)
        (place,), total_bytes = lay_out([self._state.nbytes])
        self._window = Window(comm, total_bytes)
        self._slots = [self._window.memory(slot, self._state.nbytes) for slot in place.slots[:2]]
        for slot in self._slots:
            slot[:] = self._start.view(np.uint8)
        self._message: Message | None = None
        background = [rank for rank, ways in enumerate(self._ways()) if "background" in ways]
        # The rank at work in the mode `one`: where a courier carries, one of those that have it carry.
        self._worker = background[0] if background else 0
        carried = [target for target, way in self._gossip.ways.items() if way == "background"]
        self._targets, self._carries = carried or list(self._gossip.outboxes), bool(carried)
        self._cases = self._make_cases(bool(background))
        self._steps = 0
        self._restore()
        if wire != "float32":
            self._pack()

    def run(self, repeats: int, seconds: float) -> Costs | None:
        """Up to `repeats` rounds, fewer if they take over `seconds`, but three; None on ranks other than 0."""
        turns = [(case, mode) for case in self._cases for mode in case.modes]
        mine: dict[tuple[str, str], list[Timing]] = {(case.name, mode): [] for case, mode in turns}
        end = time.monotonic() + seconds
        # The first round pays for pages and connections.
        for number in range(repeats + 1):
            if not self._comm.bcast(number <= LEAST_ROUNDS or time.monotonic() < end):
                break
            for case, mode in turns:
                self._watch.doing = f"measuring {case.name} of {len(self._state):,} parameters"
                timing = self._time(case, mode)
                if timing is not None and number:
                    mine[case.name, mode].append(timing)
            turns.reverse()
        return self._collect(mine)

    def free(self) -> None:
        """Free what is held."""
        self._message, self._slots = None, []
        self._courier.free()
        self._gossip.free()
        self._window.free()

    def _ways(self) -> list[tuple[str, ...]]:
        return self._comm.allgather(tuple(self._gossip.ways.values()))

    def _make_cases(self, background: bool) -> list[Case]:
        copy, average = self._twice(self._copy), self._twice(self._average)
        cases = [Case(MEMCPY, copy, self._copy), Case(AVERAGE, average, self._average)]
        if self._wire != "float32":
            cases.append(Case(PACK, self._twice(self._pack), self._pack))
        if self._comm.size == 1:
            return cases
        cases.append(Case(POST, self._twice(self._post), self._post))
        cases.append(Case(TAKE, self._restore, self._take, filled=True))
        cases.append(Case(MIX, self._twice(self._mix, self._take), self._mix, filled=True))
        cases.append(Case(EXCHANGE, self._restore, self._exchange, filled=True))
        if background:
            cases.append(Case(DELIVERY, self._twice(self._post), self._deliver))
        cases.append(Case(ALLREDUCE, self._restore, self._allreduce, modes=(ALL,)))
        if self._gloo is not None:
            cases.append(Case(GLOO, self._restore, self._gloo_all_reduce, modes=(ALL,)))
        return cases

    def _twice(self, call: Callable[[], object], before: Callable[[], object] | None = None) -> Callable[[], object]:
        """What warms a case that can run twice."""

        def warm() -> None:
            if before is not None:
                before()
            self._restore()
            call()

        return warm

    def _time(self, case: Case, mode: str) -> Timing | None:
        """One round of a case; None on a rank that is not timed. Collective."""
        if case.filled:
            self._gossip.post_and_mix(self._state, list(self._gossip.outboxes))
            self._drain()
        self._meet()
        timing = None
        if mode == ALL or self._comm.rank == self._worker:
            case.warm()
            self._drain()
            if mode == ALL:
                self._comm.Barrier()
            preempted = _preemptions()
            cpu, begin = time.process_time(), time.perf_counter()
            case.call()
            wall_s = time.perf_counter() - begin
            preempted = _preemptions() - preempted
            self._drain()
            if mode == ALL:
                # Until what comes from others has arrived too.
                self._meet()
            if case.name != DELIVERY or self._carries:
                timing = Timing(wall_s, time.process_time() - cpu, preempted)
        if mode == ONE:
            self._meet()
        return timing

    def _restore(self) -> None:
        np.copyto(self._state, self._start)

    def _copy(self) -> None:
        self._slots.reverse()
        np.copyto(self._slots[0][: self._payload.nbytes], self._payload)

    def _average(self) -> None:
        _native.average(self._state, self._slots[0])

    def _pack(self) -> None:
        _native.pack([self._state], self._payload, self._wire)

    def _post(self) -> None:
        self._gossip.post_and_mix(self._state, self._targets[:1])

    def _take(self) -> None:
        self._message = self._gossip.in_neighbours[0].inbox.take()

    def _mix(self) -> None:
        assert self._message is not None
        _native.mix(self._state, 0.5, [self._message.payload], [0.5], self._wire)

    def _exchange(self) -> None:
        self._steps += 1
        self._gossip.step()

    def _deliver(self) -> None:
        self._post()
        self._courier.drain(self._watch.left_s())

    def _allreduce(self) -> None:
        self._comm.Allreduce(MPI.IN_PLACE, self._state)

    def _gloo_all_reduce(self) -> None:
        assert self._gloo is not None
        self._gloo.all_reduce(self._flat.data)

    def _drain(self) -> None:
        self._rest_until(lambda: self._courier.drain(0))

    def _meet(self) -> None:
        self._rest_until(self._comm.Ibarrier().Test)

    def _rest_until(self, done: Callable[[], bool]) -> None:
        """Wait for others with sleeps alone: even a yield would take the core from a rank that is timed."""
        # Later than the watch, whose word is the better one.
        end = time.monotonic() + self._watch.left_s() + 60
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"no answer while {self._watch.doing}")
            time.sleep(REST_S)

    def _collect(self, mine: dict[tuple[str, str], list[Timing]]) -> Costs | None:
        found = self._comm.gather((mine, self._steps * len(self._gossip.in_neighbours), self._gossip.counters))
        ways = self._ways()
        if found is None:
            return None
        expected = sum(messages for _, messages, _ in found)
        return Costs(
            len(self._state),
            self._payload.nbytes,
            tuple(ways),
            sum(counters.messages_mixed for _, _, counters in found) / expected if expected else None,
            {key: over_ranks([timings[key] for timings, _, _ in found if timings[key]]) for key in mine},
        )


def _preemptions() -> int:
    """Switches away from this thread that it did not ask for by waiting; those of sched_yield are among them."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
