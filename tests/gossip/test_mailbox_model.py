"""The mailbox protocol keeps its promises in every interleaving, and breaks some once a step is left out."""

from collections.abc import Callable

import pytest
from explorer import Step
from mailbox_model import INVARIANTS, Protocol, State, explored, initial_state, message, successors

# What each wrong protocol breaks, exactly: each invariant is explored alone, as if it were the only one.
MUTATIONS = {
    # The sender gets back the slot that the receiver reads, or the one it just published.
    "two slots": (Protocol(slots=2), {"permutation", "exclusive", "whole", "ordered", "newest"}),
    # Words still land while the receiver, told of them too early, reads.
    "no Flush between Put and publish": (
        Protocol(flush_before_publish=False),
        {"exclusive", "whole", "ordered", "newest", "delivered"},
    ),
    "publish without FRESH": (Protocol(publish_sets_fresh=False), {"delivered"}),
    # The receiver's swap falls between the two: both sides then hold the same slot.
    "publish by a load and a store": (
        Protocol(publish_is_atomic=False),
        {"permutation", "exclusive", "whole", "ordered", "newest"},
    ),
    # The next Put goes to the slot just published, since `back` is not known yet.
    "no Flush after publish": (
        Protocol(flush_after_publish=False),
        {"permutation", "exclusive", "whole", "ordered", "newest"},
    ),
    "sender keeps the slot it published": (
        Protocol(sender_adopts=False),
        {"permutation", "exclusive", "whole", "ordered", "newest"},
    ),
    "sender waits until its last message was taken": (
        Protocol(sender_waits_for_receiver=True),
        {"wait_free"},
    ),
    # An earlier poll's FRESH makes it take an old message; an earlier poll's silence makes it miss a new one.
    "no Flush after poll": (Protocol(flush_after_poll=False), {"ordered", "newest", "delivered"}),
    "receiver takes without FRESH": (Protocol(heeds_fresh=False), {"ordered", "newest", "delivered"}),
    "receiver reads the middle slot in place": (
        Protocol(takes_by_swap=False),
        {"permutation", "exclusive", "whole", "ordered", "newest"},
    ),
    # A message published between the two is overwritten by the store, FRESH and all.
    "take by a load and a store": (
        Protocol(take_is_atomic=False),
        {"permutation", "exclusive", "whole", "ordered", "newest", "delivered"},
    ),
    "take leaves FRESH set": (Protocol(take_clears_fresh=False), {"ordered", "newest", "delivered"}),
    "no Flush after take": (
        Protocol(flush_after_take=False),
        {"permutation", "exclusive", "whole", "ordered", "newest", "delivered"},
    ),
    "receiver keeps the slot it gave back": (
        Protocol(receiver_adopts=False),
        {"permutation", "exclusive", "whole", "ordered", "newest", "delivered"},
    ),
    "receiver waits for FRESH": (Protocol(receiver_waits_for_sender=True), {"wait_free"}),
}


@pytest.mark.parametrize(
    ("updates", "words", "at_least"), [(1, 2, 50), (2, 2, 200), (3, 3, 900), (6, 3, 12_000), (8, 2, 20_000)]
)
def test_every_invariant_holds_in_every_reachable_state(updates: int, words: int, at_least: int) -> None:
    result = explored(Protocol(updates=updates, words=words))
    assert result.violation is None, f"\n{result}"
    assert result.states >= at_least, "the explorer left interleavings out"


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_protocol_breaks_the_invariants_that_its_missing_step_upholds(mutation: str) -> None:
    protocol, expected = MUTATIONS[mutation]
    results = {name: explored(protocol, {name: holds}) for name, holds in INVARIANTS.items()}
    broken = {name for name, result in results.items() if result.violation}
    unexpected = "\n".join(str(results[name]) for name in sorted(broken - expected))
    assert broken == expected, f"\nnot broken: {sorted(expected - broken)}, unexpected:\n{unexpected}"


def test_no_invariant_is_vacuous() -> None:
    assert set().union(*(broken for _, broken in MUTATIONS.values())) == set(INVARIANTS)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_trace_replays_from_the_initial_state_to_the_violation(mutation: str) -> None:
    protocol, _ = MUTATIONS[mutation]
    result = explored(protocol)
    assert result.violation is not None
    state = initial_state(protocol)
    for step in result.trace:
        assert step in successors(protocol, state)
        state = step.state
    assert not INVARIANTS[result.violation](state, successors(protocol, state))
    header, *lines = str(result).splitlines()
    assert result.violation in header
    assert all(step.action in line for step, line in zip(result.trace, lines, strict=True))


# A model in which nothing happens keeps every promise. These must happen under the right protocol.
EVENTS: dict[str, Callable[[State], bool]] = {
    "the last word of a message lands first": lambda s: s.slots[0] == (0, 1),
    "the sender writes while the receiver reads": lambda s: s.receiver.pc == "read" and bool(s.sender.words),
    "both swaps are in flight at once": lambda s: (
        s.sender.pc == s.receiver.pc == "adopt" and bool(s.sender.atomics and s.receiver.atomics)
    ),
    "the swap takes a newer message than the poll saw": lambda s: (
        s.receiver.pc == "adopt" and not s.receiver.atomics and s.receiver.old != s.receiver.polled
    ),
    "a slow receiver skips to the last message": lambda s: message(s)[:1] == (3,) and s.receiver.held == 0,
    "a quick receiver misses none": lambda s: message(s)[:1] == (3,) and s.receiver.held == 2,
    "a message is overtaken while it is read": lambda s: (
        s.receiver.pc == "read" and s.published == 3 and s.receiver.newest == 1
    ),
    "the sender is done and the receiver holds its last": lambda s: s.sender.pc == "done" and s.receiver.held == 3,
}


@pytest.mark.parametrize("event", EVENTS)
def test_the_model_reaches_what_it_claims_to_cover(event: str) -> None:
    def never(state: State, _: tuple[Step, ...]) -> bool:
        return not EVENTS[event](state)

    assert explored(Protocol(updates=3), {"never": never}).violation == "never"


def progress(state: State, owner: str) -> tuple[int, ...]:
    """Rises, in lexicographic order, with each step of its owner; bounded within a post and within a poll."""
    sender, receiver = state.sender, state.receiver
    if owner == "sender":
        phase = ("publish", "adopt", "put", "done").index(sender.pc)
        return sender.update, phase, -len(sender.words) - len(sender.atomics)
    phase = ("poll", "check", "adopt", "read", "end").index(receiver.pc)
    return phase, len(receiver.read), -len(receiver.atomics)


def test_a_side_moves_forward_by_its_own_steps_and_by_no_other() -> None:
    """With `wait_free`: a post or a poll takes a bounded number of own steps, whatever the other does."""

    def forward(state: State, steps: tuple[Step, ...]) -> bool:
        for owner, _, after in steps:
            other = "receiver" if owner == "sender" else "sender"
            next_poll = owner == "receiver" and state.receiver.pc == "end"
            if not next_poll and progress(after, owner) <= progress(state, owner):
                return False
            if progress(after, other) != progress(state, other):
                return False
        return True

    result = explored(Protocol(), {"forward": forward})
    assert result.violation is None, f"\n{result}"
