"""Every interleaving of the mailbox protocol, one sender against one receiver: a small model checker.

Tests of the running mailbox see the interleavings that a machine happens to produce. This model sees all of
them, for a few updates of a few words, also those that no machine here produces: a network that delivers the
words of a Put in any order, or an atomic long after it was called.

Shared words, all in the receiver's window:

    control      index of the middle slot (bits 0-1) | FRESH (bit 2). Both sides read and write it, through
                 atomic swaps alone. MPI, or the processor, makes these atomic against each other, and keeps the
                 order of those that one origin sends to one word; the Flush after each brings its result home.
    slots[s][w]  word w of slot s; word 0 is the header. Every word holds the update number of its message,
                 0 at first, so that a torn message shows. The sender writes them by Put, which lands word by
                 word, in any order, at the latest in the Flush before the publishing swap. The receiver reads
                 them by plain loads, after the Flush that follows its own swap.

One transition is one local step of either side, or the landing of one thing in flight: a word of a Put, or an
atomic. An atomic's effect at the target and its result at the origin are one transition; to adopt the result
is another, so all that can happen between the two does. A Flush is the guard of the step after it: enabled
once nothing of that origin is in flight. The sender posts `updates` messages and stops, the receiver polls
for ever; the states are finite in number all the same.

What a courier carries between nodes has a protocol of its own: see `background_model`.

Not modelled: loads that a CPU reorders (what Win.Sync is for), and a lost network.

Nothing in the model spins: to wait for the other side is to have no step enabled, and within one post or one
poll the program counter only moves forward. So a side that the other one never disables (`wait_free`, checked
in every state) is done within a bounded number of its own steps.

The fields of `Protocol` beyond its three sizes are the steps that make it right. Each can be turned off, to
show that the checker then finds the harm.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from explorer import Invariant, Result, Step, explore

INDEX, FRESH = 3, 4


@dataclass(frozen=True)
class Protocol:
    """The sizes of the model and its switches; the defaults are the protocol as designed."""

    updates: int = 3
    words: int = 2
    slots: int = 3
    # sender
    flush_before_publish: bool = True
    publish_sets_fresh: bool = True
    publish_is_atomic: bool = True
    flush_after_publish: bool = True
    sender_adopts: bool = True
    sender_waits_for_receiver: bool = False
    # receiver
    flush_after_poll: bool = True
    heeds_fresh: bool = True
    takes_by_swap: bool = True
    take_is_atomic: bool = True
    take_clears_fresh: bool = True
    flush_after_take: bool = True
    receiver_adopts: bool = True
    receiver_waits_for_sender: bool = False


class Word(NamedTuple):
    """One word of a Put on its way."""

    slot: int
    position: int
    update: int


class Atomic(NamedTuple):
    """One atomic on its way to the control word."""

    op: Literal["NO_OP", "REPLACE"]
    operand: int = 0
    into: str = ""  # the origin's register that gets the old value; none for a plain store
    publishes: int = 0  # ghost: the update that this makes visible


class Sender(NamedTuple):
    pc: Literal["put", "publish", "adopt", "done"] = "put"
    back: int = 0
    old: int = 0  # result buffer of the swap
    update: int = 0
    words: tuple[Word, ...] = ()  # in flight
    atomics: tuple[Atomic, ...] = ()  # in flight, they land in this order

    @property
    def owns(self) -> int:
        """The slot that is the sender's by right: from the swap's effect on, the one it has yet to adopt."""
        return self.old & INDEX if self.pc == "adopt" and not self.atomics else self.back


class Receiver(NamedTuple):
    pc: Literal["poll", "check", "adopt", "read", "end"] = "poll"
    front: int = 2
    polled: int = 1  # result buffer of the poll
    old: int = 2  # result buffer of the swap
    read: tuple[int, ...] = ()  # words of the message read so far
    held: int = 0  # update of the last message that was read whole
    newest: int = 0  # ghost: newest update published when the receiver's last atomic took effect
    atomics: tuple[Atomic, ...] = ()

    @property
    def owns(self) -> int:
        """The slot that is the receiver's by right."""
        return self.old & INDEX if self.pc == "adopt" and not self.atomics else self.front


