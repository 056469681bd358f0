"""Asynchronous gossip: every rank posts its whole policy to its out-neighbours and averages what it finds.

One step posts the parameters, and mixes if every in-neighbour has left a message since the last mix:
x <- w0 x + sum of w_k m_k. Posting never waits; mixing waits only under a bound on staleness, and then with a
deadline (GALA: Assran et al. 2019, arXiv:1906.04585, algorithm 1).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gala_mpi import _native
from gala_mpi.mailbox import Delivery, Inbox, Message, Outbox, lay_out
from gala_mpi.parameters import FlatParameters
from gala_mpi.topology import Topology
from gala_mpi.waiting import wait_until
from gala_mpi.window import Window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

WIRES = ("float32", "bfloat16", "float16")
log = logging.getLogger(__name__)


@dataclass
class InNeighbour:
    """What this rank knows of one rank that sends to it."""

    rank: int
    weight: float
    inbox: Inbox
    heard_at_s: float | None = None
    update: int = 0
    staleness: int = 0
    message_age_s: float = math.nan
    distance: float = math.nan
    lost: bool = False
    finished: bool = False


@dataclass
class ExchangeCounters:
    """Sums since the start of the run, and the state after the last update."""

    messages_sent: int = 0
    messages_mixed: int = 0
    messages_dropped: int = 0
    messages_rejected: int = 0
    staleness: int = 0
    message_age_s: float = math.nan
    neighbour_distance: float = math.nan
    exchange_s: float = 0.0
    wait_s: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block to `exchange_s`."""
        begin = time.perf_counter()
        yield
        self.exchange_s += time.perf_counter() - begin


