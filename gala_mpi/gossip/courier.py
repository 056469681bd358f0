"""The courier: the communication thread of a rank that has neighbours on other nodes.

Between nodes a one-sided operation may move only while its target is inside the MPI library. The thread is what
is inside: for messages going out, which it carries in the background, and for those coming in, whose progress
engine it is. It never blocks on another rank. Every operation is request-based and polled, so a neighbour that
is slow, stopped or dead delays its own mailbox alone, and costs no processor time.

    who                   writes                                     reads
    learner (publish)     the spare snapshot, then the waiting one   -
    courier (carry)       the slot `back`, the control word          the snapshot in flight

A snapshot changes hands under one lock, held for a few assignments. One that waits is replaced by a newer one.
There are three, each in exactly one of four places: spare, waiting, in flight, free. A post moves spare to waiting and
the one that waited, if any, to free; with one waiting and at most one in flight, at least one is free to become the
spare. So what is written, what waits and what the network reads are always distinct, and a post never waits for one.

The order that the mailbox needs: the Put has arrived before the swap that publishes it is started; the next Put starts
once the swap's request has brought the new `back` home (MPI-4.1, section 12.5). MPI's word for the first is a flush,
which would have to wait: on MPICH over libfabric for all that the process has under way, towards a dead rank too, and
with the library locked meanwhile. So each Put is followed by a ping, a small read from the same target, and is taken to
have arrived when its own request and the ping's are complete. That holds wherever one origin's operations reach a
target in order, as over TCP; where they do not, the message's seal shows it to the receiver (see `mailbox`).

A target may die at any time, and on MPICH over libfabric the call that then starts an operation may never return: it
tries to connect again and again, with the library locked. An operation already under way is merely never complete. So
one always is: whenever the target has answered, the next operation is started at once, if there is nothing to send a
ping. Only a death in those microseconds is met by a call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from gala_mpi.gossip.mailbox import HEADER, About, Delivery, Outbox, Place, fill, publication, seal
from gala_mpi.mpi.waiting import wait_until
from gala_mpi.mpi.window import Bytes, MpiError, Window, may_call_from_threads, node_leaders

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

# Between two looks at what is on its way. A quarter of it cost the learner 2 to 4 % of its time, and a message is some
# 30 ms on its way at 1 Gbit/s.
SLEEP_S = 0.002
SETTLE_S = 10.0
log = logging.getLogger(__name__)


class Snapshot:
    """A message as it is sent: the header, and behind it the payload."""

    def __init__(self, capacity: int) -> None:
        self.memory = np.zeros(HEADER.itemsize + capacity, np.uint8)
        self.header = self.memory[: HEADER.itemsize].view(HEADER)
        self.nbytes = 0


class BackgroundOutbox:
    """The sending end of a mailbox whose messages the courier carries; see `mailbox.Outbox`.

    `slot`, `publish` and `post` are for the learner's thread, `carry` for the courier's.
    """

    def __init__(self, window: Window, target: int, place: Place) -> None:
        self._window, self.target, self._place = window, target, place
        self._back = self._number = 0
        self._lock = threading.Lock()
        self._spare = Snapshot(place.capacity)
        self._free = [Snapshot(place.capacity), Snapshot(place.capacity)]
        self._waiting: Snapshot | None = None
        self._in_flight: Snapshot | None = None
        self._stage = "ping"
        self._under_way: list[Request] = []
        self._word, self._before, self._answer = (np.zeros(1, np.int64) for _ in range(3))
        self._failed = False

    def slot(self, nbytes: int) -> Bytes | None:
        """See `Delivery.slot`."""
        self._place.check(nbytes)
        return self._spare.memory[HEADER.itemsize : HEADER.itemsize + nbytes]

    def publish(self, nbytes: int, **about: Unpack[About]) -> None:
        """Leave what is in the slot for the courier, in place of a message that it has not fetched yet."""
        self._number += 1
        spare = self._spare
        fill(spare.header, self._window.rank, self._number, nbytes, about)
        spare.nbytes = HEADER.itemsize + nbytes
        seal(spare.header, spare.memory[HEADER.itemsize : spare.nbytes])
        with self._lock:
            if self._waiting is not None:
                self._free.append(self._waiting)
            self._waiting = spare
            # Of three snapshots one waits now and one may be in flight.
            self._spare = self._free.pop()

    def post(self, payload: npt.NDArray[Any], **about: Unpack[About]) -> None:
        """See `Delivery.post`."""
        slot = self.slot(payload.nbytes)
        assert slot is not None
        slot[:] = payload.reshape(-1).view(np.uint8)
        self.publish(payload.nbytes, **about)

    @property
    def pending(self) -> bool:
        """Whether a message waits or is on its way."""
        with self._lock:
            return not self._failed and (self._waiting is not None or self._in_flight is not None)

    def carry(self) -> bool:
        """One step of the delivery, as far as it goes without waiting; whether something is on its way."""
        if self._failed:
            return False
        try:
            return self._step()
        except MpiError as error:
            # Only a library that tells of dead processes comes here: this one will not be back.
            self._failed = True
            log.warning("rank %d cannot be reached any more: %s", self.target, error)
            return False

    def _step(self) -> bool:
        while self._under_way:
            if not self._under_way[0].Test():
                return self._in_flight is not None
            del self._under_way[0]
        if self._stage == "swap":
            self._back = int(self._before[0]) & 3
            with self._lock:
                assert self._in_flight is not None
                self._free.append(self._in_flight)
                self._in_flight = None
        # The answer is there this moment, so the next operation is started now, if only a ping: see above.
        if self._stage == "put" and self._in_flight is not None:
            self._stage = "swap"
            self._word[0] = publication(self._back, int(self._in_flight.header["number"][0]))
            swap = self._window.start_swap(self._word, self._before, self.target, self._place.control)
            self._under_way = [swap]
            return True
        with self._lock:
            self._in_flight, self._waiting = self._waiting, None
        self._stage = "ping" if self._in_flight is None else "put"
        if self._in_flight is not None:
            slot = self._place.slots[self._back] - HEADER.itemsize
            message = self._in_flight.memory[: self._in_flight.nbytes]
            self._under_way.append(self._window.start_put(message, self.target, slot))
        self._under_way.append(self._window.start_ping(self._answer, self.target, self._place.control))
        return self._in_flight is not None

    def settle(self, timeout_s: float) -> None:
        """Wait for the answer to the last ping, once the courier has ended."""
        wait_until(lambda: all(request.Test() for request in self._under_way), timeout_s)
        self._under_way = []


class Courier:
    """Chooses how messages go to each rank, and runs the thread where one is needed.

    `delivery`: inline (by the learner: stores inside a node, else a Put), background (by the thread), or auto: inline
    to ranks of this node, background to others. Making and freeing it are collective; all else is local.
    """

    def __init__(self, comm: Intracomm, delivery: str = "auto") -> None:
        self.leaders = node_leaders(comm)
        """For each rank the lowest rank of its node."""
        self._rank = comm.rank
        self._delivery = delivery
        if delivery != "inline" and not may_call_from_threads():
            self._delivery = "inline"
            if comm.rank == 0 and (delivery == "background" or len(set(self.leaders)) > 1):
                log.warning(
                    "this MPI library grants no MPI_THREAD_MULTIPLE, which background delivery needs: messages to "
                    "other nodes go inline and may wait for their target"
                )
        self.needed = self._delivery == "background" or (self._delivery == "auto" and len(set(self.leaders)) > 1)
        self._outboxes: list[BackgroundOutbox] = []
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        # A receive that never completes: testing it is what drives progress on every library tried. A probe of
        # COMM_SELF moves nothing on MPICH, and one for any source raises on Open MPI once some rank has died.
        self._comm = comm.Dup()
        self._never = self._comm.Irecv(np.zeros(1, np.uint8), comm.rank, 0)
        if self.needed:
            self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
            self._thread.start()

    @property
    def nodes(self) -> list[str]:
        """For each rank the name of its node: equal names mean shared memory."""
        return [str(leader) for leader in self.leaders]

    def way(self, source: int, target: int) -> str:
        """How messages from one rank go to another: inline or background."""
        if self._delivery != "auto":
            return self._delivery
        return "inline" if self.leaders[source] == self.leaders[target] else "background"

    def near(self, source: int, target: int) -> bool:
        """Whether messages from one rank go to another through memory that both share."""
        return self.way(source, target) == "inline" and self.leaders[source] == self.leaders[target]

    def node_rank(self, rank: int) -> int:
        """The number of a rank in the communicator of its node."""
        return sum(leader == self.leaders[rank] for leader in self.leaders[:rank])

    def way_to(self, target: int) -> str:
        """How messages from this rank go to another: inline or background."""
        return self.way(self._rank, target)

    def outbox(self, window: Window, target: int, place: Place) -> Delivery:
        """The sending end of a mailbox at `target`, of the kind that the way there needs."""
        if self.way_to(target) == "inline":
            return Outbox(window, target, place)
        made = BackgroundOutbox(window, target, place)
        self._outboxes = [*self._outboxes, made]
        return made

    def check(self) -> None:
        """Raise what has ended the thread, if anything."""
        if self._error is not None:
            raise RuntimeError("the communication thread has failed") from self._error

    def drain(self, timeout_s: float, without: Sequence[int] = ()) -> bool:
        """Wait until all that was posted has arrived, but to the ranks in `without`; False if `timeout_s` is over.

        Raises what has ended the thread, as `check` does.
        """
        outboxes = [outbox for outbox in self._outboxes if outbox.target not in without]
        arrived = wait_until(lambda: self._error is not None or not any(o.pending for o in outboxes), timeout_s)
        self.check()
        return arrived

    def free(self) -> None:
        """End the thread. Collective."""
        if self._thread is not None:
            self._ending.set()
            self._thread.join(SETTLE_S)
            if self._thread.is_alive():
                raise TimeoutError(f"the communication thread has not ended: no answer of MPI for {SETTLE_S:g} s")
            for outbox in self._outboxes:
                outbox.settle(SETTLE_S)
        self._never.Cancel()
        self._never.Wait()
        self._comm.Free()

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                for outbox in self._outboxes:
                    outbox.carry()
                self._never.Test()
                time.sleep(SLEEP_S)
        except BaseException as error:
            self._error = error
