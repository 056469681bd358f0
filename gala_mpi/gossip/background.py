"""Mailboxes between nodes: numbered messages and their answers, by Put alone.

A mailbox lies in two windows: one slot for a message in the receiver's, one word for the answer in the sender's. The
sender's courier puts a message into the slot, and nothing more there until it is answered. The receiver's courier
copies the slot, and takes the copy for a message if it has the next number and its checksum fits; then it puts that
number into the sender's word. Neither side waits for the other: the learner leaves a message for its courier, in
place of one that still waits, and finds the newest that its courier has taken.

    word       written by                                  read by
    slot       the sender's courier: a Put                 the receiver's courier: loads, into a copy
    attempt    the sender's courier, a word of the slot    the receiver's courier: a load
    answer     the receiver's courier: a Put               the sender's courier: a load
    snapshots  the learner, then its courier, or the       one of the two; they change hands under a lock
               other way round

*No order is asked of the network.* Words of 8 bytes may land whenever and in whatever order they like, those of one Put
after those of a later one too, so there is no Flush, which might wait for a target that is gone, and no atomic.

- What is given out is whole: the checksum is made of the copy, which nobody writes, so no word that lands late can
  change what was checked. A copy that mixes two messages passes with a chance of about 2**-64.
- It is given out once, and never after a newer one: its number must be above the last.
- An answered message was taken: the number is put once the copy was checked, and only the message with that number
  can have it. So `pending` is over when the other rank has the message, not when the network has.
- The newest message arrives: the next is sent when the last was answered. A word of an older message that lands after
  that can spoil a newer one in the slot (it went unmissed, as both had the same value there). So what is not
  answered for `REPEAT_AFTER_S` is sent again, with the same number; once all late words have landed it is whole.
- An answer may be lost too, under an older one that lands late, or another rank's (see `survivors`). So each Put of a
  message has another `attempt`, and a receiver that sees another one in the slot answers again what it has taken.

`tests/gossip/background_model.py` goes through every order of a few messages of a few words.

For each such edge a sender needs three snapshots (one is written, one waits, one is under way), a receiver one slot
and three copies (one is filled, one waits, one is held).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from gala_mpi import _native
from gala_mpi.gossip.mailbox import CACHE_LINE_BYTES, HEADER, About, Message, fill, message_of, whole_pages
from gala_mpi.mpi.window import PAGE_BYTES, WORD_BYTES, Bytes, Window

if TYPE_CHECKING:
    from mpi4py.MPI import Request

# A message is some 30 ms on its way at 1 Gbit/s, and a receiver whose courier does not run answers nothing.
REPEAT_AFTER_S = 5.0
LONGEST_PAUSE_S = 0.1
HEADER_BYTES = HEADER.itemsize
# Of the header: all but the attempt and the checksum.
SEALED_BYTES = HEADER_BYTES - 2 * WORD_BYTES


class Snapshot:
    """A message in this rank's own memory: the header, the payload, and the number again behind it.

    The number behind the payload lands last where the network keeps an order: it saves looks at half a message.
    """

    def __init__(self, capacity: int) -> None:
        self.memory: Bytes = np.zeros(slot_bytes(capacity), np.uint8)
        self.header = self.memory[:HEADER_BYTES].view(HEADER)

    @property
    def nbytes(self) -> int:
        """Of the payload."""
        return int(self.header["nbytes"][0])

    @property
    def number(self) -> int:
        """The message's, from 1 on; 0 for none."""
        return int(self.header["number"][0])

    @property
    def sender(self) -> int:
        """The rank that sends it."""
        return int(self.header["sender"][0])

    @property
    def payload(self) -> Bytes:
        """A view."""
        return self.memory[HEADER_BYTES : HEADER_BYTES + self.nbytes]

    def sealed(self) -> Bytes:
        """The whole message, ready to be sent."""
        end = HEADER_BYTES + self.nbytes
        self.header["checksum"] = _native.checksum(self.payload, self._seed())
        self.memory[end : end + WORD_BYTES] = self.header["number"].view(np.uint8)
        return self.memory[: end + WORD_BYTES]

    def copy_whole(self, slot: Bytes, number: int, capacity: int) -> bool:
        """Copy the message of that number from memory that others write; whether it is whole."""
        self.memory[:HEADER_BYTES] = slot[:HEADER_BYTES]
        nbytes = self.nbytes
        if self.number != number or not 0 <= nbytes <= capacity:
            return False
        end = HEADER_BYTES + nbytes
        if slot[end : end + WORD_BYTES].tobytes() != self.header["number"].tobytes():
            return False
        found = _native.checked_copy(slot[HEADER_BYTES:end], self.payload, self._seed())
        return found == int(self.header["checksum"][0])

    def _seed(self) -> int:
        """Takes the header into the checksum, but for that itself, and the attempt, which a late word may change."""
        return _native.checksum(self.memory[:SEALED_BYTES])


