"""mpirun -n 1 python tests/gossip/programs/courier_properties.py CHECK [--broken KIND]

Properties of the background outbox and of its courier, against a window that is none: its requests complete when the
check says so, and any of its calls can fail. The window itself asserts the order that the mailbox needs.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from broken_mailboxes import BROKEN_BACKGROUND_OUTBOXES
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from mpi4py import MPI

from gala_mpi.gossip import courier as couriers
from gala_mpi.gossip.courier import BackgroundOutbox, Courier
from gala_mpi.gossip.mailbox import FRESH, HEADER, lay_out
from gala_mpi.mpi.window import MpiError

CAPACITY = 8192
(PLACE,), NBYTES = lay_out([CAPACITY])


class Request:
    """A request of the window below."""

    def __init__(self, window: Window, at_completion: Callable[[], None]) -> None:
        self._window, self._at_completion = window, at_completion

    def Test(self) -> bool:
        self._window.called()
        if not self._window.completes():
            return False
        self._at_completion()
        return True


class Window:
    """A mailbox at its receiver, as late as MPI allows: a Put reads its buffer when its request completes and lands
    when the ping after it is answered, a swap happens when its request completes."""

    rank = 0

    def __init__(self, completes: Callable[[], bool]) -> None:
        self.completes = completes
        self.calls = 0
        self.failure: BaseException | None = None
        self._memory = np.zeros(NBYTES, np.uint8)
        self._control, self._front = 1, 2
        self._put: str | None = None  # in flight, complete, or None: landed
        self._swapping = False
        self._lock = threading.Lock()

    def called(self) -> None:
        self.calls += 1
        if self.failure is not None:
            raise self.failure

    def start_put(self, data: np.ndarray, target: int, offset: int) -> Request:
        self.called()
        assert self._put is None and not self._swapping, "a Put before the last message was published"
        slot = PLACE.slots.index(offset + HEADER.itemsize)
        with self._lock:
            assert slot not in (self._control & 3, self._front), "a Put into a slot that is not the sender's"
        as_it_was = data.copy()
        self._put = "in flight"
        self._landing = offset, as_it_was

        def complete() -> None:
            assert np.array_equal(data, as_it_was), "a snapshot was changed in flight"
            self._put = "complete"

        return Request(self, complete)

    def start_ping(self, answer: np.ndarray, target: int, offset: int) -> Request:
        self.called()

        def complete() -> None:
            assert self._put != "in flight", "a ping that is looked at before the Put is complete"
            if self._put == "complete":
                offset, data = self._landing
                self._memory[offset : offset + len(data)] = data
                self._put = None

        return Request(self, complete)

    def start_swap(self, value: np.ndarray, before: np.ndarray, target: int, offset: int) -> Request:
        self.called()
        assert self._put is None, "a publication before the Put has arrived"
        assert not self._swapping, "two swaps at once"
        assert offset == PLACE.control
        self._swapping = True
        operand = int(value[0])

        def complete() -> None:
            assert int(value[0]) == operand, "the operand of a swap was changed in flight"
            with self._lock:
                before[0], self._control = self._control, operand
            self._swapping = False

        return Request(self, complete)

    def take(self) -> int | None:
        """What an inbox does: the update of the newest message, which must be whole; None if there is none."""
        with self._lock:
            if not self._control & FRESH:
                return None
            self._control, self._front = self._front, self._control & 3
        slot = PLACE.slots[self._front]
        header = self._memory[slot - HEADER.itemsize : slot].view(HEADER)[0]
        payload = self._memory[slot : slot + header["nbytes"]].view(np.int64)
        assert header["nbytes"] == 8 * length(header["update"])
        assert (payload == header["update"]).all(), "a torn message"
        return int(header["update"])


def length(update: int) -> int:
    """Elements of the message: empty, full, and between."""
    return (0, CAPACITY // 8, 1, 7, 500)[update % 5]


def post(outbox: BackgroundOutbox, update: int) -> None:
    """Post, then change the buffer."""
    payload = np.full(length(update), update, np.int64)
    outbox.post(payload, update=update, time_s=0.0, agent_steps=0)
    payload[:] = -1


def check_snapshots(outbox: BackgroundOutbox) -> None:
    """The three are always distinct, and a post finds one that neither waits nor is in flight."""
    with outbox._lock:
        held = [s for s in (outbox._spare, outbox._waiting, outbox._in_flight, *outbox._free) if s is not None]
        assert len(held) == len(set(map(id, held))) == 3
        assert outbox._free or (outbox._waiting is not None and outbox._in_flight is not None)


class Delivery(RuleBasedStateMachine):
    """Posts, steps of the courier, takes and failures in any order."""

    kind = BackgroundOutbox

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.window = Window(lambda: self.ready)
        self.outbox = self.kind(self.window, 1, PLACE)  # type: ignore[arg-type]
        self.posted = self.taken = 0

    @rule()
    def post(self) -> None:
        calls = self.window.calls
        self.posted += 1
        post(self.outbox, self.posted)
        assert self.window.calls == calls, "a post that calls MPI may wait"

    @rule(ready=st.booleans())
    def carry(self, ready: bool) -> None:
        self.ready = ready
        going = self.outbox.carry()
        assert going == (self.window.failure is None and self.outbox._in_flight is not None)

    @rule()
    def take(self) -> None:
        update = self.window.take()
        if update is not None:
            assert self.taken < update <= self.posted, "an older message after a newer one"
            self.taken = update

    @rule()
    @precondition(lambda self: self.posted > 3)
    def fail(self) -> None:
        """From now on every call fails, as for a process that has died; the first one in whatever step is next."""
        self.window.failure = self.window.failure or MpiError(MPI.ERR_OTHER)

    @rule()
    def carry_to_the_end(self) -> None:
        """A message needs two steps at the most beyond the one that fetches it, and so does the one that waits."""
        self.ready = True
        for _ in range(6):
            self.outbox.carry()
        assert not self.outbox.pending
        if self.window.failure is None:
            self.take()
            assert self.taken == self.posted

    @invariant()
    def arrived(self) -> None:
        """What is not pending is there: the newest message, in the middle slot or taken already."""
        if not self.outbox.pending and self.window.failure is None:
            self.take()
            assert self.taken == self.posted, "called arrived before it was"

    @invariant()
    def snapshots(self) -> None:
        check_snapshots(self.outbox)


def any_order() -> None:
    """Every property, in whatever order the threads' steps come."""
    run_state_machine_as_test(
        Delivery, settings=settings(max_examples=200, stateful_step_count=40, deadline=None, database=None)
    )


