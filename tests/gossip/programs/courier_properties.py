"""mpirun -n 1 python tests/gossip/programs/courier_properties.py CHECK [--broken KIND]

Properties of both ends of a background mailbox, and of their courier, over a network that is none: words of a Put land
when the check says so, in whatever order, after its request is complete and after words of later Puts too; and any call
can fail.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from broken_mailboxes import BROKEN_BACKGROUND_INBOXES, BROKEN_BACKGROUND_OUTBOXES
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mpi4py import MPI

from gala_mpi.gossip import background
from gala_mpi.gossip import courier as couriers
from gala_mpi.gossip.background import BackgroundInbox, BackgroundOutbox, lay_out
from gala_mpi.gossip.courier import Courier, Peer
from gala_mpi.mpi.window import WORD_BYTES, MpiError

CAPACITY = 8192
(SLOT,), (ANSWER,), NBYTES = lay_out([CAPACITY], 1)
SENDER, RECEIVER = 0, 1


class Clock:
    """The time that mailboxes see; it stands still unless it is moved on."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


CLOCK = Clock()


class Put:
    """A Put under way, and its request. Until that is complete the buffer belongs to the network."""

    def __init__(self, network: Network, data: np.ndarray, target: int, offset: int) -> None:
        assert offset % WORD_BYTES == data.nbytes % WORD_BYTES == 0, "words that do not land whole"
        self._network, self._data, self._as_it_was = network, data.reshape(-1).view(np.uint8), data.tobytes()
        self._memory = network.memory[target][offset : offset + data.nbytes]
        # Some pieces, of words; few enough for all their orders to come.
        words = data.nbytes // WORD_BYTES
        cuts = sorted({0, words, *(network.rng.randrange(words + 1) for _ in range(3))})
        self.pieces = [(a * WORD_BYTES, b * WORD_BYTES) for a, b in pairwise(cuts)]

    def land(self) -> None:
        """One piece lands."""
        begin, end = self.pieces.pop(self._network.rng.randrange(len(self.pieces)))
        self._memory[begin:end] = np.frombuffer(self._as_it_was[begin:end], np.uint8)

    def Test(self) -> bool:
        with self._network.lock:
            self._network.called()
            assert self._data.tobytes() == self._as_it_was, "a buffer was changed in flight"
            return self._network.completes()


class Network:
    """Windows of some ranks, and what is on its way between them."""

    def __init__(self, completes: Callable[[], bool], seed: int = 0, ranks: int = 2) -> None:
        self.completes, self.rng = completes, random.Random(seed)
        self.calls = 0
        self.failure: BaseException | None = None
        self.memory = [np.zeros(NBYTES, np.uint8) for _ in range(ranks)]
        self.puts: list[Put] = []
        self.lock = threading.RLock()

    def called(self) -> None:
        self.calls += 1
        if self.failure is not None:
            raise self.failure

    def land(self, number: int) -> None:
        """So many pieces land, of any Puts."""
        with self.lock:
            for _ in range(number):
                self.puts = [put for put in self.puts if put.pieces]
                if self.puts:
                    self.rng.choice(self.puts).land()

    def land_all(self) -> None:
        while self.puts:
            self.land(1)


