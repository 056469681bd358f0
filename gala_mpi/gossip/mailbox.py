"""Mailboxes: wait-free delivery of the newest message from one sender to one receiver.

A mailbox lies in the receiver's window: one control word on a cache line of its own, and three slots. At all
times `back` (known to the sender), `middle` (in the control word) and `front` (known to the receiver) are a
permutation of 0, 1, 2, so no slot is ever written and read at once, and neither side waits for the other.

    control word = index of the middle slot (bits 0-1) | FRESH (bit 2)

    word         written by                              read by
    slot back    the sender: stores, done at Win_sync,   nobody
                 or a Put, done at its Flush
    slot front   nobody                                  the receiver, by plain loads
    control      sender and receiver: an atomic swap     the same two

The sender's Win_sync (in a window that is shared inside a node) or Flush orders what it wrote before the swap that
publishes it; the receiver's swap, flushed, and Win_sync order that publication before its loads, and its loads before
the swap that gives the slot away.

Between nodes, where a courier carries, there is another protocol: see `background`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Required, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from gala_mpi.mpi.window import PAGE_BYTES, Bytes, Window

SLOTS = 3
FRESH = 4
CACHE_LINE_BYTES = 64

HEADER = np.dtype(
    [
        ("update", "<i8"),
        ("time_s", "<f8"),
        ("agent_steps", "<i8"),
        ("sender", "<i4"),
        ("wire", "<i2"),
        ("last", "<i2"),
        ("nbytes", "<i8"),
        ("number", "<i8"),
        ("attempt", "<i8"),
        ("checksum", "<u8"),
    ]
)
assert HEADER.itemsize == CACHE_LINE_BYTES


@dataclass(frozen=True)
class Place:
    """Where a mailbox lies in its window, in bytes; a slot's header ends where its page-aligned payload begins."""

    control: int
    slots: tuple[int, int, int]
    capacity: int

    def check(self, nbytes: int) -> None:
        """Raise ValueError if a payload of `nbytes` does not fit."""
        if nbytes > self.capacity:
            raise ValueError(f"payload of {nbytes} bytes exceeds the capacity of {self.capacity}")


def lay_out(capacities: Sequence[int]) -> tuple[list[Place], int]:
    """Places of mailboxes with the given payload capacities, and the bytes that they need in all."""
    offset = whole_pages(CACHE_LINE_BYTES * len(capacities))
    places = []
    for index, capacity in enumerate(capacities):
        stride = PAGE_BYTES + whole_pages(capacity)
        first, second, third = (offset + slot * stride + PAGE_BYTES for slot in range(SLOTS))
        places.append(Place(CACHE_LINE_BYTES * index, (first, second, third), capacity))
        offset += SLOTS * stride
    return places, offset


def whole_pages(nbytes: int) -> int:
    """So many bytes, rounded up to pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True)
class Message:
    """What an inbox gives: the header's fields, and a view of the payload, valid until the next `take` when `fresh`."""

    sender: int
    number: int
    update: int
    time_s: float
    agent_steps: int
    wire: int
    last: bool
    payload: Bytes


def message_of(header: np.void, payload: Bytes) -> Message:
    """A message as an inbox gives it out."""
    return Message(
        sender=int(header["sender"]),
        number=int(header["number"]),
        update=int(header["update"]),
        time_s=float(header["time_s"]),
        agent_steps=int(header["agent_steps"]),
        wire=int(header["wire"]),
        last=bool(header["last"]),
        payload=payload,
    )


class About(TypedDict, total=False):
    """What a message says of itself, beside its payload: fields of the header."""

    update: Required[int]
    time_s: Required[float]
    agent_steps: Required[int]
    wire: int
    last: bool


def fill(header: npt.NDArray[np.void], sender: int, number: int, nbytes: int, about: About) -> None:
    """Write a header (1,), without an attempt and a checksum, which `background` has."""
    wire, last = about.get("wire", 0), about.get("last", False)
    header[0] = (about["update"], about["time_s"], about["agent_steps"], sender, wire, last, nbytes, number, 0, 0)


class Delivery(Protocol):
    """A way for messages to one receiver: `post`, or to write into the `slot` and then `publish`.

    An Outbox is the inline way: done when the call returns.
    """

    target: int

    @property
    def pending(self) -> bool:
        """Whether a message waits or is on its way."""

    def slot(self, nbytes: int) -> Bytes | None:
        """Where to write the payload of the next message, if that can be done by stores; nothing else reads it.

        Raises ValueError if `nbytes` exceed the capacity.
        """

    def publish(self, nbytes: int, **about: Unpack[About]) -> None:
        """Publish the first `nbytes` of what was written into the slot in place of whatever was not taken yet."""

    def post(self, payload: npt.NDArray[Any], **about: Unpack[About]) -> None:
        """Publish `payload` (contiguous). The caller may change it afterwards. Raises ValueError as `slot` does."""


class Outbox:
    """The sending end of a mailbox in the window of rank `target`; see `Delivery`. All calls are local.

    `last` tells the receiver that no further message will come.
    """

    def __init__(self, window: Window, target: int, place: Place) -> None:
        self._window, self.target, self._place = window, target, place
        self._back = self._number = 0
        self._header = np.zeros(1, HEADER)

    @property
    def pending(self) -> bool:
        """See `Delivery.pending`."""
        return False

    def slot(self, nbytes: int) -> Bytes | None:
        """See `Delivery.slot`."""
        self._place.check(nbytes)
        return self._window.shared_memory(self.target, self._place.slots[self._back], nbytes)

    def publish(self, nbytes: int, **about: Unpack[About]) -> None:
        """See `Delivery.publish`."""
        self._number += 1
        fill(self._header, self._window.rank, self._number, nbytes, about)
        self._window.put(self._header, self.target, self._place.slots[self._back] - HEADER.itemsize)
        self._window.flush(self.target)
        self._back = self._window.swap(self.target, self._place.control, self._back | FRESH) & 3
        # The receiver's loads from the slot that this brought home are over before it is written.
        self._window.sync()

    def post(self, payload: npt.NDArray[Any], **about: Unpack[About]) -> None:
        """See `Delivery.post`."""
        self._place.check(payload.nbytes)
        self._window.put(payload, self.target, self._place.slots[self._back])
        self.publish(payload.nbytes, **about)


class Inbox:
    """The receiving end of a mailbox in this rank's own window. All calls are local.

    Making it sets the control word, so a barrier must lie between that and the sender's first post.
    """

    def __init__(self, window: Window, place: Place) -> None:
        self._window, self._place = window, place
        self._front = 2
        window.swap(window.rank, place.control, 1)

    def fresh(self) -> bool:
        """Whether a message waits that was not taken yet."""
        return bool(self._window.load(self._window.rank, self._place.control) & FRESH)

    def take(self) -> Message | None:
        """The newest message, or None if none came since the last `take`.

        The message taken before is valid until then.
        """
        if not self.fresh():
            return None
        # The loads from the old front slot must be over before the sender may own it.
        self._window.sync()
        self._front = self._window.swap(self._window.rank, self._place.control, self._front) & 3
        self._window.sync()
        slot = self._place.slots[self._front]
        header = self._window.memory(slot - HEADER.itemsize, HEADER.itemsize).view(HEADER)[0]
        return message_of(header, self._window.memory(slot, int(header["nbytes"])))
