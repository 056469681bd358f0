"""Ends of the mailbox that are wrong in one way each, to see whether the stress program notices."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gala_mpi.gossip.courier import BackgroundOutbox, Snapshot
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


class Done:
    """A request that is complete."""

    def Test(self) -> bool:
        return True


class PutsAfterTheSwap:
    """A window in which a Put happens only after the swap that follows it."""

    def __init__(self, window: Window) -> None:
        self._window, self.rank, self.polled = window, window.rank, window.polled

    def start_put(self, *put: Any) -> Done:
        self._put = put
        return Done()

    def start_ping(self, *_: Any) -> Done:
        return Done()

    def flush(self, target: int) -> None:
        self._window.flush(target)

    def start_swap(self, *swap: Any) -> Done:
        self._window.start_swap(*swap).Wait()
        time.sleep(200e-6)
        self._window.start_put(*self._put).Wait()
        self._window.flush(self._put[1])
        return Done()


class PublishesBeforeThePutIsDone(BackgroundOutbox):
    """Wrong: starts the swap although the Put is not complete."""

    def __init__(self, window: Window, target: int, place: Place) -> None:
        super().__init__(PutsAfterTheSwap(window), target, place)


class ReusesTheSnapshotInFlight(BackgroundOutbox):
    """Wrong: writes the next message over the one that the courier sends."""

    def __init__(self, window: Window, target: int, place: Place) -> None:
        super().__init__(window, target, place)
        self._free = [self._spare, self._spare]

    def post(self, payload: np.ndarray, **header: Any) -> None:
        # Long enough between header and payload for the courier to come by.
        self._spare.header["update"] = header["update"]
        time.sleep(300e-6)
        super().post(payload, **header)


class SendsTheBufferItself(BackgroundOutbox):
    """Wrong: copies the payload when it is sent, not when it is posted."""

    def post(self, payload: np.ndarray, **header: Any) -> None:
        super().post(payload, **header)
        self._payload = payload

    def _step(self) -> bool:
        with self._lock:
            if self._waiting is not None:
                payload = self._payload[: (self._waiting.nbytes - HEADER.itemsize) // self._payload.itemsize]
                self._waiting.memory[HEADER.itemsize : self._waiting.nbytes] = payload.view(np.uint8)
        return super()._step()


class NeverAdopts(BackgroundOutbox):
    """Wrong: goes on writing the slot that it published."""

    def _step(self) -> bool:
        back = self._back
        going = super()._step()
        self._back = back
        return going


class SwapsTwiceAtOnce(BackgroundOutbox):
    """Wrong: sends the next message before the swap of the last one has brought the new slot home."""

    def __init__(self, window: Window, target: int, place: Place) -> None:
        super().__init__(window, target, place)
        self._free.append(Snapshot(place.capacity))

    def _step(self) -> bool:
        if self._stage == "swap" and self._under_way and self._waiting is not None:
            with self._lock:
                message, self._waiting = self._waiting, None
            slot = self._place.slots[self._back] - HEADER.itemsize
            self._window.start_put(message.memory[: message.nbytes], self.target, slot).Wait()
            self._window.flush(self.target)
            before = np.zeros(1, np.int64)
            swap = self._window.start_swap(self._word, before, self.target, self._place.control)
            self._under_way[0].Wait()
            self._under_way, self._before = [swap], before
            with self._lock:
                self._free.append(message)
        return super()._step()


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
                self._free.append(Snapshot(self._place.capacity))
        super().post(payload, **header)

    def _step(self) -> bool:
        going = super()._step()
        with self._lock:
            if self._waiting is None and self._replaced is not None:
                self._waiting, self._replaced = self._replaced, None
        return going


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


BROKEN_OUTBOXES = {
    kind.__name__: kind for kind in (KeepsItsSlot, PublishesFirst, PublishesHalf, KeepsTheOldest, PostsToAnother)
}
BROKEN_BACKGROUND_OUTBOXES = {
    kind.__name__: kind
    for kind in (
        PublishesBeforeThePutIsDone,
        ReusesTheSnapshotInFlight,
        SendsTheBufferItself,
        NeverAdopts,
        SwapsTwiceAtOnce,
        KeepsTheOldestWaiting,
        SendsTheReplacedOneLater,
        WaitsInPost,
        CallsItDoneInFlight,
    )
}
BROKEN_INBOXES = {kind.__name__: kind for kind in (ReadsInPlace,)}