class Gossip:
    """Gossip of the flat parameters over a topology. Making and freeing it are collective; a step is local.

    All ranks start from the parameters of rank 0.
    """

    synchronous = False

    def __init__(
        self,
        flat: FlatParameters,
        comm: Intracomm,
        topology: Topology,
        *,
        wire: str = "float32",
        max_staleness: int | None = None,
        neighbour_timeout_s: float = 60.0,
    ) -> None:
        self._flat, self._wire = flat, WIRES.index(wire)
        self._max_staleness, self._timeout_s = max_staleness, neighbour_timeout_s
        self.counters = ExchangeCounters()
        share_parameters(flat, comm)
        nbytes = flat.size * _native.WIRE_ITEMSIZE[wire]
        self._staging = None if wire == "float32" else np.empty(nbytes, np.uint8)
        places = [lay_out([nbytes] * len(sources)) for sources in topology.in_edges]
        own_places, total_bytes = places[comm.rank]
        self._window = Window(comm, total_bytes)
        _, weights = topology.weights(comm.rank)
        self.in_neighbours = [
            InNeighbour(rank, weight, Inbox(self._window, place))
            for rank, weight, place in zip(topology.in_neighbours(comm.rank), weights, own_places, strict=True)
        ]
        # Inline: on one node a Put from the live parameters is one copy at the speed of memory.
        self._deliveries: list[Delivery] = [
            Outbox(self._window, target, places[target][0][topology.in_neighbours(target).index(comm.rank)])
            for target in topology.out_neighbours(comm.rank)
        ]
        comm.Barrier()

    def average_gradient(self, grad: object) -> None:
        """Gossip leaves gradients alone."""

    def step(self, update: int, agent_steps: int) -> None:
        """Post the parameters, then mix if the messages are there (or the bound on staleness says to wait)."""
        with self.counters.timed():
            self._post(update, agent_steps)
            found, missing = self._look()
            if missing and self._too_stale():
                begin = time.perf_counter()
                # Ends: a neighbour that stays silent becomes lost, and a lost one is not missing.
                wait_until(lambda: self._look()[1] == 0, 2 * self._timeout_s)
                self.counters.wait_s += time.perf_counter() - begin
                found, missing = self._look()
            if found and not missing:
                self._mix()
            else:
                self._pass_over()

    def agree(self, stop: bool) -> bool:
        """Whether this rank ends: each decides for itself."""
        return stop

    def finish(self, update: int, agent_steps: int) -> None:
        """Tell the out-neighbours that no message will follow this last one."""
        self._post(update, agent_steps, last=True)

    def free(self) -> None:
        """Free the window. Collective."""
        self._window.free()

    def _post(self, update: int, agent_steps: int, *, last: bool = False) -> None:
        if not self._deliveries:
            return
        payload: np.ndarray = self._flat.host()
        if self._staging is not None:
            _native.pack([payload], self._staging, WIRES[self._wire])
            payload = self._staging
        for delivery in self._deliveries:
            delivery.post(
                payload, update=update, time_s=time.time(), agent_steps=agent_steps, wire=self._wire, last=last
            )
            self.counters.messages_sent += 1

    def _look(self) -> tuple[int, int]:
        """How many in-neighbours have left a message, and how many are expected to but have not."""
        now = time.monotonic()
        found = missing = 0
        for neighbour in self.in_neighbours:
            if neighbour.finished:
                continue
            if neighbour.heard_at_s is None:
                # Patience begins with the first look, not while ranks are still being set up.
                neighbour.heard_at_s = now
            if neighbour.inbox.fresh():
                found += 1
                neighbour.heard_at_s = now
                if neighbour.lost:
                    neighbour.lost = False
                    log.warning("rank %d is heard again and takes part in mixing", neighbour.rank)
            elif now - neighbour.heard_at_s <= self._timeout_s:
                missing += 1
            elif not neighbour.lost:
                neighbour.lost = True
                log.warning(
                    "nothing heard from rank %d for %g s: it counts as lost and is left out of mixing",
                    neighbour.rank,
                    self._timeout_s,
                )
        return found, missing

    def _too_stale(self) -> bool:
        return self._max_staleness is not None and self.counters.staleness >= self._max_staleness

    def _pass_over(self) -> None:
        if self.in_neighbours:
            self.counters.staleness += 1
        for neighbour in self.in_neighbours:
            neighbour.staleness += 1

    def _mix(self) -> None:
        taken = [(neighbour, message) for neighbour in self.in_neighbours if (message := neighbour.inbox.take())]
        weights = [neighbour.weight for neighbour, _ in taken]
        # The weight of a neighbour that is left out stays with this rank's own parameters.
        squared, accepted = _native.mix(
            self._flat.host(), 1 - sum(weights), [message.payload for _, message in taken], weights, WIRES[self._wire]
        )
        self._flat.store_host()
        for neighbour in self.in_neighbours:
            neighbour.staleness += 1
        for (neighbour, message), distance, mixed in zip(taken, squared, accepted, strict=True):
            self._account(neighbour, message, math.sqrt(distance), mixed)
        mixed_now = [neighbour for (neighbour, _), mixed in zip(taken, accepted, strict=True) if mixed]
        counters = self.counters
        counters.staleness = 0 if mixed_now else counters.staleness + 1
        if mixed_now:
            counters.message_age_s = max(neighbour.message_age_s for neighbour in mixed_now)
            counters.neighbour_distance = sum(n.distance for n in mixed_now) / len(mixed_now)

    def _account(self, neighbour: InNeighbour, message: Message, distance: float, mixed: bool) -> None:
        self.counters.messages_dropped += max(message.update - neighbour.update - 1, 0)
        neighbour.update = message.update
        neighbour.finished = message.last
        if mixed:
            self.counters.messages_mixed += 1
            neighbour.staleness, neighbour.distance = 0, distance
            neighbour.message_age_s = time.time() - message.time_s
            return
        self.counters.messages_rejected += 1
        if self.counters.messages_rejected & (self.counters.messages_rejected - 1) == 0:
            log.warning(
                "message %d of rank %d has values that are not finite: not mixed (%d rejected so far)",
                message.update,
                neighbour.rank,
                self.counters.messages_rejected,
            )


def share_parameters(flat: FlatParameters, comm: Intracomm) -> None:
    """Give every rank the parameters of rank 0. Collective."""
    comm.Bcast(flat.host(), root=0)
    flat.store_host()
