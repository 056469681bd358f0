"""The protocol between nodes keeps its promises in whatever order words land, and breaks some without any one step."""

from collections.abc import Callable

import pytest
from background_model import INVARIANTS, Protocol, State, content, explored, initial_state, successors
from explorer import explore

# What each wrong protocol breaks, exactly: each invariant is explored alone, as if it were the only one.
MUTATIONS = {
    "the copy is not checked": (Protocol(messages=2, checks=False), {"whole", "ordered"}),
    # A word that lands late changes what was checked.
    "the slot itself is given out": (Protocol(messages=2, gives_out_the_copy=False), {"whole"}),
    # A repetition that lands over the next message is taken again, and answered.
    "an older one is taken": (Protocol(messages=2, takes_newer_alone=False), {"ordered", "arrived", "delivered"}),
    # The sender then puts the next one over what was not yet taken.
    "the answer comes before the check": (
        Protocol(messages=2, answers_after_the_check=False),
        {"arrived", "delivered"},
    ),
    "the next is put without an answer": (Protocol(messages=2, waits_for_the_answer=False), {"arrived", "delivered"}),
    "any answer counts": (Protocol(messages=2, heeds_the_number=False), {"arrived", "delivered"}),
    # A word of the first message that went unmissed lands over the third.
    "nothing is sent again": (Protocol(repeats_what_is_not_answered=False), {"delivered"}),
    # The answer that another one landed over never comes again.
    "another attempt is not answered": (
        Protocol(messages=1, overwritten=1, answers_another_attempt=False),
        {"delivered"},
    ),
}


@pytest.mark.parametrize(
    ("messages", "words", "repeats", "overwritten", "at_least"),
    [
        (1, 3, 2, 2, 100),
        (2, 2, 1, 1, 1000),
        (2, 3, 1, 0, 1000),
        (3, 2, 2, 0, 5000),
        (3, 3, 1, 0, 6000),
        (4, 2, 1, 0, 2000),
    ],
)
def test_every_promise_is_kept_in_every_state(
    messages: int, words: int, repeats: int, overwritten: int, at_least: int
) -> None:
    result = explored(Protocol(messages, words, repeats, overwritten))
    assert result.violation is None, f"\n{result}"
    assert result.states >= at_least, "the explorer left orders out"


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_protocol_breaks_the_promises_that_its_missing_step_keeps(mutation: str) -> None:
    protocol, expected = MUTATIONS[mutation]
    results = {name: explored(protocol, [name]) for name in INVARIANTS}
    broken = {name for name, result in results.items() if result.violation}
    unexpected = "\n".join(str(results[name]) for name in sorted(broken - expected))
    assert broken == expected, f"\nnot broken: {sorted(expected - broken)}, unexpected:\n{unexpected}"


def test_no_promise_is_vacuous() -> None:
    assert set().union(*(broken for _, broken in MUTATIONS.values())) == set(INVARIANTS)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_trace_replays_from_the_first_state_to_the_violation(mutation: str) -> None:
    protocol, _ = MUTATIONS[mutation]
    result = explored(protocol)
    assert result.violation is not None
    state = initial_state(protocol)
    for step in result.trace:
        assert step in successors(protocol, state)
        state = step.state
    assert not INVARIANTS[result.violation](protocol, state)


# A model in which nothing happens keeps every promise. These must happen under the right protocol.
EVENTS: dict[str, Callable[[State], bool]] = {
    "the number lands last": lambda s: s.slot[:-1] == (0, 1, 1),
    "words of two messages are under way at once": lambda s: {1, 2} <= {word.value for word in s.sender.words},
    "words of two messages lie in the slot": lambda s: s.slot[0] == 3 and s.slot[1] == 2,
    "a copy is torn": lambda s: s.receiver.pc == "copy" and s.receiver.copy == (2, 1),
    "a message is replaced before it is sent": lambda s: s.receiver.given[:1] == (3,) and s.receiver.before == 1,
    "none is missed": lambda s: s.receiver.given[:1] == (3,) and s.receiver.before == 2,
    "a late word spoils a message": lambda s: (
        s.slot[:-1] == (3, 3, 1) and not s.sender.words and s.sender.in_flight == 3 and not s.receiver.answers
    ),
}


@pytest.mark.parametrize("event", EVENTS)
def test_the_model_reaches_what_it_claims_to_cover(event: str) -> None:
    protocol = Protocol()
    assert content(3, 3) == (3, 3, 2) and content(1, 3) == (1, 1, 1)
    result = explore(
        initial_state(protocol),
        lambda state: successors(protocol, state),
        {"never": lambda state, _: not EVENTS[event](state)},
    )
    assert result.violation == "never"
