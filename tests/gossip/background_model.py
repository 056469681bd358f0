"""Every interleaving of the protocol between nodes (`gala_mpi.gossip.background`), on a network that keeps no order.

    slot[w]  in the receiver's window; word 0 is the message's number, the last one the attempt, which is another one
             in each Put, the others the payload. The sender's courier writes them by Put. A word lands whole, as
             aligned words of 8 bytes do, and whenever it likes: after words of later messages too, and after the
             Put's request is complete, which frees the buffer and says no more. The receiver's courier reads them one
             by one, while others land, into a copy.
    answer   in the sender's window: the number of the last message that was taken. The receiver's courier writes it by
             Put, which lands whenever it likes; the sender's courier reads it. Up to `overwritten` times something
             else lands over it, at any time: the answer of another rank to an older message, where there are several.

The checksum is taken for one that never lies: a copy passes if all its words are those of the message whose number it
has. Some payload words have the same value in consecutive messages, as parameters may: such a word can be missing
without a difference, and land over a later message. Messages are posted one by one, at any time, and one that waits is
replaced by the next. The sender repeats what is not answered, at any time, up to `repeats` times, which keeps the
states finite in number. Each of the last fields of `Protocol` is a step that makes it right, and can be turned off.

What the learners do with snapshots and copies is local, under a lock, and tested apart from this model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from explorer import Invariant, Result, Step, explore


@dataclass(frozen=True)
class Protocol:
    """The sizes of the model and its switches; the defaults are the protocol as designed."""

    messages: int = 3
    words: int = 3
    repeats: int = 1
    overwritten: int = 0
    # Receiver: the copy is checked; what is given out is the copy; only what is newer is taken; and answered then.
    checks: bool = True
    gives_out_the_copy: bool = True
    takes_newer_alone: bool = True
    answers_after_the_check: bool = True
    answers_another_attempt: bool = True
    # Sender: waits for the answer, to this very message; repeats what has none.
    waits_for_the_answer: bool = True
    heeds_the_number: bool = True
    repeats_what_is_not_answered: bool = True


class Word(NamedTuple):
    """One word of a Put on its way."""

    position: int
    value: int


class Sender(NamedTuple):
    posted: int = 0
    waiting: int = 0  # number of the message that waits, 0 for none
    in_flight: int = 0
    repeated: int = 0
    attempt: int = 0
    words: tuple[Word, ...] = ()  # on their way, in no order


class Receiver(NamedTuple):
    pc: Literal["look", "copy", "give"] = "look"
    number: int = 0  # what was seen in the slot
    copy: tuple[int, ...] = ()
    taken: int = 0
    answered: int = 0
    attempt: int = 0  # the one that was answered
    given: tuple[int, ...] = ()  # ghost: the words of the message last given out
    before: int = 0  # ghost: the number given out before that
    answers: tuple[int, ...] = ()  # on their way, in no order


class State(NamedTuple):
    slot: tuple[int, ...]
    answer: int = 0
    overwritten: int = 0
    sender: Sender = Sender()
    receiver: Receiver = Receiver()


def content(number: int, words: int) -> tuple[int, ...]:
    """The words of a message: the last is the same for two in a row."""
    return (*([number] * (words - 1)), (number + 1) // 2)


def initial_state(protocol: Protocol) -> State:
    return State(slot=(*content(0, protocol.words), 0))


def sender_steps(protocol: Protocol, state: State) -> Iterator[Step]:
    me = state.sender

    def step(action: str, **changes: object) -> Step:
        return Step("sender", action, state._replace(sender=me._replace(**changes)))

    def put(number: int) -> dict[str, object]:
        words, attempt = content(number, protocol.words), 0
        if protocol.overwritten:
            # Else it has no effect but to make the states many more.
            attempt = me.attempt + 1
            words = (*words, attempt)
        return {"attempt": attempt, "words": tuple(sorted((*me.words, *(Word(*pair) for pair in enumerate(words)))))}

    if me.posted < protocol.messages:
        yield step(f"posts {me.posted + 1}", posted=me.posted + 1, waiting=me.posted + 1)
    if me.waiting and not me.in_flight:
        yield step(f"Put {me.waiting}", in_flight=me.waiting, waiting=0, **put(me.waiting))
    if me.in_flight:
        answered = state.answer == me.in_flight if protocol.heeds_the_number else state.answer > 0
        if answered or not protocol.waits_for_the_answer:
            yield step(f"{me.in_flight} has arrived", in_flight=0)
        if protocol.repeats_what_is_not_answered and me.repeated < protocol.repeats:
            yield step(f"Put {me.in_flight} again", repeated=me.repeated + 1, **put(me.in_flight))


def receiver_steps(protocol: Protocol, state: State) -> Iterator[Step]:
    me = state.receiver

    def step(action: str, **changes: object) -> Step:
        return Step("receiver", action, state._replace(receiver=me._replace(**changes)))

    number, attempt = state.slot[0], state.slot[-1]
    newer = number > me.taken if protocol.takes_newer_alone else number != me.taken
    if me.pc == "look" and newer:
        early: dict[str, object] = {}
        if not protocol.answers_after_the_check and me.answered != number:
            early = {"answered": number, "answers": tuple(sorted((*me.answers, number)))}
        yield step(f"sees {number}", pc="copy", number=number, **early)
    if me.pc == "copy":
        copy = (*me.copy, state.slot[len(me.copy)])
        if len(copy) < protocol.words:
            yield step(f"reads {copy[-1]}", copy=copy)
        elif protocol.checks and copy != content(me.number, protocol.words):
            yield step(f"reads {copy[-1]}: not whole", pc="look", copy=())
        else:
            yield step(f"reads {copy[-1]}: whole", pc="give", copy=copy)
    if me.pc == "give":
        given = me.copy if protocol.gives_out_the_copy else (me.number, *state.slot[1:-1])
        changes = {"taken": me.number, "given": given, "before": me.taken, "attempt": attempt}
        yield step(f"gives out {me.number}", pc="look", copy=(), number=0, **changes)
    if me.pc == "look" and number == me.taken > 0 and attempt != me.attempt and protocol.answers_another_attempt:
        yield step(f"sees attempt {attempt}", attempt=attempt, answered=0)
    if me.answered != me.taken and protocol.answers_after_the_check:
        yield step(f"answers {me.taken}", answered=me.taken, answers=tuple(sorted((*me.answers, me.taken))))


def landings(protocol: Protocol, state: State) -> Iterator[Step]:
    """What the network may do next: land any word of any Put, and another rank's answer."""
    for word in dict.fromkeys(state.sender.words):
        slot = (*state.slot[: word.position], word.value, *state.slot[word.position + 1 :])
        action = f"word {word.position} of value {word.value} lands"
        sender = state.sender._replace(words=_without(state.sender.words, word))
        yield Step("sender", action, state._replace(slot=slot, sender=sender))
    for number in dict.fromkeys(state.receiver.answers):
        receiver = state.receiver._replace(answers=_without(state.receiver.answers, number))
        yield Step("receiver", f"answer {number} lands", state._replace(answer=number, receiver=receiver))
    if state.answer and state.overwritten < protocol.overwritten:
        lost = state._replace(answer=0, overwritten=state.overwritten + 1)
        yield Step("receiver", "an older answer lands over it", lost)


