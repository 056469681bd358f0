"""All-reduce inside a node, gossip between nodes: the ranks of a node go on as one agent.

A step takes the mean of the node's parameters by an all-reduce. The lowest rank of the node, its leader, then makes a
step of `Gossip` with the leaders of other nodes, and hands its parameters to the others. So between nodes nobody waits
for anybody, and inside a node all wait for the slowest. With plain SGD the mean of parameters after a step is the step
by the mean gradient: inside a node that is synchronous SGD.

Growth: a node sends and holds what one rank of `Gossip` does, over a topology of as many ranks as there are nodes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from gala_mpi import _native
from gala_mpi.gossip.consensus import DivergedError, distance_to_mean, mean_buffers, mean_of_all, store_buffers
from gala_mpi.gossip.given import flat_of, layout_facts, share_parameters
from gala_mpi.gossip.gossip import Gossip
from gala_mpi.gossip.topology import Topology
from gala_mpi.mpi.bounded import BoundedCollectives
from gala_mpi.mpi.collective import ClosedTogether, DisagreementError, alike_on_all_ranks
from gala_mpi.mpi.room import NoRoomError
from gala_mpi.mpi.waiting import wait_until
from gala_mpi.mpi.window import node_leaders

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request
    from torch import nn

    from gala_mpi.gossip.flat import Flat

OPTIONS = ("wire", "max_staleness", "neighbour_timeout_s", "delivery", "on_divergence", "while_waiting")
# What a leader tells its node beside the parameters.
USUAL, REPLACED, DIVERGED = 0.0, 1.0, 2.0


class NodeGossip(ClosedTogether):
    """Gossip between nodes of a model whose parameters are alike inside each: used like `Gossip`, see there.

        with NodeGossip(model, comm) as gossip:
            ...
            optimizer.step(); gossip.step()

    Making and closing it are collective over `comm`, and a step is collective over the node. node: the ranks that go
    on as one, a communicator that this object uses and does not free; None: those of `comm` that share memory.
    topology: over nodes, by the order of their lowest ranks. node_timeout_s: how long a rank waits for its node.
    options: wire, max_staleness, neighbour_timeout_s, delivery (a name), on_divergence and while_waiting of `Gossip`,
    for the leaders. `gossip` is the leader's exchange, with its counters, and None on all other ranks.

    Raises DisagreementError and NoRoomError as `Gossip` does.
    """

    def __init__(
        self,
        model: nn.Module | npt.NDArray[np.float32] | Flat,
        comm: Intracomm,
        topology: str | Topology = "auto",
        *,
        node: Intracomm | None = None,
        node_timeout_s: float = 600.0,
        broadcast: bool = True,
        **options: Any,
    ) -> None:
        def prepare() -> tuple[Flat, dict[str, object]]:
            if unknown := sorted(options.keys() - OPTIONS):
                raise ValueError(f"{unknown[0]}: no option; expected one of {', '.join(OPTIONS)}")
            if not isinstance(options.get("delivery", ""), str):
                raise ValueError("delivery: a courier cannot be shared here; expected auto, inline or background")
            flat = flat_of(model)
            return flat, {**layout_facts(flat), "node_timeout_s": node_timeout_s, "broadcast": broadcast}

        self._flat = alike_on_all_ranks(comm, prepare)
        self._model = None if self._flat is model or isinstance(model, np.ndarray) else cast("nn.Module", model)
        # What is under way here meets nothing of the user's.
        self._comm = comm.Dup()
        here = comm.Split(node_leaders(comm)[comm.rank], comm.rank) if node is None else node.Dup()
        self._timeout_s, self._closed = node_timeout_s, False
        self._node = cast("Intracomm", here)
        self._inside = BoundedCollectives(self._node, self._attend)
        self._together = BoundedCollectives(self._comm, self._attend)
        leads, self._weight = here.rank == 0, 1 / here.size
        self._met: Request | None = None
        self.gossip: Gossip | None = None
        # Parameters, and what the leader tells.
        self._message = np.zeros(self._flat.size + 1, np.float32)
        if broadcast:
            share_parameters(self._flat, comm)
        # Of leaders, and of all others.
        peers = cast("Intracomm", comm.Split(int(leads), comm.rank))
        refusal: Exception | None = None
        if leads:
            try:
                self.gossip = Gossip(self._flat, peers, topology, broadcast=False, **options)
            except (DisagreementError, NoRoomError) as error:
                refusal = error
            except Exception as error:
                refusal = RuntimeError(f"{type(error).__name__}: {error}")
        peers.Free()
        # Leaders are refused alike, and the others are to know.
        for found in comm.allgather(refusal):
            if found is not None:
                self._free()
                raise found

    def step(self, agent_steps: int = 0) -> bool:
        """Take the mean over the node, and gossip with other nodes. Collective over the node.

        Returns and raises what `Gossip.step` does, on all ranks of the node alike; and TimeoutError if some rank of
        the node does not come within `node_timeout_s` seconds.
        """
        self._check()
        self._take_mean()
        told, failure = USUAL, None
        if self.gossip is not None:
            try:
                told = REPLACED if self.gossip.step(agent_steps) else USUAL
            except DivergedError as error:
                told, failure = DIVERGED, error
        told = self._hand_round(told)
        if told == DIVERGED:
            raise failure or DivergedError("the parameters of this node are not finite, and its leader found no others")
        return told == REPLACED

    def _check(self) -> None:
        # The leaders' exchange ends before all have met.
        if self._closed or self._met is not None:
            raise RuntimeError("the exchange is closed")
        if self._model is not None:
            self._flat.check(self._model)  # type: ignore[attr-defined]

    def _attend(self) -> None:
        """A leader that waits for its node, or for all, is there for the leaders of others."""
        if self.gossip is not None:
            self.gossip.attend()

    def average(self, *, buffers: bool = False, timeout_s: float = 600.0) -> bool:
        """Give all ranks the mean over all nodes, each node's that over its ranks: as `Gossip.average`. Collective."""
        self._check()
        state = self._flat.host()
        replaced = not _native.all_finite(state)
        found = mean_buffers(self._model, state, self._together, timeout_s, self._weight) if buffers else []
        state[:] = mean_of_all(state, self._together, timeout_s, self._weight)
        self._flat.store_host(alike=True)
        store_buffers(found)
        return replaced

    def consensus_distance(self, timeout_s: float = 600.0) -> float:
        """How far the leaders are apart, as `Gossip` has it. Collective, raises as that does."""
        self._check()
        return distance_to_mean(self._flat.host(), self._together, timeout_s, float(self.gossip is not None))

    def state_dict(self) -> dict[str, Any]:
        """What a restart goes on from: the leader's, and empty on all other ranks. Local."""
        return {} if self.gossip is None else self.gossip.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave on the leader of a node. Local."""
        if self.gossip is not None and state:
            self.gossip.load_state_dict(state)

    def _take_mean(self) -> None:
        if self._inside.size > 1:
            state = self._flat.host()
            state[:] = self._inside.sum(state / np.float32(self._inside.size), self._timeout_s, "step of this node")
            self._flat.store_host()

    def _hand_round(self, told: float) -> float:
        """Give the node the leader's parameters, and a number, which is returned."""
        if self._inside.size == 1:
            return told
        state = self._flat.host()
        if self._inside.rank == 0:
            self._message[:-1], self._message[-1] = state, told
        self._inside.give(self._message, self._timeout_s, "step of this node")
        if self._inside.rank > 0:
            state[:] = self._message[:-1]
            self._flat.store_host()
        return float(self._message[-1])

    def close(self, timeout_s: float = 600.0) -> None:
        """End the exchange. Collective; a second call does nothing. Raises TimeoutError as `Gossip.close` does."""
        if self._closed:
            return
        end = time.monotonic() + timeout_s
        if self.gossip is not None:
            self.gossip.close(timeout_s)
        # Each rank comes there once, though it may call `close` again.
        self._met = self._met or self._comm.Ibarrier()
        if not wait_until(self._met.Test, max(end - time.monotonic(), 0.0)):
            raise TimeoutError(f"some rank has not come to the end of the exchange within {timeout_s:g} s")
        self._free()

    def _free(self) -> None:
        """Free the communicators. Collective."""
        self._closed = True
        self._inside.free()
        self._together.free()
        self._node.Free()
        self._comm.Free()
