"""Ends of the mailbox that are wrong in one way each, to see whether the stress program notices."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from gala_mpi.gossip.background import BackgroundInbox, BackgroundOutbox, Snapshot
from gala_mpi.gossip.mailbox import FRESH, HEADER, Inbox, Message, Outbox, Place
from gala_mpi.mpi.waiting import wait_until
from gala_mpi.mpi.window import Window


class KeepsItsSlot(Outbox):
    """Wrong: goes on writing the slot that it published."""

    def post(self, payload: np.ndarray, **header: Any) -> None:
        back = self._back
        super().post(payload, **header)
        self._back = back


class PublishesFirst(Outbox):
    """Wrong: publishes a slot, then writes it."""

    def post(self, payload: np.ndarray, **header: Any) -> None:
        published = self._back
        after = self._window.swap(self.target, self._place.control, published | FRESH) & 3
        # Long enough for a receiver that polls to come by, also on a busy machine.
        time.sleep(200e-6)
        swap, self._window.swap = self._window.swap, lambda *_: after
        super().post(payload, **header)
        self._window.swap = swap


class PublishesHalf(Outbox):
    """Wrong: writes the second half of the payload after the publication."""

    def post(self, payload: np.ndarray, **header: Any) -> None:
        slot = self._place.slots[self._back]
        half = payload.copy()
        half[len(half) // 2 :] = 0
        super().post(half, **header)
        time.sleep(200e-6)
        self._window.put(payload, self.target, slot)
        self._window.flush(self.target)


class KeepsTheOldest(Outbox):
    """Wrong: throws a message away while the one before it was not taken yet."""

    def post(self, payload: np.ndarray, **header: Any) -> None:
        if not self._window.load(self.target, self._place.control) & FRESH:
            super().post(payload, **header)


class PostsToAnother(Outbox):
    """Wrong: posts to the rank after the one that it was made for."""

    def __init__(self, window: Window, target: int, place: Place) -> None:
        super().__init__(window, (target + 1) % len(window._shifts), place)


class ReadsInPlace(Inbox):
    """Wrong: reads the middle slot where it is, and gives no slot for it."""

    def take(self) -> Message | None:
        self._front = self._window.load(self._window.rank, self._place.control) & 3
        return super().take()


class ReusesTheSnapshotInFlight(BackgroundOutbox):
    """Wrong: writes the next message over the one that the courier sends."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._free = [self._spare, self._spare]


class SendsTheBufferItself(BackgroundOutbox):
    """Wrong: copies the payload when it is sent, not when it is posted."""

    def post(self, payload: np.ndarray, **header: Any) -> None:
        super().post(payload, **header)
        self._payload = payload

    def start(self) -> None:
        with self._lock:
            if self._waiting is not None:
                payload = self._payload[: self._waiting.nbytes // self._payload.itemsize]
                self._waiting.payload[:] = payload.view(np.uint8)
        super().start()


class KeepsTheOldestWaiting(BackgroundOutbox):
    """Wrong: throws a message away while the one before it still waits."""

    def post(self, payload: np.ndarray, **header: Any) -> None:
        if self._waiting is None:
            super().post(payload, **header)


class SendsTheReplacedOneLater(BackgroundOutbox):
    """Wrong: keeps a message that was replaced, and sends it after the newer one."""

    _replaced: Snapshot | None = None

    def post(self, payload: np.ndarray, **header: Any) -> None:
        with self._lock:
            if self._waiting is not None:
                self._replaced, self._waiting = self._waiting, None
                self._free.append(Snapshot(self._capacity))
        super().post(payload, **header)

    def start(self) -> None:
        super().start()
        with self._lock:
            if self._waiting is None and self._replaced is not None:
                self._waiting, self._replaced = self._replaced, None


class WaitsInPost(BackgroundOutbox):
    """Wrong: does not return before the message has arrived."""

    def post(self, payload: np.ndarray, **header: Any) -> None:
        super().post(payload, **header)
        wait_until(lambda: not self.pending, 10)


class CallsItDoneInFlight(BackgroundOutbox):
    """Wrong: calls a message arrived when it has only been fetched."""

    @property
    def pending(self) -> bool:
        return self._waiting is not None


class CallsItDoneWhenTheNetworkHasIt(BackgroundOutbox):
    """Wrong: takes the end of its Put for an answer."""

    def look(self) -> None:
        if self._put is not None and self.settled() and self._in_flight is not None:
            self._answer[0] = self._in_flight.number
        super().look()


class GivesOutTheSlot(BackgroundInbox):
    """Wrong: checks a copy, and gives out the slot itself."""

    def take(self) -> Message | None:
        message = super().take()
        if message is None:
            return None
        return replace(message, payload=self._slot[HEADER.itemsize : HEADER.itemsize + len(message.payload)])


class TakesWithoutACheck(BackgroundInbox):
    """Wrong: takes whatever lies in the slot once the header has landed."""

    def look(self) -> None:
        self._spare.copy_whole = lambda slot, *_: self._copy(slot)
        super().look()

    def _copy(self, slot: np.ndarray) -> bool:
        snapshot = self._spare
        snapshot.memory[:] = slot
        return 0 <= snapshot.nbytes <= self._capacity


class TakesOlderOnesToo(BackgroundInbox):
    """Wrong: takes any message that has another number than the last."""

    def look(self) -> None:
        if int(self._next[0]) != self._taken:
            self._taken = min(self._taken, int(self._next[0]) - 1)
        super().look()


class AnswersBeforeItHasTaken(BackgroundInbox):
    """Wrong: answers as soon as a number lands."""

    def start(self) -> None:
        taken, self._taken = self._taken, int(self._next[0])
        super().start()
        self._taken = taken


class TakesFromAnybody(BackgroundInbox):
    """Wrong: takes whatever lies in the slot, whoever has sent it."""

    def look(self) -> None:
        self._source = int(self._slot[: HEADER.itemsize].view(HEADER)["sender"][0])
        super().look()


class NeverAnswersAgain(BackgroundInbox):
    """Wrong: answers each message once, whatever becomes of the answer."""

    def look(self) -> None:
        super().look()
        self._answer_again = False


BROKEN_OUTBOXES = {
    kind.__name__: kind for kind in (KeepsItsSlot, PublishesFirst, PublishesHalf, KeepsTheOldest, PostsToAnother)
}
BROKEN_BACKGROUND_OUTBOXES = {
    kind.__name__: kind
    for kind in (
        ReusesTheSnapshotInFlight,
        SendsTheBufferItself,
        KeepsTheOldestWaiting,
        SendsTheReplacedOneLater,
        WaitsInPost,
        CallsItDoneInFlight,
        CallsItDoneWhenTheNetworkHasIt,
    )
}
BROKEN_INBOXES = {kind.__name__: kind for kind in (ReadsInPlace,)}
BROKEN_BACKGROUND_INBOXES = {
    kind.__name__: kind
    for kind in (
        GivesOutTheSlot,
        TakesWithoutACheck,
        TakesOlderOnesToo,
        AnswersBeforeItHasTaken,
        NeverAnswersAgain,
        TakesFromAnybody,
    )
}