def _without(all_of: tuple, one: object) -> tuple:
    index = all_of.index(one)
    return (*all_of[:index], *all_of[index + 1 :])


def successors(protocol: Protocol, state: State) -> tuple[Step, ...]:
    """Every transition that is enabled in a state."""
    return (*sender_steps(protocol, state), *receiver_steps(protocol, state), *landings(protocol, state))


def whole(protocol: Protocol, state: State) -> bool:
    """What was given out last is one message, word for word."""
    given = state.receiver.given
    return not given or given == content(given[0], protocol.words)


def ordered(protocol: Protocol, state: State) -> bool:
    """It is newer than the one before."""
    given = state.receiver.given
    return not given or given[0] > state.receiver.before


def arrived(protocol: Protocol, state: State) -> bool:
    """Once nothing is pending the receiver has the message that was posted last."""
    pending = state.sender.waiting or state.sender.in_flight
    return bool(pending) or state.receiver.taken == state.sender.posted


def delivered(protocol: Protocol, state: State) -> bool:
    """From any state on, the message that was posted last arrives, if what is on its way lands and both go on."""
    rounds = 4 * (protocol.messages + 1)
    for _ in range(rounds):
        state = _calm(protocol, state)
        if not (state.sender.waiting or state.sender.in_flight):
            return state.receiver.taken == state.sender.posted
        # However often it was repeated.
        state = state._replace(sender=state.sender._replace(repeated=0))
        again = [step for step in sender_steps(protocol, state) if step.action.endswith("again")]
        state = again[0].state if again else state
    return False


def _calm(protocol: Protocol, state: State) -> State:
    """After both sides have gone on and all has landed, with no repetition and no post, and nothing of others."""
    calm = replace(protocol, overwritten=0)
    for _ in range(200):
        steps = [
            step
            for step in (*landings(calm, state), *receiver_steps(protocol, state), *sender_steps(protocol, state))
            if not step.action.endswith("again") and not step.action.startswith("posts")
        ]
        if not steps:
            return state
        # A copy that is not whole is looked at again for ever: what lands comes first.
        if steps[0].owner == "receiver" and not state.sender.words and not state.receiver.answers:
            after = steps[0].state
            if after == state or (state.receiver.pc == "look" and _torn_for_good(protocol, state)):
                others = [step for step in steps if step.owner == "sender" or step.action.startswith("answers")]
                if not others:
                    return state
                steps = others
        state = steps[0].state
    return state


def _torn_for_good(protocol: Protocol, state: State) -> bool:
    """Whether nothing is on its way, and the slot holds no message."""
    return protocol.checks and state.slot[:-1] != content(state.slot[0], protocol.words)


INVARIANTS = {invariant.__name__: invariant for invariant in (whole, ordered, arrived, delivered)}


def explored(protocol: Protocol, names: Mapping[str, object] | None = None) -> Result:
    """Explore the protocol, for the invariants of those names."""

    def bound(name: str) -> Invariant:
        return lambda state, _: INVARIANTS[name](protocol, state)

    chosen = {name: bound(name) for name in (INVARIANTS if names is None else names)}
    return explore(initial_state(protocol), lambda state: successors(protocol, state), chosen)
