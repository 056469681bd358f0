"""The courier: the communication thread of a rank that has neighbours on other nodes.

Between nodes a one-sided operation may move only while its target is inside the MPI library. The thread is what
is inside: for messages going out, which it carries in the background, and for those coming in, whose progress
engine it is. It never blocks on another rank. Every operation is a Put or a read with a request that is polled, so a
neighbour that is slow, stopped or dead delays its own mailbox alone, and costs no processor time. The protocol is that
of `background`.

A target may die at any time, and on MPICH over libfabric the call that then starts an operation may never return: it
tries to connect again and again, with the library locked. An operation already under way is merely never complete. So
there one always is: a ping, a small read from each peer. When it is answered, whatever is due to that peer is started
at once, and the next ping behind it. Only a death in those microseconds is met by a call. Where there are many peers
the thread looks less often, so that pings take a twentieth of a core at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from gala_mpi.gossip.background import BackgroundOutbox, End
from gala_mpi.mpi.waiting import wait_until
from gala_mpi.mpi.window import (
    WORD_BYTES,
    MpiError,
    Window,
    may_call_from_threads,
    may_hang_on_the_dead,
    node_leaders,
)

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

# Between two looks at what is on its way. A quarter of it cost the learner 2 to 4 % of its time, and a message is some
# 30 ms on its way at 1 Gbit/s.
SLEEP_S = 0.002
# The same for each peer that is pinged: a look at it, with its ping, takes some 20 us (benchmarks/scaling.py).
SLEEP_A_PING_S = 0.0004
# The same where there is nobody to carry for, as in most ranks of `hierarchical`: until there is.
IDLE_S = 0.05
SETTLE_S = 10.0
log = logging.getLogger(__name__)


AnyEnd = TypeVar("AnyEnd", bound=End)


class Peer:
    """A rank at the other end of some mailboxes, which the courier's thread carries for.

    pings: the window through which it is pinged, where the library needs that.
    """

    def __init__(self, rank: int, pings: Window | None) -> None:
        self.rank, self._pings = rank, pings
        self.ends: tuple[End, ...] = ()
        self._word = np.zeros(1, np.int64)
        self._ping: Request | None = None

    def add(self, end: End) -> None:
        """Carry for one end more."""
        self.ends = (*self.ends, end)

    def carry(self) -> None:
        """One step of all mailboxes, as far as it goes without waiting."""
        try:
            self._step()
        except MpiError as error:
            # Only a library that tells of dead processes comes here: this one will not be back.
            log.warning("rank %d cannot be reached any more: %s", self.rank, error)
            for end in self.ends:
                end.failed = True
            self.ends, self._ping, self._pings = (), None, None

    def _step(self) -> None:
        ends = self.ends
        for end in ends:
            end.look()
        if self._ping is None or self._ping.Test():
            for end in ends:
                end.start()
            if self._pings is not None:
                self._ping = self._pings.start_read(self._word, self.rank, 0)

    def settle(self, timeout_s: float) -> None:
        """Wait for what is under way, once the courier has ended."""

        def settled() -> bool:
            if self._ping is not None and self._ping.Test():
                self._ping = None
            return self._ping is None and all(end.settled() for end in self.ends)

        wait_until(settled, timeout_s)


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
        self._peers: dict[int, Peer] = {}
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        # A receive that never completes: testing it is what drives progress on every library tried. A probe of
        # COMM_SELF moves nothing on MPICH, and one for any source raises on Open MPI once some rank has died.
        self._comm = comm.Dup()
        self._never = self._comm.Irecv(np.zeros(1, np.uint8), comm.rank, 0)
        self._pings = Window(self._comm, WORD_BYTES) if self.needed and may_hang_on_the_dead() else None
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

    def add(self, end: AnyEnd, peer: int) -> AnyEnd:
        """Carry for an end of a mailbox whose other end is at rank `peer` from now on; returns it."""
        known = self._peers.get(peer) or Peer(peer, self._pings)
        known.add(end)
        # A new dictionary, as the thread may be going through the old one.
        self._peers = {**self._peers, peer: known}
        return end

    def check(self) -> None:
        """Raise what has ended the thread, if anything."""
        if self._error is not None:
            raise RuntimeError("the communication thread has failed") from self._error

    def drain(self, timeout_s: float, without: Sequence[int] = ()) -> bool:
        """Wait until all that was posted has arrived, but to the ranks in `without`; False if `timeout_s` is over.

        Raises what has ended the thread, as `check` does.
        """
        ends = [end for peer in self._peers.values() if peer.rank not in without for end in peer.ends]
        outboxes = [end for end in ends if isinstance(end, BackgroundOutbox)]
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
            for peer in self._peers.values():
                peer.settle(SETTLE_S)
        if self._pings is not None:
            self._pings.free()
        self._never.Cancel()
        self._never.Wait()
        self._comm.Free()

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                for peer in self._peers.values():
                    peer.carry()
                self._never.Test()
                pinged = 0 if self._pings is None else len(self._peers)
                time.sleep(max(SLEEP_S, SLEEP_A_PING_S * pinged) if self._peers else IDLE_S)
        except BaseException as error:
            self._error = error