class Window:
    """One rank's window on the network."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self.rank = network, rank

    def memory(self, offset: int, nbytes: int) -> np.ndarray:
        return self._network.memory[self.rank][offset : offset + nbytes]

    def sync(self) -> None:
        pass

    def start_put(self, data: np.ndarray, target: int, offset: int) -> Put:
        with self._network.lock:
            self._network.called()
            put = Put(self._network, data, target, offset)
            self._network.puts.append(put)
            return put


def content(update: int) -> np.ndarray:
    """A payload: empty, full, or between; half of it is the same in two messages in a row."""
    elements = np.full((0, CAPACITY // 8, 1, 8, 500)[update % 5], update, np.int64)
    elements[len(elements) // 2 :] = update // 2
    return elements


def post(outbox: BackgroundOutbox, update: int) -> None:
    """Post, then change the buffer."""
    payload = content(update)
    outbox.post(payload, update=update, time_s=0.0, agent_steps=0)
    payload[:] = -1


class Mailbox:
    """Both ends, each with the peer that carries for it, and what was taken."""

    def __init__(self, network: Network, outboxes: type[BackgroundOutbox], inboxes: type[BackgroundInbox]) -> None:
        self.outbox = outboxes(Window(network, SENDER), RECEIVER, SLOT, ANSWER, CAPACITY)  # type: ignore[arg-type]
        self.inbox = inboxes(Window(network, RECEIVER), SENDER, SLOT, ANSWER, CAPACITY)  # type: ignore[arg-type]
        self.sending, self.receiving = Peer(RECEIVER, None), Peer(SENDER, None)
        self.sending.add(self.outbox)
        self.receiving.add(self.inbox)
        self.taken = 0
        self._held: np.ndarray | None = None

    def take(self) -> None:
        """As the learner does; what comes is whole, and newer than what came before."""
        self.check_held()
        fresh = self.inbox.fresh()
        message = self.inbox.take()
        assert message is not None or not fresh
        if message is not None:
            assert message.update > self.taken, "an older message after a newer one"
            self.taken, self._held = message.update, message.payload
            assert np.array_equal(self._held.view(np.int64), content(self.taken)), "a torn message"

    def check_held(self) -> None:
        """What was taken stays as it is until the next take."""
        if self._held is not None:
            assert np.array_equal(self._held.view(np.int64), content(self.taken)), "a message changed while held"

    def check_memory(self) -> None:
        """Three snapshots and three copies, always distinct, and a spare one whenever one is needed."""
        for end, busy in ((self.outbox, "_in_flight"), (self.inbox, "_held")):
            with end._lock:
                places = [end._spare, end._waiting, getattr(end, busy), *end._free]
                held = [snapshot for snapshot in places if snapshot is not None]
                assert len(held) == len(set(map(id, held))) == 3
                assert end._free or (end._waiting is not None and getattr(end, busy) is not None)


class Delivery(RuleBasedStateMachine):
    """Posts, steps of both couriers, landings, takes and failures in any order."""

    outboxes, inboxes = BackgroundOutbox, BackgroundInbox

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.network: Network | None = None

    @rule(seed=st.integers(0, 10**6), fails=st.sampled_from([False, False, False, True]))
    @precondition(lambda self: self.network is None)
    def begin(self, seed: int, fails: bool) -> None:
        self.network, self.fails = Network(lambda: self.ready, seed), fails
        self.mailbox = Mailbox(self.network, self.outboxes, self.inboxes)
        self.posted = 0

    @rule()
    @precondition(lambda self: self.network is not None)
    def post(self) -> None:
        calls = self.network.calls
        self.posted += 1
        post(self.mailbox.outbox, self.posted)
        assert self.network.calls == calls, "a post that calls MPI may wait"

    @rule(ready=st.booleans(), passed_s=st.sampled_from([0.0, 0.02, 6.0]))
    @precondition(lambda self: self.network is not None)
    def send(self, ready: bool, passed_s: float) -> None:
        CLOCK.now_s += passed_s
        self.ready = ready
        self.mailbox.sending.carry()

    @rule(ready=st.booleans(), passed_s=st.sampled_from([0.0, 0.02, 6.0]))
    @precondition(lambda self: self.network is not None)
    def receive(self, ready: bool, passed_s: float) -> None:
        CLOCK.now_s += passed_s
        self.ready = ready
        self.mailbox.receiving.carry()

    @rule(steps=st.lists(st.sampled_from(["land", "send", "receive"]), max_size=10))
    @precondition(lambda self: self.network is not None)
    def go_on(self, steps: list[str]) -> None:
        self.ready = True
        CLOCK.now_s += background.LONGEST_PAUSE_S
        for step in steps:
            if step == "land":
                self.network.land(1)
            else:
                (self.mailbox.sending if step == "send" else self.mailbox.receiving).carry()
            self.arrived()

    @rule()
    @precondition(lambda self: self.network is not None)
    def an_older_answer_lands(self) -> None:
        """Over one that has just come, as that of another rank may, or one of this rank that was long on its way."""
        self.ready = True
        self.network.land_all()
        self.mailbox.receiving.carry()
        self.network.land_all()
        self.network.memory[SENDER][ANSWER : ANSWER + WORD_BYTES] = 0

    @rule(number=st.integers(1, 6))
    @precondition(lambda self: self.network is not None)
    def land(self, number: int) -> None:
        self.network.land(number)

    @rule()
    @precondition(lambda self: self.network is not None)
    def take(self) -> None:
        self.mailbox.take()
        assert self.mailbox.taken <= self.posted

    @rule()
    @precondition(lambda self: self.network is not None and self.fails and self.posted > 3)
    def fail(self) -> None:
        """From now on every call fails, as for a process that has died."""
        self.network.failure = self.network.failure or MpiError(MPI.ERR_OTHER)

    @rule()
    @precondition(lambda self: self.network is not None)
    def go_on_to_the_end(self) -> None:
        """Once all lands, and requests complete, what was posted last arrives, whatever was on its way."""
        self.ready = True
        # One message is under way and one waits; each is sent twice at the most, and answered.
        for _ in range(8):
            self.network.land_all()
            CLOCK.now_s += background.REPEAT_AFTER_S
            self.mailbox.receiving.carry()
            self.network.land_all()
            self.mailbox.sending.carry()
        assert not self.mailbox.outbox.pending, "a message has not arrived"
        if self.network.failure is None:
            self.mailbox.take()
            assert self.mailbox.taken == self.posted

    @invariant()
    def arrived(self) -> None:
        """What is not pending is there, or was taken."""
        if self.network is not None and self.network.failure is None and not self.mailbox.outbox.pending:
            self.mailbox.take()
            assert self.mailbox.taken == self.posted, "called arrived before it was"

    @invariant()
    def memory(self) -> None:
        if self.network is not None:
            self.mailbox.check_held()
            self.mailbox.check_memory()


class Turning(RuleBasedStateMachine):
    """Edges that turn, as those of the ring of survivors: two ranks send to two others, now to one, now to the other.

    Each receiver has one slot for both, and each sender one word for the answers of both. Who sends to whom and who
    heeds whom changes at any time, not at once, so both may write into one slot.
    """

    outboxes, inboxes = BackgroundOutbox, BackgroundInbox
    SENDERS, RECEIVERS = (0, 1), (2, 3)

    @initialize(seed=st.integers(0, 10**6))
    def begin(self, seed: int) -> None:
        self.network = Network(lambda: True, seed, ranks=4)
        windows = [Window(self.network, rank) for rank in range(4)]
        self.pairs = [(sender, receiver) for sender in self.SENDERS for receiver in self.RECEIVERS]
        self.out = {(s, r): self.outboxes(windows[s], r, SLOT, ANSWER, CAPACITY) for s, r in self.pairs}
        self.inb = {(s, r): self.inboxes(windows[r], s, SLOT, ANSWER, CAPACITY) for s, r in self.pairs}
        self.peers: dict[int, list[Peer]] = {rank: [] for rank in range(4)}
        for sender, receiver in self.pairs:
            sending, receiving = Peer(receiver, None), Peer(sender, None)
            sending.add(self.out[sender, receiver])
            receiving.add(self.inb[sender, receiver])
            self.inb[sender, receiver].heeded = False
            self.peers[sender].append(sending)
            self.peers[receiver].append(receiving)
        self.target: dict[int, int] = {}
        self.number, self.posted = [0, 0], [0, 0]
        self.taken = dict.fromkeys(self.pairs, 0)

    def turn(self, sender: int, receiver: int) -> None:
        """As `Survivors` does."""
        if sender in self.target:
            self.number[sender] = self.out[sender, self.target[sender]].end()
        self.target[sender] = receiver
        self.out[sender, receiver].begin_at(self.number[sender])

    def heed(self, receiver: int, sender: int) -> None:
        for other in self.SENDERS:
            self.inb[other, receiver].heeded = other == sender

    @rule(sender=st.sampled_from(SENDERS), receiver=st.sampled_from(RECEIVERS))
    def turns(self, sender: int, receiver: int) -> None:
        if self.target.get(sender) != receiver:
            self.turn(sender, receiver)

    @rule(sender=st.sampled_from(SENDERS), receiver=st.sampled_from(RECEIVERS))
    def heeds(self, sender: int, receiver: int) -> None:
        self.heed(receiver, sender)

    @rule(sender=st.sampled_from(SENDERS))
    def post(self, sender: int) -> None:
        if sender in self.target:
            self.posted[sender] += 1
            # Those of one sender are odd, of the other even.
            post(self.out[sender, self.target[sender]], 2 * self.posted[sender] + sender)

    def carry(self, *ranks: int) -> None:
        for rank in ranks:
            for peer in self.peers[rank]:
                peer.carry()

    @rule(
        steps=st.lists(st.sampled_from([0, 1, 2, 3, "land", "land all"]), min_size=3, max_size=12),
        passed_s=st.sampled_from([0.02, 0.2, 6.0]),
    )
    def go_on(self, steps: list[Any], passed_s: float) -> None:
        """The couriers of these ranks come by, and words land."""
        CLOCK.now_s += passed_s
        for step in steps:
            if step == "land all":
                self.network.land_all()
            elif step == "land":
                self.network.land(1)
            else:
                self.carry(step)

    @rule(sender=st.sampled_from(SENDERS), pieces=st.integers(1, 3))
    def a_look_at_a_part_of_a_message(self, sender: int, pieces: int) -> None:
        if sender not in self.target:
            return
        receiver = self.target[sender]
        self.heed(receiver, sender)
        self.post(sender)
        self.carry(sender)
        self.network.land(pieces)
        CLOCK.now_s += background.LONGEST_PAUSE_S
        self.carry(receiver)
        self.take(receiver, sender)

    @rule(sender=st.sampled_from(SENDERS))
    def a_turn_that_is_noticed_late(self, sender: int) -> None:
        """The receiver of before takes its message, and answers it, once the next has answered that of its own."""
        if sender not in self.target:
            return
        before = self.target[sender]
        after = next(rank for rank in self.RECEIVERS if rank != before)
        self.post(sender)
        self.carry(sender)
        self.network.land_all()
        self.turn(sender, after)
        self.post(sender)
        self.carry(sender)
        for receiver in (after, before):
            self.heed(receiver, sender)
            self.network.land_all()
            CLOCK.now_s += background.LONGEST_PAUSE_S
            self.carry(receiver)
        self.network.land_all()

    @rule(receiver=st.sampled_from(RECEIVERS), sender=st.sampled_from(SENDERS))
    def take(self, receiver: int, sender: int) -> None:
        message = self.inb[sender, receiver].take()
        if message is not None:
            assert message.sender == sender and message.update % 2 == sender, "a message of another rank"
            assert message.update > self.taken[sender, receiver], "an older message after a newer one"
            assert np.array_equal(message.payload.view(np.int64), content(message.update)), "a torn message"
            self.taken[sender, receiver] = message.update

    @rule(crossed=st.booleans())
    def all_agree_and_go_on(self, crossed: bool) -> None:
        """Then what is posted arrives, whatever was on its way."""
        for sender, receiver in zip(self.SENDERS, self.RECEIVERS[::-1] if crossed else self.RECEIVERS, strict=True):
            self.turns(sender, receiver)
            self.heed(receiver, sender)
            self.post(sender)
        for _ in range(10):
            self.network.land_all()
            CLOCK.now_s += background.REPEAT_AFTER_S
            self.carry(*self.RECEIVERS)
            self.network.land_all()
            self.carry(*self.SENDERS)
        for sender, receiver in self.target.items():
            assert not self.out[sender, receiver].pending, "a message has not arrived"
            self.take(receiver, sender)
            assert self.taken[sender, receiver] == 2 * self.posted[sender] + sender

    @invariant()
    def arrived(self) -> None:
        """What is not pending was taken."""
        for pair in getattr(self, "target", {}).items():
            if not self.out[pair].pending and self.out[pair]._number > self.number[pair[0]]:
                assert self.inb[pair]._taken >= self.out[pair]._number, "called arrived before it was"


def edges_that_turn() -> None:
    """Every property, whoever sends to whom, and whoever heeds whom."""
    background.time = CLOCK  # type: ignore[assignment]
    how = settings(max_examples=200, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate])
    run_state_machine_as_test(Turning, settings=how)


def any_order() -> None:
    """Every property, in whatever order steps and landings come."""
    background.time = CLOCK  # type: ignore[assignment]
    # The first that is found is reported as it is: to make it short takes minutes.
    how = settings(max_examples=300, stateful_step_count=50, deadline=None, database=None, phases=[Phase.generate])
    run_state_machine_as_test(Delivery, settings=how)


def three_threads() -> None:
    """The same with a thread for each courier, requests that complete after some tests, and words that land later."""
    rng = random.Random(0)
    background.REPEAT_AFTER_S, background.LONGEST_PAUSE_S = 0.01, 1e-3
    network = Network(lambda: rng.random() < 0.3)
    mailbox = Mailbox(network, BackgroundOutbox, BackgroundInbox)
    ending = threading.Event()
    errors: list[BaseException] = []

    def carry(peer: Peer) -> None:
        try:
            while not ending.is_set():
                network.land(rng.randrange(4))
                peer.carry()
                mailbox.check_memory()
        except BaseException as error:
            errors.append(error)

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    peers = (mailbox.sending, mailbox.receiving)
    threads = [threading.Thread(target=carry, args=[peer], daemon=True) for peer in peers]
    for thread in threads:
        thread.start()
    skipped = quick = 0
    for update in range(1, 2001):
        post(mailbox.outbox, update)
        patient = update % 50 < 5
        if patient:
            deadline = time.monotonic() + 60
            while mailbox.outbox.pending and not errors:
                assert time.monotonic() < deadline
                time.sleep(1e-5)
        before = mailbox.taken
        mailbox.take()
        skipped, quick = skipped + (mailbox.taken > before + 1), quick + (mailbox.taken == before + 1)
        if errors:
            break
        assert mailbox.taken == update or not patient
    ending.set()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch_s)
    assert not errors, errors
    # Both kinds of encounter were met.
    assert skipped > 20 and quick > 50, (skipped, quick)


class Communicator:
    """As much of one as a Courier uses."""

    rank, size = SENDER, 3

    def Dup(self) -> Communicator:
        return self

    def Irecv(self, *_: Any) -> Communicator:
        return self

    def Test(self) -> bool:
        return False

    def Cancel(self) -> None:
        pass

    Wait = Free = Cancel


def courier_with(*networks: Network) -> tuple[Courier, list[BackgroundOutbox], list[BackgroundInbox]]:
    """A courier that runs, with an outbox to rank 1, 2, ... over each network, and the inboxes there."""
    couriers.node_leaders = lambda comm: list(range(comm.size))
    couriers.may_call_from_threads = lambda: True
    couriers.may_hang_on_the_dead = lambda: False
    courier = Courier(Communicator(), "background")  # type: ignore[arg-type]
    outboxes, inboxes = [], []
    for target, network in enumerate(networks, 1):
        mailbox = Mailbox(network, BackgroundOutbox, BackgroundInbox)
        outboxes.append(courier.add(mailbox.outbox, target))
        inboxes.append(mailbox.inbox)
    return courier, outboxes, inboxes


def receive(network: Network, inbox: BackgroundInbox) -> int | None:
    """All lands; the other rank's courier comes by; what its learner then takes."""
    network.land_all()
    inbox.look()
    inbox.start()
    network.land_all()
    message = inbox.take()
    return None if message is None else message.update