def two_threads() -> None:
    """The same with a thread for each side, and requests that complete after some tests."""
    rng = random.Random(0)
    window = Window(lambda: rng.random() < 0.3)
    outbox = BackgroundOutbox(window, 1, PLACE)  # type: ignore[arg-type]
    ending = threading.Event()
    errors: list[BaseException] = []

    def carry() -> None:
        try:
            while not ending.is_set():
                outbox.carry()
                check_snapshots(outbox)
        except BaseException as error:
            errors.append(error)

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=carry)
    thread.start()
    taken = skipped = quick = 0
    for update in range(1, 3001):
        post(outbox, update)
        check_snapshots(outbox)
        patient = update % 50 < 5
        if patient:
            deadline = time.monotonic() + 10
            while outbox.pending and not errors:
                assert time.monotonic() < deadline
                time.sleep(1e-5)
        newest = window.take()
        if newest is not None:
            assert newest > taken
            skipped, quick = skipped + (newest > taken + 1), quick + (newest == taken + 1)
            taken = newest
        if errors:
            break
        assert taken == update or not patient
    ending.set()
    thread.join()
    sys.setswitchinterval(switch_s)
    assert not errors, errors
    # Both kinds of encounter were met.
    assert skipped > 20 and quick > 100, (skipped, quick)


class Communicator:
    """As much of one as a Courier uses."""

    rank, size = 0, 3

    def Dup(self) -> Communicator:
        return self

    def Irecv(self, *_: Any) -> Communicator:
        return self

    def Test(self) -> bool:
        return False

    def Cancel(self) -> None:
        pass

    Wait = Free = Cancel


def courier_with(*windows: Window) -> tuple[Courier, list[BackgroundOutbox]]:
    """A courier that runs, with an outbox to rank 1, 2, ... for each window."""
    couriers.node_leaders = lambda comm: list(range(comm.size))
    couriers.may_call_from_threads = lambda: True
    courier = Courier(Communicator(), "background")  # type: ignore[arg-type]
    outboxes = [courier.outbox(window, target, PLACE) for target, window in enumerate(windows, 1)]  # type: ignore[arg-type]
    assert all(isinstance(outbox, BackgroundOutbox) for outbox in outboxes)
    return courier, outboxes  # type: ignore[return-value]


def a_lost_rank_costs_its_own_messages_alone() -> None:
    dead, living = Window(lambda: True), Window(lambda: True)
    courier, outboxes = courier_with(dead, living)
    dead.failure = MpiError(MPI.ERR_OTHER)
    for update in range(1, 4):
        for outbox in outboxes:
            post(outbox, update)
        assert courier.drain(10)
        assert living.take() == update
    courier.check()
    assert dead.take() is None and dead.calls == 1
    courier.free()


def an_unexpected_error_ends_the_thread_and_is_raised() -> None:
    window = Window(lambda: True)
    courier, (outbox,) = courier_with(window)
    courier.check()
    window.failure = ZeroDivisionError("unexpected")
    post(outbox, 1)
    for raises in (lambda: courier.drain(10), courier.check, courier.check):
        try:
            raises()
        except RuntimeError as error:
            assert isinstance(error.__cause__, ZeroDivisionError)
        else:
            raise AssertionError("nothing was raised")
    # All the same its end is no hang.
    courier.free()


def drain_waits_no_longer_than_its_deadline() -> None:
    stuck, living = Window(lambda: False), Window(lambda: True)
    courier, outboxes = courier_with(stuck, living)
    for outbox in outboxes:
        post(outbox, 1)
    begin = time.monotonic()
    assert not courier.drain(0.3)
    assert 0.3 <= time.monotonic() - begin < 5
    begin = time.monotonic()
    assert courier.drain(10, without=[1])
    assert time.monotonic() - begin < 5
    assert living.take() == 1 and stuck.take() is None
    # Posts still do not wait, and what they replace is not sent once the way is free.
    for update in range(2, 50):
        post(outboxes[0], update)
    stuck.completes = lambda: True
    assert courier.drain(10) and stuck.take() == 49
    courier.free()


CHECKS = {
    check.__name__: check
    for check in (
        any_order,
        two_threads,
        a_lost_rank_costs_its_own_messages_alone,
        an_unexpected_error_ends_the_thread_and_is_raised,
        drain_waits_no_longer_than_its_deadline,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--broken", choices=BROKEN_BACKGROUND_OUTBOXES, help="a wrong outbox, for any_order")
    arguments = parser.parse_args()
    Delivery.kind = BROKEN_BACKGROUND_OUTBOXES.get(arguments.broken, BackgroundOutbox)
    CHECKS[arguments.check]()


if __name__ == "__main__":
    main()
