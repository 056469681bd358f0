"""Asynchronous gossip: every rank posts its whole policy to its out-neighbours and averages what it finds.

One step posts the parameters as they are, and mixes what its in-neighbours have left since the last mix:
x <- w0 x + sum of w_k m_k, where the weight of a neighbour that has left nothing stays with x. It never waits, unless a
bound on staleness says so, and then with a deadline. The method is GALA (Assran et al. 2019, arXiv:1906.04585), whose
algorithm 1 mixes when all in-neighbours have left a message; *design decisions* has why this one does not wait for all.

That wait cannot lock ranks against each other. Each posts before it waits. So if a rank waits for a neighbour that
waits itself, that one's message was taken already, or is on its way and will end the wait. Taken it was before the
waiting rank began its update, so the neighbour began its own update sooner. Round a circle of ranks that all wait, each
would have begun sooner than the one before. Over a rotating topology a rank waits only while it has no message at all.
If all ranks waited, each would have posted to one that then has a message; so some rank goes on, and in time comes to
every round. A rank that has a finished or lost in-neighbour there does not wait, nor does one that has posted to
nobody.

A message carries its sender's update, which tells the round that its weight is of (`topology.mixing_weights`). The
receiver's own round has no part in that: ranks drift apart, and a rank that mixed the messages of its own round alone
would find ever fewer. So what a topology promises for the end of a period holds for ranks that are in step.

A rank that diverged posts nothing at that update, so it must not wait for a neighbour that waits for it: it goes on
with the newest message that it holds or finds. The slot of one that it holds stays its own until it takes the next.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gala_mpi import _native
from gala_mpi.gossip.consensus import DivergedError, distance_to_mean, mean_buffers, mean_of_all, store_buffers
from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.flat import Flat
from gala_mpi.gossip.given import WIRES, given_to_gossip, share_parameters
from gala_mpi.gossip.mailbox import About, Delivery, Message
from gala_mpi.gossip.mailboxes import Mailboxes
from gala_mpi.gossip.neighbours import InNeighbour, InNeighbours, Taken
from gala_mpi.gossip.news import SHORTEST_ROUND_S
from gala_mpi.gossip.roster import Roster
from gala_mpi.gossip.shared_topology import told_by_rank_0
from gala_mpi.gossip.survivors import Survivors
from gala_mpi.gossip.topology import PLACED, Topology, make_topology, warning_of
from gala_mpi.mpi.bounded import BoundedCollectives
from gala_mpi.mpi.collective import ClosedTogether, alike_on_all_ranks
from gala_mpi.mpi.room import NoRoomError
from gala_mpi.mpi.waiting import wait_until

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request
    from torch import nn

REST_S = 0.5
"""The rest of an own roster between two looks while steps follow each other; in waits it is a round of news."""
log = logging.getLogger(__name__)


class Part(Protocol):
    """What an exchange is made of."""

    def free(self) -> None:
        """Collective."""


AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass
class ExchangeCounters:
    """Sums since the start of the run, and the state after the last update."""

    messages_sent: int = 0
    messages_mixed: int = 0
    messages_dropped: int = 0
    messages_rejected: int = 0
    divergences: int = 0
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


class Gossip(ClosedTogether):
    """Gossip of a model's trained parameters over a topology, for any training loop:

        with Gossip(model, comm) as gossip:
            ...
            optimizer.step(); gossip.step()

    Making and closing it are collective; a step is local. All ranks start from the parameters of rank 0. Buffers
    (running statistics, say) and the optimiser's state stay each rank's own. Frozen parameters (requires_grad is
    False) are taken from rank 0, and then left alone.

    model: its trained parameters become views into one flat buffer (`FlatParameters`), the Parameter objects stay:
    an optimiser may be made before or after. If some are float64, bfloat16 or float16, all stay where they are, and a
    float32 copy is exchanged (`FlatCopy`). What moves or converts the model comes before. Or a NumPy array of
    float32 values, of any shape, which then stays where it is: no torch is needed. topology: a name, or a
    Topology over comm.size ranks. wire: type of the parameters under way. max_staleness: updates without a message
    of some in-neighbour after which a step waits for it; None never waits. neighbour_timeout_s: silence after which an
    in-neighbour is left out until it is heard again. delivery: auto, inline or background, or a Courier to share.
    on_divergence: whether a rank whose parameters are not finite goes on with a neighbour's, or raises DivergedError.
    while_waiting: called again and again while a step waits for messages; it must not wait itself. roster: one to
    share, by which somebody else comes. broadcast: False leaves each rank its own parameters, as after a restart.

    Raises DisagreementError (a ValueError), on all ranks, if one of them was given a model or an option that cannot
    be used, or another one than rank 0. Raises NoRoomError (a MemoryError), on all ranks, if the shared memory of some
    node has no room for the mailboxes of its ranks.
    """

    synchronous = False

    def __init__(
        self,
        model: nn.Module | npt.NDArray[np.float32] | Flat,
        comm: Intracomm,
        topology: str | Topology = "auto",
        *,
        wire: str = "float32",
        max_staleness: int | None = None,
        neighbour_timeout_s: float = 60.0,
        delivery: str | Courier = "auto",
        on_divergence: Literal["adopt", "stop"] = "adopt",
        while_waiting: Callable[[], None] = lambda: None,
        roster: Roster | None = None,
        broadcast: bool = True,
    ) -> None:
        options: dict[str, object] = {
            "wire": wire,
            "max_staleness": max_staleness,
            "neighbour_timeout_s": neighbour_timeout_s,
            "delivery": delivery if isinstance(delivery, str) else "auto",
            "on_divergence": on_divergence,
            "broadcast": broadcast,
        }
        self._flat, known = alike_on_all_ranks(comm, lambda: given_to_gossip(model, topology, comm, options))
        graph = told_by_rank_0(topology, known, comm) if isinstance(topology, str) else topology
        # Others hand over what stays where it is.
        self._model = model if self._flat is not model and not isinstance(model, np.ndarray) else None
        self._closed = False
        # What is under way here, after a close that timed out too, meets nothing of the user's.
        self._comm, self._wire = comm.Dup(), WIRES.index(wire)
        self._met: Request | None = None
        self._timeout_s = neighbour_timeout_s
        self._adopts = on_divergence == "adopt"
        self._while_waiting = while_waiting
        self._warned_of_range = False
        self._update = self._agent_steps = 0
        self.counters = ExchangeCounters()
        if broadcast:
            share_parameters(self._flat, self._comm)
        self._parts: list[Part] = []
        self._own_courier = Courier(self._comm, delivery) if isinstance(delivery, str) else None
        if self._own_courier is not None:
            # The first to end: it works on the windows.
            self._parts.append(self._own_courier)
        courier: Courier = self._own_courier or delivery  # type: ignore[assignment]
        self._courier = courier
        if topology in PLACED:
            graph = make_topology(str(topology), comm.size, courier.nodes)
        self.topology = graph
        if comm.rank == 0 and (warning := warning_of(graph)) is not None:
            log.warning("%s", warning)
        nbytes = self._flat.size * _native.WIRE_ITEMSIZE[wire]
        self._staging = None if wire == "float32" else np.empty(nbytes, np.uint8)
        try:
            self._mailboxes = self._with(Mailboxes(self._comm, courier, graph, nbytes))
            self._own_roster = None
            if roster is None:
                roster = self._own_roster = self._with(Roster(self._comm, courier, neighbour_timeout_s))
            self._survivors = self._with(Survivors(self._comm, courier, graph, nbytes, roster))
        except NoRoomError:
            # Raised on all ranks: nothing is left behind, but where somebody else's courier may work on it.
            if self._own_courier is not None:
                self._free_parts()
            raise
        self._together = self._with(BoundedCollectives(self._comm, self.attend))
        self.in_neighbours = [InNeighbour(rank, inbox) for rank, inbox in self._mailboxes.inboxes.items()]
        self._heard = InNeighbours(self.in_neighbours, neighbour_timeout_s, graph.rounds(comm.rank), max_staleness)
        self.outboxes = self._mailboxes.outboxes
        self._targets = [graph.targets(comm.rank, turn + 1) for turn in range(graph.period)]
        self._came_by_s = -math.inf

    def _with(self, part: AnyPart) -> AnyPart:
        self._parts.append(part)
        return part

    def _free_parts(self) -> None:
        """Free what was made, the communicator last. Collective."""
        for part in self._parts:
            part.free()
        self._comm.Free()

    @property
    def ways(self) -> dict[int, str]:
        """How messages go to each out-neighbour: inline or background."""
        return {target: self._courier.way_to(target) for target in self.outboxes}

    def average_gradient(self, grad: object) -> None:
        """Gossip leaves gradients alone."""

    def step(self, agent_steps: int = 0) -> bool:
        """Post the parameters, then mix the messages that are there; wait for those that the staleness asks for.

        `agent_steps` is told to the neighbours. Returns whether the parameters were replaced by a neighbour's,
        since they were not finite: the optimiser's state is then to be reset. Raises DivergedError, and RuntimeError
        if the model's parameters were moved or replaced since this object was made.
        """
        self._check()
        self._update, self._agent_steps = self._update + 1, agent_steps
        with self.counters.timed():
            self._courier.check()
            self.come_by(REST_S)
            self._follow()
            state = self._flat.host()
            found, wait = self._heard.look()
            taken = self._take() if found and not wait else []
            sent = self.counters.messages_sent
            if not self.post_and_mix(state, self._targets[self.topology.turn(self._update)], taken):
                self._recover(state)
                self._settle([])
                return True
            if wait:
                # Who has sent nothing must not wait: another may wait for it.
                if self.counters.messages_sent > sent:
                    # Ends: a neighbour that stays silent becomes lost, and a lost one is not waited for.
                    self._wait_until(lambda: not self._heard.look()[1])
                taken = self._take()
                self._mix(state, taken)
            self._settle(taken)
        return False

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("the exchange is closed")
        if self._model is not None:
            self._flat.check(self._model)  # type: ignore[attr-defined]

    @property
    def share(self) -> float:
        """The share of all ranks that take part, this one included: neither lost nor done, as far as it knows."""
        return self._survivors.share

    @property
    def detour(self) -> tuple[int | None, int | None]:
        """The ranks that this one hears, and sends to, since others are gone; None for those that it does not."""
        outbox = self._survivors.outbox
        return self._survivors.source, None if outbox is None else outbox.target

    def _follow(self) -> None:
        """Hear and send to whom the survivors' ring says, and carry its messages."""
        if self._survivors.look():
            source, inbox = self._survivors.source, self._survivors.inbox
            self._heard.stand_in(None if source is None or inbox is None else InNeighbour(source, inbox))

    def attend(self) -> None:
        """Be there for the others, in a wait for something else."""
        self._while_waiting()
        self.come_by()

    def _pause(self) -> npt.NDArray[np.float32]:
        """Tell the out-neighbours that no message will follow this one for a while; the parameters in host memory."""
        state = self._flat.host()
        self._post(state if _native.all_finite(state) else state[:0], self.outboxes.values(), last=True)
        return state

    def come_by(self, rest_s: float = SHORTEST_ROUND_S) -> None:
        """Look after the roster, if nobody else does, and not after a shorter rest: a step may be a short one.

        Often enough that the neighbours of a node, which hear of it one after the other, do so well within the timeout.
        """
        now_s = time.monotonic()
        if self._own_roster is not None and now_s - self._came_by_s >= min(rest_s, self._timeout_s / 80):
            self._own_roster.come_by()
            self._came_by_s = now_s

    def agree(self, stop: bool) -> bool:
        """Whether this rank ends: each decides for itself."""
        return stop

    def go_on_from(self, update: int, heard: Mapping[int, int]) -> None:
        """Count from `update` on, as a resumed run does; `heard` has the update of in-neighbours' last messages."""
        self._update = update
        for neighbour in self.in_neighbours:
            neighbour.update = heard.get(neighbour.rank, neighbour.update)

    def state_dict(self) -> dict[str, Any]:
        """What a restart goes on from, beside the model's own state: plain numbers. Local."""
        heard = {neighbour.rank: neighbour.update for neighbour in self.in_neighbours}
        return {"update": self._update, "counters": asdict(self.counters), "heard": heard}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, on this rank or on another one. Local.

        Raises ValueError, and changes nothing, if it is no such state.
        """
        try:
            # Through JSON ranks become strings. A later version may count more.
            heard = {int(rank): int(update) for rank, update in state["heard"].items()}
            known = {field.name for field in fields(ExchangeCounters)}
            counters = ExchangeCounters(**{name: value for name, value in state["counters"].items() if name in known})
            update = int(state["update"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"no state of an exchange, as state_dict gives it: {type(error).__name__}: {error}"
            ) from error
        self.go_on_from(update, heard)
        self.counters = counters

    def average(self, *, buffers: bool = False, timeout_s: float = 600.0) -> bool:
        """Give all ranks the mean of their parameters, the same to the last digit; at the end, say. Collective.

        Ranks whose parameters are not finite are left out, and get the mean as well. Returns whether this is one of
        them: its optimiser's state is then to be reset. buffers: take the mean of the model's floating-point buffers
        too (running statistics, say), in which a value that is not finite is left out; whole numbers stay each rank's.

        Until all have come, this rank is not lost to the others, and they do not wait for it. Raises TimeoutError if
        some rank does not come within `timeout_s` seconds; after that this and `consensus_distance` raise RuntimeError,
        as they do where `step` does. Raises DivergedError, on all ranks, if the parameters of none are finite;
        DisagreementError, on all ranks, if they do not have the same buffers; ValueError if there is no model. If any
        of these is raised, nothing was changed.
        """
        self._check()
        state = self._pause()
        replaced = not _native.all_finite(state)
        found = mean_buffers(self._model, state, self._together, timeout_s) if buffers else []
        state[:] = mean_of_all(state, self._together, timeout_s)
        self._flat.store_host(alike=True)
        store_buffers(found)
        return replaced

    def consensus_distance(self, timeout_s: float = 600.0) -> float:
        """How far ranks are apart: the root mean square of their L2 distances to the mean of all. Collective.

        Of the ranks whose parameters are finite. Raises as `average` does.
        """
        self._check()
        return distance_to_mean(self._pause(), self._together, timeout_s)

    def give_up(self) -> None:
        """The others do not wait for this rank for ever."""

    def finish(self) -> None:
        """Tell the out-neighbours that no message will follow this one, which is empty if its values are not finite."""
        self._pause()
        if self._own_roster is not None:
            self._own_roster.finish()

    def arrived(self) -> bool:
        """Whether all that this rank has sent over the topology has arrived."""
        self._courier.check()
        self.come_by()
        return not any(outbox.pending for outbox in self.outboxes.values())

    def free(self) -> None:
        """Free the windows, the communicator, and the courier if it is this object's own. Collective."""
        self._closed = True
        self._heard.let_go()
        self._free_parts()

    def close(self, timeout_s: float = 600.0) -> None:
        """End the exchange: finish, wait for the other ranks, free. Collective; a second call does nothing.

        Ranks that still train are not held up by one that is here. Raises TimeoutError if some rank has not come
        here within `timeout_s` seconds: call it again, to wait for longer, or end the job.
        """
        if self._closed:
            return
        self.finish()
        end = time.monotonic() + timeout_s
        if not (wait_until(self.arrived, timeout_s) and wait_until(self._all_met, max(end - time.monotonic(), 0.0))):
            raise TimeoutError(f"some rank has not come to the end of the exchange within {timeout_s:g} s")
        self.free()

    def _all_met(self) -> bool:
        """Whether all ranks have come to the end. Each comes there once, though it may call `close` again."""
        self.come_by()
        if self._met is None:
            self._met = self._comm.Ibarrier()
        return bool(self._met.Test())

    def post_and_mix(self, state: npt.NDArray[np.float32], targets: Sequence[int], taken: Sequence[Taken] = ()) -> bool:
        """Send the parameters and average them with what was taken; False if they are not finite: nothing is sent.

        In one pass over the parameters, where they are sent as they are and by stores. A part of `step`.
        """
        deliveries = [self.outboxes[target] for target in targets]
        if self._survivors.outbox is not None:
            deliveries.append(self._survivors.outbox)
        slots = [delivery.slot(state.nbytes) for delivery in deliveries] if self._staging is None else []
        stored = [slot for slot in slots if slot is not None]
        if not stored or len(stored) < len(slots):
            if not _native.all_finite(state):
                return False
            self._post(state, deliveries)
            self._mix(state, taken)
            return True
        payloads, weights = [message.payload for _, message in taken], self._heard.weights(taken)
        finite, squared, accepted = _native.exchange(state, stored, 1 - sum(weights), payloads, weights)
        if finite:
            for delivery in deliveries:
                delivery.publish(state.nbytes, **self._about())
            self.counters.messages_sent += len(deliveries)
            self._account(taken, squared, accepted)
        return finite

    def _about(self, *, last: bool = False) -> About:
        return {
            "update": self._update,
            "time_s": time.time(),
            "agent_steps": self._agent_steps,
            "wire": self._wire,
            "last": last,
        }

    def _post(self, payload: npt.NDArray[Any], deliveries: Collection[Delivery], *, last: bool = False) -> None:
        if not deliveries:
            return
        if self._staging is not None and len(payload):
            _native.pack([payload], self._staging, WIRES[self._wire])
            payload = self._staging
            if not _native.all_finite(payload, WIRES[self._wire]):
                self._warn_of_range()
                if not last:
                    return
                payload = payload[:0]
        for delivery in deliveries:
            delivery.post(payload, **self._about(last=last))
            self.counters.messages_sent += 1

    def _warn_of_range(self) -> None:
        if not self._warned_of_range:
            self._warned_of_range = True
            log.warning(
                "parameters beyond the range of %s: they are not sent as long as that lasts; use wire bfloat16 or "
                "float32",
                WIRES[self._wire],
            )

    def _wait_until(self, done: Callable[[], bool]) -> None:
        begin = time.perf_counter()

        def look() -> bool:
            self.attend()
            self._follow()
            return done()

        wait_until(look, 2 * self._timeout_s)
        self.counters.wait_s += time.perf_counter() - begin

    def _take(self) -> list[Taken]:
        """The newest message of each in-neighbour that has sent one with parameters."""
        taken, dropped = self._heard.take()
        self.counters.messages_dropped += dropped
        return taken

    def _mix(self, state: npt.NDArray[np.float32], taken: Sequence[Taken]) -> None:
        payloads, weights = [message.payload for _, message in taken], self._heard.weights(taken)
        self._account(taken, *_native.mix(state, 1 - sum(weights), payloads, weights, WIRES[self._wire]))

    def _account(self, taken: Sequence[Taken], squared: list[float], accepted: list[bool]) -> None:
        """Note what became of messages in a mix."""
        if any(accepted):
            self._flat.store_host()
        for (neighbour, message), distance, mixed in zip(taken, squared, accepted, strict=True):
            if mixed:
                self.counters.messages_mixed += 1
                neighbour.distance, neighbour.message_age_s = math.sqrt(distance), time.time() - message.time_s
            else:
                self._reject(neighbour, message)

    def _settle(self, taken: list[Taken]) -> None:
        """Count on the staleness after an update in which `taken` was mixed, but for what was rejected."""
        mixed = self._heard.settle(taken)
        counters = self.counters
        if self.in_neighbours:
            counters.staleness = 0 if mixed else counters.staleness + 1
        if mixed:
            counters.message_age_s = max(neighbour.message_age_s for neighbour in mixed)
            counters.neighbour_distance = sum(neighbour.distance for neighbour in mixed) / len(mixed)

    def _reject(self, neighbour: InNeighbour, message: Message) -> None:
        neighbour.held = None
        self.counters.messages_rejected += 1
        if self.counters.messages_rejected & (self.counters.messages_rejected - 1) == 0:
            log.warning(
                "message %d of rank %d has values that are not finite: not mixed (%d rejected so far)",
                message.update,
                neighbour.rank,
                self.counters.messages_rejected,
            )

    def _recover(self, state: npt.NDArray[np.float32]) -> None:
        """Go on with a neighbour's parameters in place of those that are not finite; none of them was posted."""
        self.counters.divergences += 1
        what = f"the parameters are not finite after update {self._update}"
        if not self._adopts:
            raise DivergedError(f"{what} (on_divergence is stop)")
        self._wait_until(lambda: self._adopt(state) or (not self._heard.look()[0] and self._heard.all_silent))
        if not _native.all_finite(state):
            raise DivergedError(f"{what}, and no neighbour has sent any to go on with")
        log.warning("%s: went on with those of a neighbour (%d times so far)", what, self.counters.divergences)

    def _adopt(self, state: npt.NDArray[np.float32]) -> bool:
        """Take over the newest message that is held or there, and finite; whether there was one."""
        self._take()
        for neighbour, message in self._heard.held():
            state.fill(0)
            _, (accepted,) = _native.mix(state, 0.0, [message.payload], [1.0], WIRES[self._wire])
            if accepted:
                self._flat.store_host()
                return True
            self._reject(neighbour, message)
            state.fill(math.nan)
        return False