def drained(courier: Courier, *mailboxes: tuple[Network, BackgroundInbox]) -> bool:
    """`drain`, while other ranks' couriers come by."""
    ending = threading.Event()

    def run() -> None:
        while not ending.is_set():
            for network, inbox in mailboxes:
                network.land_all()
                inbox.look()
                inbox.start()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        return courier.drain(10)
    finally:
        ending.set()
        thread.join()


def a_lost_rank_costs_its_own_messages_alone() -> None:
    dead, living = Network(lambda: True), Network(lambda: True)
    courier, outboxes, (_, inbox) = courier_with(dead, living)
    dead.failure = MpiError(MPI.ERR_OTHER)
    for update in range(1, 4):
        for outbox in outboxes:
            post(outbox, update)
        assert drained(courier, (living, inbox))
        message = inbox.take()
        assert message is not None and message.update == update
    courier.check()
    assert not dead.puts and dead.calls == 1
    courier.free()


def an_unexpected_error_ends_the_thread_and_is_raised() -> None:
    network = Network(lambda: True)
    courier, (outbox,), _ = courier_with(network)
    courier.check()
    network.failure = ZeroDivisionError("unexpected")
    post(outbox, 1)
    for raises in (lambda: courier.drain(10), courier.check, courier.check):
        try:
            raises()
        except RuntimeError as error:
            assert isinstance(error.__cause__, ZeroDivisionError)
        else:
            raise AssertionError("nothing was raised")
    network.failure = None
    # All the same its end is no hang.
    courier.free()


