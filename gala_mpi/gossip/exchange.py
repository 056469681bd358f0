"""How ranks share what they learn: gossip, all-reduce or not at all, behind one interface."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from mpi4py import MPI

from gala_mpi import _native
from gala_mpi.config import ExchangeConfig
from gala_mpi.gossip.consensus import DivergedError
from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.given import share_parameters
from gala_mpi.gossip.gossip import ExchangeCounters, Gossip
from gala_mpi.gossip.mailboxes import gossip_bytes
from gala_mpi.gossip.neighbours import InNeighbour
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.gossip.roster import Roster
from gala_mpi.gossip.shared_topology import topology_on_all_ranks
from gala_mpi.gossip.topology import Topology
from gala_mpi.mpi.waiting import Watchdog
from gala_mpi.mpi.window import may_call_from_threads, node_leaders


class Exchange(Protocol):
    """One rank's part in the exchange. `synchronous` ones advance all ranks update by update."""

    synchronous: bool
    counters: ExchangeCounters
    in_neighbours: list[InNeighbour]

    @property
    def topology(self) -> Topology | None:
        """The graph that messages go over, if they do."""

    @property
    def share(self) -> float:
        """The share of all ranks with which this one shares what it learns, itself included."""

    @property
    def ways(self) -> dict[int, str]:
        """How messages go to each out-neighbour: inline or background."""

    def average_gradient(self, grad: torch.Tensor) -> None:
        """Act on the flat gradient (n,) before the learner uses it."""

    def step(self, agent_steps: int) -> bool:
        """Act on the parameters after the learner's update; whether they were replaced as they were not finite."""

    def agree(self, stop: bool) -> bool:
        """Whether this rank ends now, given whether it wants to."""

    def go_on_from(self, update: int, heard: Mapping[int, int]) -> None:
        """Count from `update` on; `heard` has the update of the last message of in-neighbours."""

    def give_up(self) -> None:
        """Let the others end too, as this rank cannot go on."""

    def finish(self) -> None:
        """Say that this rank's last update is done."""

    def arrived(self) -> bool:
        """Whether all that this rank has sent has arrived."""

    def free(self) -> None:
        """Release what is held. Collective."""


class NoExchange:
    """Independent agents, from the same initial parameters."""

    synchronous = False
    topology = None
    share = 1.0

    def __init__(self, flat: FlatParameters, comm: MPI.Intracomm) -> None:
        self.counters = ExchangeCounters()
        self.in_neighbours: list[InNeighbour] = []
        self.ways: dict[int, str] = {}
        self._flat, self._update = flat, 0
        share_parameters(flat, comm)

    def average_gradient(self, grad: torch.Tensor) -> None:
        """Gradients stay as they are."""

    def step(self, agent_steps: int) -> bool:
        """Parameters stay as they are. Raises DivergedError if they are not finite: no neighbour could help."""
        self._update += 1
        data = self._flat.data
        if not (_native.all_finite(data.numpy()) if data.device.type == "cpu" else bool(data.isfinite().all())):
            self.counters.divergences += 1
            raise DivergedError(f"the parameters are not finite after update {self._update}")
        return False

    def agree(self, stop: bool) -> bool:
        """Each rank decides for itself."""
        return stop

    def go_on_from(self, update: int, heard: Mapping[int, int]) -> None:
        """Count from `update` on."""
        self._update = update

    def give_up(self) -> None:
        """The others do not wait for this rank."""

    def finish(self) -> None:
        """Nobody listens."""

    def arrived(self) -> bool:
        """Nothing was sent."""
        return True

    def free(self) -> None:
        """Nothing is held."""


class AllReduce(NoExchange):
    """Synchronous A2C: the gradients of all ranks are averaged at every update. Averaging is collective.

    A rank's wish to stop travels with its gradient, so that all ranks end after the same update, at no extra
    message.
    """

    synchronous = True
    share = 1.0

    def __init__(self, flat: FlatParameters, comm: MPI.Intracomm, timeout_s: float, watchdog: Watchdog) -> None:
        super().__init__(flat, comm)
        self._comm, self._timeout_s = comm, timeout_s
        self._watchdog = watchdog
        on_cpu = flat.data.device.type == "cpu"
        self._host = flat.grad_and_flag if on_cpu else torch.empty(flat.size + 1, pin_memory=True)
        self._wants_to_stop = self._all_stop = False

    def average_gradient(self, grad: torch.Tensor) -> None:
        """Replace the flat gradient by its mean over all ranks. Collective."""
        with self.counters.timed():
            shared = self._flat.grad_and_flag
            shared[-1] = float(self._wants_to_stop)
            begin = time.perf_counter()
            self._host.copy_(shared)
            complaint = f"all-reduce: some rank did not come within {self._timeout_s:g} s (--neighbour-timeout-s)"
            with self._watchdog.limit(self._timeout_s, complaint):
                self._comm.Allreduce(MPI.IN_PLACE, self._host.numpy())
            self._all_stop = bool(self._host[-1] > 0)
            shared.copy_(self._host.div_(self._comm.size))
            self.counters.wait_s += time.perf_counter() - begin

    def agree(self, stop: bool) -> bool:
        """All ranks end together, one update after one of them wants to."""
        self._wants_to_stop = stop
        return self._all_stop

    def give_up(self) -> None:
        """Let the others end with the update that they are in, to which this rank adds no gradient. Collective."""
        self._wants_to_stop = True
        self.average_gradient(self._flat.grad.zero_())


def make_exchange(
    config: ExchangeConfig,
    flat: FlatParameters,
    comm: MPI.Intracomm,
    courier: Courier,
    while_waiting: Callable[[], None],
    watchdog: Watchdog,
    roster: Roster,
) -> Exchange:
    """The exchange that the configuration asks for. Collective."""
    if config.exchange == "allreduce":
        return AllReduce(flat, comm, config.neighbour_timeout_s, watchdog)
    if config.exchange == "none":
        return NoExchange(flat, comm)
    return Gossip(
        flat,
        comm,
        config.topology,
        wire=config.wire,
        max_staleness=config.max_staleness,
        neighbour_timeout_s=config.neighbour_timeout_s,
        delivery=courier,
        on_divergence=config.on_divergence,
        while_waiting=while_waiting,
        roster=roster,
    )


def window_bytes(config: ExchangeConfig, flat: FlatParameters, comm: MPI.Intracomm) -> int:
    """Memory of windows that the exchange will ask for on this rank, in bytes. Collective."""
    if config.exchange != "gossip":
        return 0
    nodes = [str(leader) for leader in node_leaders(comm)]
    sources = topology_on_all_ranks(config.topology, comm, nodes).in_neighbours(comm.rank)
    apart = [source for source in sources if nodes[source] != nodes[comm.rank]]
    carried = {"inline": 0, "background": len(sources), "auto": len(apart)}[config.delivery]
    carried *= may_call_from_threads()
    return gossip_bytes(flat.size * _native.WIRE_ITEMSIZE[config.wire], len(sources) - carried, carried)