class State(NamedTuple):
    control: int
    slots: tuple[tuple[int, ...], ...]
    sender: Sender
    receiver: Receiver
    published: int = 0  # ghost: newest update whose publishing swap took effect


def initial_state(protocol: Protocol) -> State:
    front = protocol.slots - 1
    return State(
        control=1,
        slots=((0,) * protocol.words,) * protocol.slots,
        sender=Sender(back=0, old=0),
        receiver=Receiver(front=front, old=front, polled=1),
    )


def swap(operand: int, is_atomic: bool, publishes: int = 0) -> tuple[Atomic, ...]:
    """An atomic swap, or the load and the store that it must not be split into."""
    if is_atomic:
        return (Atomic("REPLACE", operand, "old", publishes),)
    return (Atomic("NO_OP", into="old"), Atomic("REPLACE", operand, "", publishes))


def sender_steps(protocol: Protocol, state: State) -> Iterator[Step]:
    """The sender's next local step, if it is enabled."""
    me = state.sender
    flushed = not me.words and not me.atomics

    def step(action: str, **changes: Any) -> Step:
        return Step("sender", action, state._replace(sender=me._replace(**changes)))

    if me.pc == "put" and not (protocol.sender_waits_for_receiver and state.control & FRESH):
        update = me.update + 1
        words = tuple(Word(me.back, position, update) for position in range(protocol.words))
        action = f"Put update {update} -> slot {me.back}"
        yield step(action, pc="publish", update=update, words=me.words + words)
    elif me.pc == "publish" and (flushed or not protocol.flush_before_publish):
        operand = me.back | (FRESH if protocol.publish_sets_fresh else 0)
        atomics = me.atomics + swap(operand, protocol.publish_is_atomic, publishes=me.update)
        yield step(f"{flush_text(flushed)}swap {control_text(operand)} in", pc="adopt", atomics=atomics)
    elif me.pc == "adopt" and (flushed or not protocol.flush_after_publish):
        back = me.old & INDEX if protocol.sender_adopts else me.back
        pc = "done" if me.update == protocol.updates else "put"
        yield step(f"{flush_text(flushed)}back = {back}", pc=pc, back=back)


def receiver_steps(protocol: Protocol, state: State) -> Iterator[Step]:
    """The receiver's next local step, if it is enabled."""
    me = state.receiver
    flushed = not me.atomics

    def step(action: str, **changes: Any) -> Step:
        return Step("receiver", action, state._replace(receiver=me._replace(**changes)))

    if me.pc == "poll" and flushed and (state.control & FRESH or not protocol.receiver_waits_for_sender):
        yield step("poll", pc="check", atomics=(Atomic("NO_OP", into="polled"),))
    elif me.pc == "check" and (flushed or not protocol.flush_after_poll):
        seen = f"{flush_text(flushed)}saw {control_text(me.polled)}: "
        if protocol.heeds_fresh and not me.polled & FRESH:
            yield step(seen + "nothing new", pc="end")
        elif protocol.takes_by_swap:
            operand = me.front | (0 if protocol.take_clears_fresh else FRESH)
            atomics = me.atomics + swap(operand, protocol.take_is_atomic)
            yield step(f"{seen}swap {control_text(operand)} in", pc="adopt", atomics=atomics)
        else:
            yield step(f"{seen}front = {me.polled & INDEX}", pc="read", front=me.polled & INDEX)
    elif me.pc == "adopt" and (flushed or not protocol.flush_after_take):
        front = me.old & INDEX if protocol.receiver_adopts else me.front
        yield step(f"{flush_text(flushed)}front = {front}", pc="read", front=front)
    elif me.pc == "read":
        word = state.slots[me.front][len(me.read)]
        pc = "end" if len(me.read) + 1 == protocol.words else "read"
        yield step(f"word {len(me.read)} of slot {me.front} reads {word}", pc=pc, read=(*me.read, word))
    elif me.pc == "end":
        yield step("poll ends", pc="poll", read=(), held=me.read[0] if me.read else me.held)


