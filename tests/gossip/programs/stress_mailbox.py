"""mpirun -n 3 python tests/gossip/programs/stress_mailbox.py --exchanges 7000 --delivery background

Every rank sends and receives at once, and checks every message that it takes:

    whole       all elements encode the link and the update that the header names, at the size that belongs to it
    ordered     updates strictly increase
    newest      a message, or the one held, is at least as new as what its sender announced before the poll; after a
                barrier it is the sender's very last
    held        what was taken stays as it is until the next take
    last        only the sender's final message says so
    wait-free   a post does not wait for the one before it

A sender announces what has arrived: with inline delivery when the post returns, with background delivery once its
outbox has nothing pending, or the courier is drained. What a later post replaced before that may never arrive.

With background delivery the receiving side's courier takes what is whole, by its checksum; `--unanswered` makes the
sender repeat what has no answer after so many seconds.

Rank 0 prints the totals as one line of JSON. The first violation aborts the job with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from broken_mailboxes import (
    BROKEN_BACKGROUND_INBOXES,
    BROKEN_BACKGROUND_OUTBOXES,
    BROKEN_INBOXES,
    BROKEN_OUTBOXES,
)
from mpi4py import MPI

from gala_mpi import _native
from gala_mpi.gossip import background
from gala_mpi.gossip import courier as couriers
from gala_mpi.gossip.background import BackgroundInbox, BackgroundOutbox
from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.mailbox import CACHE_LINE_BYTES, HEADER, About, Delivery, Inbox, Message, Outbox, lay_out
from gala_mpi.mpi.waiting import wait_until
from gala_mpi.mpi.window import Window

CAPACITY = 64 * 1024
WIRES = (np.dtype(np.int64), np.dtype(np.float64))
ELEMENT_BYTES = 8
ORDINALS = tuple(np.arange(CAPACITY // ELEMENT_BYTES).astype(wire) for wire in WIRES)
POSTS_PER_PHASE = 250
# A broken outbox is wrong in its `post`.
STORING = (Outbox, BackgroundOutbox)
# Posts before a look at the inboxes, looks, and the longest pause after them in seconds.
ROLES = {"fast sender": (5, 1, 0.0), "even": (1, 1, 50e-6), "slow sender": (1, 4, 200e-6)}
# The courier sleeps 0.5 ms at least between its Put and a look at the answer, so posts that waited would take longer.
BURST, BURSTS, BURST_S = 20, 10, 20 * 0.5e-3


class Violation(Exception):
    """The mailbox broke one of its promises."""


class Words(Window):
    """The words that senders announce by, without a Flush: on MPICH it waits for all that the courier has under way."""

    def _fetch_and_op(self, target: int, offset: int, op: MPI.Op) -> int:
        place = [self._shifts[target] + offset, 1, MPI.INT64_T]
        word, result = [self._word, 1, MPI.INT64_T], [self._result, 1, MPI.INT64_T]
        self._win.Rget_accumulate(word, result, target, place, op).Wait()
        return int(self._result[0])


class Link:
    """What one sender sends to one receiver: both ends know every message in advance."""

    def __init__(self, sender: int, receiver: int, number: int, capacity: int) -> None:
        self.sender, self.receiver, self.number, self.capacity = sender, receiver, number, capacity
        rng = np.random.default_rng([sender, receiver, number])
        most = capacity // ELEMENT_BYTES
        # Empty, full, and everything between, so that a shorter message leaves a stale tail behind it.
        counts = np.exp(rng.uniform(0, np.log(most), 509)).astype(int)
        counts[rng.choice(509, 50, replace=False)] = np.repeat([0, 1, most, most, most], 10)
        # Updates 1 and 2 are taken one by one, whatever the timing.
        counts[1:3] = 0, most
        self._counts = counts.tolist()

    def wire(self, update: int) -> int:
        return update // 3 % 2

    def nbytes(self, update: int) -> int:
        return self._counts[update % 509] * ELEMENT_BYTES

    def payload(self, update: int) -> np.ndarray:
        """Every element encodes sender, receiver, mailbox, update and its own place; exact in float64 too."""
        base = (((update * 8 + self.sender) * 8 + self.receiver) * 64 + self.number) << 13
        return ORDINALS[self.wire(update)][: self._counts[update % 509]] + base


class Sender:
    """One rank's end of a link to an out-neighbour."""

    def __init__(self, window: Window, link: Link, outbox: Delivery, announced: int) -> None:
        self._window, self._link, self._word = window, link, announced
        self.outbox = outbox
        self.update = self._announced = 0
        self.bytes_posted = self.overtaking = self.streamed = 0

    @property
    def pending(self) -> bool:
        """Whether something posted has not arrived."""
        return isinstance(self.outbox, BackgroundOutbox) and self.outbox.pending

    def post(self, *, last: bool = False) -> None:
        self.overtaking += self.pending
        self.update += 1
        payload = self._link.payload(self.update)
        about: About = {
            "update": self.update,
            "time_s": self.update / 8,
            "agent_steps": self.update * 80,
            "wire": self._link.wire(self.update),
            "last": last,
        }
        # Where stores reach the slot, every second message goes there as parameters do: by streaming stores.
        slot = self.outbox.slot(payload.nbytes) if self.update % 2 and type(self.outbox) in STORING else None
        if slot is not None and _native.exchange(payload.view(np.float32), [slot], 1.0, [], [])[0]:
            self.outbox.publish(payload.nbytes, **about)
            self.streamed += 1
        else:
            # Some payloads are not finite as float32; what was written of them is written over.
            self.outbox.post(payload, **about)
        # A post that returned has no more business with the sender's buffer.
        payload[:] = -1
        self.bytes_posted += payload.nbytes + HEADER.itemsize

    def announce(self) -> bool:
        """Tell the receiver what has arrived; whether that is all that was posted."""
        if self.pending:
            return False
        if self._announced < self.update:
            self._window.swap(self._link.receiver, self._word, self.update)
            self._announced = self.update
        return True

    def post_too_much(self) -> None:
        """What exceeds the capacity is refused; later checks show that the mailbox did not change."""
        with contextlib.suppress(ValueError):
            payload = np.zeros(self._link.capacity + 1, np.uint8)
            self.outbox.post(payload, update=10**9, time_s=0.0, agent_steps=0)
            raise Violation("capacity: a payload beyond it was accepted")