def slot_bytes(capacity: int) -> int:
    """Of a message with a payload of at most `capacity` bytes."""
    return HEADER_BYTES + capacity + WORD_BYTES


class End:
    """An end of a mailbox that the courier carries for. It has one Put under way at most, and never waits for it."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._put: Request | None = None
        self.failed = False
        """Whether the other end cannot be reached any more."""

    def look(self) -> None:
        """See what has come to pass, without starting anything."""
        raise NotImplementedError

    def start(self) -> None:
        """Start what is due."""
        raise NotImplementedError

    def settled(self) -> bool:
        """Whether no Put is under way: its memory may change, and it may not have arrived."""
        if self._put is not None and self._put.Test():
            self._put = None
        return self._put is None


class BackgroundOutbox(End):
    """The sending end of a mailbox whose messages the courier carries; see `mailbox.Delivery`.

    slot, answer: offsets of the slot in the window of `target`, and of the answer in this rank's own. `slot`, `publish`
    and `post` are for the learner's thread, `look` and `start` for the courier's.
    """

    def __init__(self, window: Window, target: int, slot: int, answer: int, capacity: int) -> None:
        super().__init__(window)
        self.target, self._slot, self._capacity = target, slot, capacity
        self._answer = window.memory(answer, WORD_BYTES).view(np.int64)
        self._number = 0
        self._lock = threading.Lock()
        self._spare = Snapshot(capacity)
        self._free = [Snapshot(capacity), Snapshot(capacity)]
        self._waiting: Snapshot | None = None
        self._in_flight: Snapshot | None = None
        self._sent_at_s = 0.0
        self._attempt = 0
        self._ended = False

    def slot(self, nbytes: int) -> Bytes | None:
        """See `Delivery.slot`."""
        if nbytes > self._capacity:
            raise ValueError(f"payload of {nbytes} bytes exceeds the capacity of {self._capacity}")
        return self._spare.memory[HEADER_BYTES : HEADER_BYTES + nbytes]

    def publish(self, nbytes: int, **about: Unpack[About]) -> None:
        """Leave what is in the slot for the courier, in place of a message that it has not fetched yet."""
        self._number += 1
        fill(self._spare.header, self._window.rank, self._number, nbytes, about)
        with self._lock:
            if self._waiting is not None:
                self._free.append(self._waiting)
            self._waiting = self._spare
            # Of three snapshots one waits now and one may be in flight.
            self._spare = self._free.pop()

    def post(self, payload: npt.NDArray[Any], **about: Unpack[About]) -> None:
        """See `Delivery.post`."""
        slot = self.slot(payload.nbytes)
        assert slot is not None
        slot[:] = payload.reshape(-1).view(np.uint8)
        self.publish(payload.nbytes, **about)

    def end(self) -> int:
        """Send nothing more, not even again, until `begin_at`; the number of the last message. For the learner."""
        with self._lock:
            self._ended = True
            if self._waiting is not None:
                self._free.append(self._waiting)
                self._waiting = None
        return self._number

    def begin_at(self, number: int) -> None:
        """Go on after `end`, with numbers above this one. For the learner."""
        with self._lock:
            self._number, self._ended = max(number, self._number), False

    @property
    def pending(self) -> bool:
        """Whether a message waits, or was not answered yet."""
        with self._lock:
            return not self.failed and (self._waiting is not None or self._in_flight is not None)

    def look(self) -> None:
        """See whether the message under way is answered."""
        # While the Put is not complete the snapshot must stay as it is, answered or not.
        if not self.settled() or self._in_flight is None:
            return
        if self._ended or int(self._answer[0]) == self._in_flight.number:
            with self._lock:
                self._free.append(self._in_flight)
                self._in_flight = None

    def start(self) -> None:
        """Send the message that waits, if none is under way, or once more the one that has got no answer."""
        if self._put is not None or self._ended:
            return
        if self._in_flight is None:
            with self._lock:
                self._in_flight, self._waiting = self._waiting, None
        elif time.monotonic() - self._sent_at_s < REPEAT_AFTER_S:
            return
        if self._in_flight is not None:
            self._attempt += 1
            self._in_flight.header["attempt"] = self._attempt
            self._put = self._window.start_put(self._in_flight.sealed(), self.target, self._slot)
            self._sent_at_s = time.monotonic()


class BackgroundInbox(End):
    """The receiving end of a mailbox whose messages the courier takes from the window; see `mailbox.Inbox`.

    slot, answer: offsets of the slot in this rank's own window, and of the answer in that of `source`. `fresh` and
    `take` are for the learner's thread, `look` and `start` for the courier's.
    """

    def __init__(self, window: Window, source: int, slot: int, answer: int, capacity: int) -> None:
        super().__init__(window)
        self._source, self._answer, self._capacity = source, answer, capacity
        self._slot = window.memory(slot, slot_bytes(capacity))
        self._next = self._slot[:HEADER_BYTES].view(HEADER)["number"]
        self._attempt = self._slot[:HEADER_BYTES].view(HEADER)["attempt"]
        self._lock = threading.Lock()
        self._spare = Snapshot(capacity)
        self._free = [Snapshot(capacity), Snapshot(capacity)]
        self._waiting: Snapshot | None = None
        self._held: Snapshot | None = None
        self._taken = 0
        self._answered = np.zeros(1, np.int64)
        # The attempt that was answered, or is to be.
        self._attempt_seen, self._answer_again = 0, False
        self._pause_s = self._look_again_at_s = 0.0
        self.heeded = True
        """Whether messages are looked for."""

    def fresh(self) -> bool:
        """Whether a message waits that was not taken yet."""
        return self._waiting is not None

    def take(self) -> Message | None:
        """The newest message, or None if none came since the last `take`.

        The message taken before is valid until then.
        """
        with self._lock:
            if self._waiting is None:
                return None
            if self._held is not None:
                self._free.append(self._held)
            self._held, self._waiting = self._waiting, None
        return message_of(self._held.header[0], self._held.payload)

    def look(self) -> None:
        """Take the message in the slot, if there is a new one and it is whole."""
        self._window.sync()
        number, attempt = int(self._next[0]), int(self._attempt[0])
        if not self.heeded:
            return
        if number == self._taken > 0 and attempt != self._attempt_seen:
            self._attempt_seen, self._answer_again = attempt, True
        if number <= self._taken or time.monotonic() < self._look_again_at_s:
            return
        if not (self._spare.copy_whole(self._slot, number, self._capacity) and self._spare.sender == self._source):
            # To look at half a message costs as much as at a whole one.
            self._pause_s = min(2 * self._pause_s + 1e-3, LONGEST_PAUSE_S)
            self._look_again_at_s = time.monotonic() + self._pause_s
            return
        self._taken, self._pause_s = number, 0.0
        self._attempt_seen, self._answer_again = attempt, False
        with self._lock:
            if self._waiting is not None:
                self._free.append(self._waiting)
            self._waiting = self._spare
            # Of three snapshots one waits now and one may be held.
            self._spare = self._free.pop()

    def start(self) -> None:
        """Answer the message that was taken last, if it is not answered, or its sender has not seen that."""
        if self.settled() and (self._answer_again or self._answered[0] != self._taken):
            self._answered[0], self._answer_again = self._taken, False
            self._put = self._window.start_put(self._answered, self._source, self._answer)


def lay_out(capacities: Sequence[int], receivers: int) -> tuple[list[int], list[int], int]:
    """Where a rank's slots lie, one of each capacity, and the answers of its `receivers`; and the bytes in all.

    A slot begins so that its payload lies on a page; an answer has a cache line of its own.
    """
    answers = [CACHE_LINE_BYTES * index for index in range(receivers)]
    offset, slots = whole_pages(CACHE_LINE_BYTES * receivers), []
    for capacity in capacities:
        slots.append(offset + PAGE_BYTES - HEADER_BYTES)
        offset += PAGE_BYTES + whole_pages(capacity + WORD_BYTES)
    return slots, answers, offset