def landings(state: State) -> Iterator[Step]:
    """What the network may do next: land any word of a Put, or the oldest atomic of either side."""
    sender, receiver = state.sender, state.receiver
    for word in sender.words:
        slot = list(state.slots[word.slot])
        slot[word.position] = word.update
        slots = (*state.slots[: word.slot], tuple(slot), *state.slots[word.slot + 1 :])
        words = tuple(other for other in sender.words if other != word)
        action = f"word {word.position} of update {word.update} lands in slot {word.slot}"
        yield Step("sender", action, state._replace(slots=slots, sender=sender._replace(words=words)))
    if sender.atomics:
        atomic, *rest = sender.atomics
        result: dict[str, Any] = {atomic.into: state.control} if atomic.into else {}
        after = land(state, atomic)._replace(sender=sender._replace(atomics=tuple(rest), **result))
        yield Step("sender", f"{atomic.op} lands, old value {control_text(state.control)}", after)
    if receiver.atomics:
        atomic, *rest = receiver.atomics
        result = {atomic.into: state.control} if atomic.into else {}
        me = receiver._replace(atomics=tuple(rest), newest=state.published, **result)
        action = f"{atomic.op} lands, old value {control_text(state.control)}"
        yield Step("receiver", action, land(state, atomic)._replace(receiver=me))


def land(state: State, atomic: Atomic) -> State:
    """The effect of an atomic at the target."""
    control = atomic.operand if atomic.op == "REPLACE" else state.control
    return state._replace(control=control, published=max(state.published, atomic.publishes))


def permutation(state: State, _: tuple[Step, ...]) -> bool:
    """Back, middle and front are three different slots."""
    return {state.sender.owns, state.control & INDEX, state.receiver.owns} == {0, 1, 2}


def exclusive(state: State, _: tuple[Step, ...]) -> bool:
    """No word is on its way into the slot that the receiver owns, and may be reading."""
    return all(word.slot != state.receiver.owns for word in state.sender.words)


def whole(state: State, _: tuple[Step, ...]) -> bool:
    """A message that was read is not torn: all its words are of one update."""
    return not message(state) or len(set(message(state))) == 1


def ordered(state: State, _: tuple[Step, ...]) -> bool:
    """Each message read is newer than the one before."""
    return not message(state) or message(state)[0] > state.receiver.held


def newest(state: State, _: tuple[Step, ...]) -> bool:
    """A message that was read is the newest that was published when the receiver took it."""
    return not message(state) or message(state)[0] == state.receiver.newest


def delivered(state: State, _: tuple[Step, ...]) -> bool:
    """Who polls after update u was published holds u, or a newer one, when the poll ends."""
    receiver = state.receiver
    held = message(state)[0] if message(state) else receiver.held
    return receiver.pc != "end" or held >= receiver.newest


def wait_free(state: State, steps: tuple[Step, ...]) -> bool:
    """Each side that is not done can move, or something of its own can land, whatever the other one does."""
    owners = {step.owner for step in steps}
    return "receiver" in owners and ("sender" in owners or state.sender.pc == "done")


def message(state: State) -> tuple[int, ...]:
    """The words of the message just read: in the one state between the last read and the end of the poll."""
    return state.receiver.read if state.receiver.pc == "end" else ()


INVARIANTS: Mapping[str, Invariant] = {
    invariant.__name__: invariant
    for invariant in (permutation, exclusive, whole, ordered, newest, delivered, wait_free)
}


def successors(protocol: Protocol, state: State) -> tuple[Step, ...]:
    """Every transition that is enabled in a state."""
    return (*sender_steps(protocol, state), *receiver_steps(protocol, state), *landings(state))


def explored(protocol: Protocol, invariants: Mapping[str, Invariant] = INVARIANTS) -> Result:
    """Explore the protocol until a state violates an invariant."""
    return explore(initial_state(protocol), lambda state: successors(protocol, state), invariants)


def control_text(control: int) -> str:
    return f"{control & INDEX}|FRESH" if control & FRESH else f"{control & INDEX}"


def flush_text(flushed: bool) -> str:
    return "Flush; " if flushed else "no Flush; "
