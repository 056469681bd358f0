"""Who counts as lost, by a clock of the test's own: a pause of the one that looks is no silence of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gala_mpi.gossip import neighbours
from gala_mpi.gossip.neighbours import InNeighbour, InNeighbours

TIMEOUT_S = 60.0


class Mailbox:
    """An inbox that holds a message when the test says so."""

    def __init__(self) -> None:
        self.holds = False

    def fresh(self) -> bool:
        return self.holds


class Rank:
    """A rank with two in-neighbours, the first of which is heard at every look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1e6
        monkeypatch.setattr(neighbours.time, "monotonic", lambda: self.now_s)
        self.heard, self.silent = Mailbox(), Mailbox()
        self.heard.holds = True
        self.boxes: list[Any] = [self.heard, self.silent]
        self.all = [InNeighbour(rank, box) for rank, box in enumerate(self.boxes)]
        self.looks = InNeighbours(self.all, TIMEOUT_S, [{0: 0.3, 1: 0.3}])

    def look_after(self, passed_s: float) -> list[bool]:
        """Who is lost after a look so much later."""
        self.now_s += passed_s
        self.looks.look()
        return [neighbour.lost for neighbour in self.all]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return Rank(monkeypatch)


def test_a_rank_that_was_stopped_does_not_take_others_for_lost(rank: Rank) -> None:
    """They wait for it under a bound on staleness, say, and send nothing meanwhile."""
    rank.heard.holds = False
    for _ in range(3):
        assert rank.look_after(0.1) == [False, False]
    assert rank.look_after(100 * TIMEOUT_S) == [False, False]
    # They go on, and are heard.
    rank.heard.holds = rank.silent.holds = True
    assert rank.look_after(1.0) == [False, False]
    # Pause by pause it stays so, as long as they are heard in between.
    for _ in range(20):
        rank.silent.holds = False
        assert rank.look_after(100 * TIMEOUT_S) == [False, False]
        rank.silent.holds = True
        assert rank.look_after(1.0) == [False, False]


def test_what_is_set_up_for_long_counts_for_nothing(rank: Rank) -> None:
    assert rank.look_after(100 * TIMEOUT_S) == [False, False]


@pytest.mark.parametrize("update_s", [0.001, 1.0, 14.0])
def test_a_silent_neighbour_is_lost_after_the_timeout(rank: Rank, update_s: float) -> None:
    rank.look_after(0.0)
    begin = rank.now_s
    while rank.look_after(update_s) != [False, True]:
        assert rank.now_s - begin <= TIMEOUT_S + update_s
    assert rank.now_s - begin > TIMEOUT_S
    rank.silent.holds = True
    assert rank.look_after(update_s) == [False, False]


@pytest.mark.parametrize("update_s", [50.0, 1000.0])
def test_long_updates_add_up(rank: Rank, update_s: float) -> None:
    """Who looks seldom still finds out who is gone."""
    rank.look_after(0.0)
    lost = [rank.look_after(update_s)[1] for _ in range(5)]
    assert lost == [False] * 4 + [True]


def test_the_weight_of_who_stands_in_is_half_of_what_is_left(rank: Rank) -> None:
    """It is heard beside the others, and nobody waits for it."""
    stand_in: Any = InNeighbour(7, Mailbox())  # type: ignore[arg-type]
    rank.looks.stand_in(stand_in)
    message = SimpleNamespace(update=1)
    usual: Any = [(neighbour, message) for neighbour in rank.all]
    assert rank.looks.weights(usual) == [0.3, 0.3]
    assert rank.looks.weights([*usual, (stand_in, message)]) == pytest.approx([0.3, 0.3, 0.2])
    assert rank.looks.weights([(stand_in, message)]) == [0.5]
    assert rank.looks.look() == (False, 1)
    rank.silent.holds = True
    assert rank.looks.look() == (True, 0)
    rank.heard.holds = rank.silent.holds = False
    stand_in.inbox.holds = True
    rank.looks.look()
    while rank.looks.look()[1]:
        rank.now_s += 10.0
    # All others are lost.
    assert rank.looks.look() == (True, 0)
    rank.looks.stand_in(None)
    assert rank.looks.look() == (False, 0)