def drain_waits_no_longer_than_its_deadline() -> None:
    stuck, living = Network(lambda: False), Network(lambda: True)
    courier, outboxes, (stopped, inbox) = courier_with(stuck, living)
    for outbox in outboxes:
        post(outbox, 1)
    begin = time.monotonic()
    assert not courier.drain(0.3)
    assert 0.3 <= time.monotonic() - begin < 5
    assert receive(living, inbox) == 1
    begin = time.monotonic()
    assert courier.drain(10, without=[1])
    assert time.monotonic() - begin < 5
    # Posts still do not wait, and what they replace is not sent once the way is free.
    for update in range(2, 50):
        post(outboxes[0], update)
    stuck.completes = lambda: True
    assert drained(courier, (stuck, stopped))
    message = stopped.take()
    assert message is not None and message.update == 49
    courier.free()


class Pings:
    """A window through which peers are pinged: each ping is answered once the check says so."""

    answered = False
    started = 0

    def start_read(self, *_: Any) -> Pings:
        self.started += 1
        return self

    def Test(self) -> bool:
        return self.answered


def nothing_is_started_before_the_peer_has_answered() -> None:
    """Neither a message nor an answer; and behind what is started there is the next ping, one a peer."""
    network, pings = Network(lambda: True), Pings()
    mailbox = Mailbox(network, BackgroundOutbox, BackgroundInbox)
    sending, receiving = Peer(RECEIVER, pings), Peer(SENDER, pings)  # type: ignore[arg-type]
    sending.add(mailbox.outbox)
    receiving.add(mailbox.inbox)
    for peer in (sending, receiving):
        peer.carry()
    assert pings.started == 2
    post(mailbox.outbox, 1)
    for _ in range(3):
        sending.carry()
    assert not network.puts and pings.started == 2
    pings.answered = True
    sending.carry()
    assert len(network.puts) == 1 and pings.started == 3
    pings.answered = False
    network.land_all()
    for _ in range(3):
        receiving.carry()
    assert mailbox.inbox.fresh() and mailbox.outbox.pending and not network.puts
    pings.answered = True
    receiving.carry()
    network.land_all()
    sending.carry()
    assert not mailbox.outbox.pending


CHECKS = {
    check.__name__: check
    for check in (
        any_order,
        edges_that_turn,
        three_threads,
        a_lost_rank_costs_its_own_messages_alone,
        an_unexpected_error_ends_the_thread_and_is_raised,
        drain_waits_no_longer_than_its_deadline,
        nothing_is_started_before_the_peer_has_answered,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    kinds = [*BROKEN_BACKGROUND_OUTBOXES, *BROKEN_BACKGROUND_INBOXES]
    parser.add_argument("--broken", choices=kinds, help="a wrong end of the mailbox, for any_order, edges_that_turn")
    arguments = parser.parse_args()
    for machine in (Delivery, Turning):
        machine.outboxes = BROKEN_BACKGROUND_OUTBOXES.get(arguments.broken, BackgroundOutbox)
        machine.inboxes = BROKEN_BACKGROUND_INBOXES.get(arguments.broken, BackgroundInbox)
    CHECKS[arguments.check]()


if __name__ == "__main__":
    main()