class Receiver:
    """One rank's end of a link from an in-neighbour, and its checks."""

    def __init__(self, window: Window, link: Link, inbox: Inbox | BackgroundInbox, announced: int) -> None:
        self._window, self._link, self._announced = window, link, announced
        self.inbox = inbox
        self.held: Message | None = None
        self.update = 0
        self.taken = 0
        self.most_skipped = 0

    def poll(self, *, last: bool = False) -> bool:
        """Take what is there, if anything, and check it and what was held until now."""
        self._check_payload("held")
        announced = self._window.load(self._window.rank, self._announced)
        message = self.inbox.take() if self.inbox.fresh() else None
        if message is not None:
            self._check_header(message, last)
            self.most_skipped = max(self.most_skipped, message.update - self.update - 1)
            self.held, self.update = message, message.update
            self.taken += 1
            self._check_payload("whole")
        if self.update < announced:
            raise Violation(f"newest: holds update {self.update}, {announced} was announced; {self._name()}")
        return message is not None

    def check_settled(self, update: int, *, last: bool = False) -> None:
        """Between two barriers, after the senders are done: the newest message is `update`, and none comes after."""
        self.poll(last=last)
        if self.update != update:
            raise Violation(f"newest: holds update {self.update} after the barrier, not {update}; {self._name()}")
        if self.inbox.fresh() or self.inbox.take() is not None:
            raise Violation(f"newest: a message after the last one; {self._name()}")

    def _check_header(self, message: Message, last: bool) -> None:
        update = message.update
        if message.sender != self._link.sender:
            raise Violation(f"sender: a message from {message.sender}; {self._name()}")
        if update <= self.update:
            raise Violation(f"ordered: update {update} after {self.update}; {self._name()}")
        found = (message.time_s, message.agent_steps, message.wire, message.last, message.payload.nbytes)
        expected = (update / 8, update * 80, self._link.wire(update), last, self._link.nbytes(update))
        if found != expected:
            raise Violation(f"whole: header {found}, not {expected}, at update {update}; {self._name()}")

    def _check_payload(self, promise: str) -> None:
        if self.held is None:
            return
        expected = self._link.payload(self.update)
        found = self.held.payload.view(expected.dtype)
        if not np.array_equal(found, expected):
            first = int(np.argmax(found != expected))
            raise Violation(
                f"{promise}: element {first} of {len(expected)} is {found[first]}, not {expected[first]}, "
                f"at update {self.update}; {self._name()}"
            )

    def _name(self) -> str:
        return f"{self._link.sender} -> {self._link.receiver}"


