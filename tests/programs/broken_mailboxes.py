"""Ends of the mailbox that are wrong in one way each, to see whether the stress program notices."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from gala_mpi.mailbox import FRESH, Inbox, Message, Outbox, Place
from gala_mpi.window import Window


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


BROKEN_OUTBOXES = {
    kind.__name__: kind for kind in (KeepsItsSlot, PublishesFirst, PublishesHalf, KeepsTheOldest, PostsToAnother)
}
BROKEN_INBOXES = {kind.__name__: kind for kind in (ReadsInPlace,)}