class Rank:
    """One rank with all its links."""

    def __init__(
        self, comm: MPI.Intracomm, window: Window, words: Window, courier: Courier, arguments: argparse.Namespace
    ) -> None:
        self._comm, self._courier, self._deadline_s = comm, courier, arguments.deadline_s
        self._rng = random.Random(f"{arguments.seed} {comm.rank}")
        self._posts_per_phase, self._announcing = arguments.posts_per_phase, arguments.announcing
        self._roles = [ROLES[name] for name in arguments.roles]
        self._haste, self._background = arguments.haste, arguments.delivery == "background"
        rank, size = comm.rank, comm.size
        sizes = capacities(size, arguments)
        make = self._in_background if self._background else self._inline
        self.receivers, self.senders = [], []
        for index, (distance, number) in enumerate(links(size, arguments)):
            source, target = (rank - distance) % size, (rank + distance) % size
            inbox, outbox = make(window, source, target, index, sizes, arguments.broken)
            announced = CACHE_LINE_BYTES * index
            self.receivers.append(Receiver(words, Link(source, rank, number, sizes[index]), inbox, announced))
            self.senders.append(Sender(words, Link(rank, target, number, sizes[index]), outbox, announced))
        self.barrier()

    def _inline(
        self, window: Window, source: int, target: int, index: int, sizes: list[int], broken: str | None
    ) -> tuple[Inbox, Delivery]:
        place = lay_out(sizes)[0][index]
        outbox = BROKEN_OUTBOXES.get(broken or "", Outbox)(window, target, place)
        return BROKEN_INBOXES.get(broken or "", Inbox)(window, place), outbox

    def _in_background(
        self, window: Window, source: int, target: int, index: int, sizes: list[int], broken: str | None
    ) -> tuple[BackgroundInbox, Delivery]:
        slots, answers, _ = background.lay_out(sizes, len(sizes))
        where = (slots[index], answers[index], sizes[index])
        inbox = BROKEN_BACKGROUND_INBOXES.get(broken or "", BackgroundInbox)(window, source, *where)
        outbox = BROKEN_BACKGROUND_OUTBOXES.get(broken or "", BackgroundOutbox)(window, target, *where)
        return self._courier.add(inbox, source), self._courier.add(outbox, target)

    def barrier(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait for all ranks, with a deadline, calling `meanwhile` over and over."""
        request = self._comm.Ibarrier()

        def done() -> bool:
            meanwhile()
            return request.Test()

        if not wait_until(done, self._deadline_s):
            raise TimeoutError(f"no barrier within {self._deadline_s} s")

    def sum(self, values: list[int]) -> list[int]:
        """Sums over all ranks; with a deadline."""
        total = np.zeros(len(values), np.int64)
        request = self._comm.Iallreduce(np.array(values, np.int64), total)
        if not wait_until(request.Test, self._deadline_s):
            raise TimeoutError(f"no sum within {self._deadline_s} s")
        return total.tolist()

    def poll(self) -> None:
        self._courier.check()
        if self._background:
            for sender in self.senders:
                self._announce(sender)
        for receiver in self.receivers:
            receiver.poll()

    def _announce(self, sender: Sender) -> None:
        if self._rng.random() < self._announcing:
            sender.announce()

    def phase(self, number: int) -> None:
        """Post and take at a pace that depends on rank and phase."""
        posts, polls, pause_s = self._roles[(self._comm.rank + number) % len(self._roles)]
        left = [self._posts_per_phase] * len(self.senders)
        while any(left):
            for index in self._rng.choices(range(len(left)), k=posts * len(left)):
                sender = self.senders[index]
                if left[index] and (self._rng.random() < self._haste or not sender.pending):
                    sender.post()
                    self._announce(sender)
                    left[index] -= 1
            for _ in range(polls):
                self.poll()
            if pause_s:
                time.sleep(self._rng.uniform(0, pause_s))
            elif self._rng.random() < 1 / 64:
                time.sleep(self._rng.uniform(0, 1e-3))
        self.settle(meanwhile=self.poll)

    def settle(self, *, last: bool = False, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Once all have posted, and it has arrived: everyone must hold the very last message."""

        def arrived() -> bool:
            meanwhile()
            return not any(sender.pending for sender in self.senders)

        if not (wait_until(arrived, self._deadline_s) and self._courier.drain(self._deadline_s)):
            raise TimeoutError(f"not all has arrived within {self._deadline_s} s")
        if not all([sender.announce() for sender in self.senders]):
            raise Violation("newest: drained, and something is still on its way")
        self.barrier(meanwhile)
        # All senders have posted equally often.
        for receiver in self.receivers:
            receiver.check_settled(self.senders[0].update, last=last)
        self.barrier()

    def check_quietly(self) -> None:
        """The promises at rest: one message at a time, and a post that is refused."""
        self.settle()
        for count in (1, 1, 3, 20):
            for sender in self.senders:
                for _ in range(count):
                    sender.post()
                sender.post_too_much()
            self.settle()
        # A post that is inline waits by its nature, for its own Put.
        if self._background:
            self.check_bursts()

    def check_bursts(self) -> None:
        """The fastest of several bursts of posts, in which the machine has no part: none of them waited."""
        seconds = []
        for _ in range(BURSTS):
            for sender in self.senders:
                begin = time.monotonic()
                for _ in range(BURST):
                    sender.post()
                seconds.append(time.monotonic() - begin)
            self.settle()
        if min(seconds) > BURST_S:
            raise Violation(f"wait-free: {BURST} posts took {min(seconds):.4f} s at the least")

    def end(self) -> None:
        for sender in self.senders:
            sender.post(last=True)
        self.settle(last=True)


def links(size: int, arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Rank r hears r - 1, r - 2, and so on: for each mailbox of a rank that distance, and a number from 0."""
    nearest = range(1, 1 + min(size - 1, arguments.neighbours))
    return [(distance, number) for distance in nearest for number in range(arguments.mailboxes)]


def capacities(size: int, arguments: argparse.Namespace) -> list[int]:
    """Every second capacity is no whole number of pages."""
    odd = arguments.capacity * 5 // 8 // ELEMENT_BYTES * ELEMENT_BYTES - 3 * ELEMENT_BYTES
    return [odd if index % 2 else arguments.capacity for index in range(len(links(size, arguments)))]


def window_bytes(sizes: list[int], arguments: argparse.Namespace) -> int:
    """What the mailboxes of a rank take of its window."""
    return background.lay_out(sizes, len(sizes))[2] if arguments.delivery == "background" else lay_out(sizes)[1]


def tcp_bytes_sent() -> int:
    """Bytes that the TCP sockets of this process have sent, by the kernel's count."""
    total = 0
    for entry in list(Path("/proc/self/fd").iterdir()):
        if not entry.is_socket():
            continue
        with socket.socket(fileno=os.dup(int(entry.name))) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                # struct tcp_info (linux/tcp.h): tcpi_bytes_acked lies at byte 120.
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
                total += int.from_bytes(info[120:128], sys.byteorder)
    return total


def stress(comm: MPI.Intracomm, arguments: argparse.Namespace) -> dict[str, int | float]:
    """Run phases until as many messages were taken as asked for; gives the totals over all ranks."""
    sizes = capacities(comm.size, arguments)
    courier = Courier(comm, arguments.delivery)
    if courier.way_to((comm.rank + 1) % comm.size) != arguments.delivery:
        raise RuntimeError(f"this MPI library allows no {arguments.delivery} delivery")
    with (
        Window(comm, window_bytes(sizes, arguments), shared=arguments.shared) as window,
        Words(comm, CACHE_LINE_BYTES * len(sizes), shared=arguments.shared) as words,
    ):
        rank = Rank(comm, window, words, courier, arguments)
        if arguments.broken is None:
            rank.check_quietly()
        elif arguments.broken == "WaitsInPost":
            # Others sleep in a post, to meet the courier.
            rank.check_bursts()
        begin = time.monotonic()
        phase, totals = 0, {"taken": 0}
        while totals["taken"] < arguments.exchanges:
            rank.phase(phase)
            phase += 1
            values = {
                "posted": sum(sender.update for sender in rank.senders),
                "overtaking": sum(sender.overtaking for sender in rank.senders),
                "streamed": sum(sender.streamed for sender in rank.senders),
                "taken": sum(receiver.taken for receiver in rank.receivers),
                "bytes_posted": sum(sender.bytes_posted for sender in rank.senders),
                "tcp_bytes": tcp_bytes_sent(),
            }
            totals = dict(zip(values, rank.sum(list(values.values())), strict=True))
        rank.end()
        skipped = max(comm.allgather(max(receiver.most_skipped for receiver in rank.receivers)))
        seconds = time.monotonic() - begin
        courier.free()
        del rank
    overwritten = totals["posted"] - totals["taken"]
    return {**totals, "overwritten": overwritten, "most_skipped": skipped, "phases": phase, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchanges", type=int, default=7000, help="messages to take and verify, over all ranks")
    parser.add_argument("--delivery", choices=["inline", "background"], default="inline")
    parser.add_argument("--shared", action="store_true", help="in a window whose memory the senders write themselves")
    parser.add_argument("--unanswered", type=float, default=background.REPEAT_AFTER_S, help="seconds to a repetition")
    parser.add_argument("--haste", type=float, default=0.25, help="chance of a post while the last is on its way")
    parser.add_argument("--neighbours", type=int, default=2, help="greatest number of out-neighbours of a rank")
    parser.add_argument("--mailboxes", type=int, default=1, choices=range(1, 65), metavar="1..64", help="for each")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES), help="of a rank, in turn")
    parser.add_argument("--announcing", type=float, default=1.0, help="chance that a post is announced")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="greatest size of a payload in bytes")
    parser.add_argument("--posts-per-phase", type=int, default=POSTS_PER_PHASE, help="of each sender")
    parser.add_argument("--courier-sleep-s", type=float, default=0.5e-3, help="of the courier, between two looks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline-s", type=float, default=200.0)
    kinds = [*BROKEN_OUTBOXES, *BROKEN_INBOXES, *BROKEN_BACKGROUND_OUTBOXES, *BROKEN_BACKGROUND_INBOXES]
    parser.add_argument("--broken", choices=kinds, help="a wrong end of the mailbox")
    arguments = parser.parse_args()
    couriers.SLEEP_S, background.REPEAT_AFTER_S = arguments.courier_sleep_s, arguments.unanswered
    comm = MPI.COMM_WORLD
    # Flushes have no deadline of their own.
    faulthandler.dump_traceback_later(arguments.deadline_s, exit=True)
    try:
        totals = stress(comm, arguments)
        if comm.rank == 0:
            print(json.dumps(totals))
    except Exception as error:
        if isinstance(error, Violation):
            print(f"[{comm.rank}/{comm.size}] violated: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
            sys.stderr.flush()
        time.sleep(0.5)  # the launcher may drop what it has not forwarded yet
        comm.Abort(1)


if __name__ == "__main__":
    main()
