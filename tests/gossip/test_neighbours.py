"""Who counts as lost, by a clock of the test's own: a pause of the one that looks is no silence of the others."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from gala_mpi.gossip import neighbours
from gala_mpi.gossip.neighbours import InNeighbour, InNeighbours
from gala_mpi.gossip.rules import Weights

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
        self.bound(None)

    def bound(self, max_staleness: int | None, rounds: Sequence[Weights] = ({0: 0.3, 1: 0.3},)) -> None:
        """Begin anew with this bound on staleness."""
        self.looks = InNeighbours(self.all, TIMEOUT_S, rounds, max_staleness)

    def mix(self, *mixed: InNeighbour) -> None:
        """An update in which messages of these were mixed."""
        message: Any = SimpleNamespace(update=1)
        for neighbour in mixed:
            neighbour.held = message
        self.looks.settle([(neighbour, message) for neighbour in mixed])

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
    # One that is only late keeps its weight for itself.
    assert rank.looks.weights([usual[0], (stand_in, message)]) == pytest.approx([0.3, 0.2])
    assert rank.looks.weights([(stand_in, message)]) == pytest.approx([0.2])
    rank.all[1].lost = True
    assert rank.looks.weights([(stand_in, message)]) == pytest.approx([0.35])
    # The last message of one that is done takes its part of that.
    rank.all[0].finished = True
    assert rank.looks.weights([usual[0], (stand_in, message)]) == pytest.approx([0.3, 0.35])
    assert rank.looks.weights([(stand_in, message)]) == [0.5]
    rank.all[0].finished = rank.all[1].lost = False
    rank.heard.holds = False
    stand_in.inbox.holds = True
    assert rank.looks.look() == (True, False)
    rank.looks.stand_in(None)
    assert rank.looks.look() == (False, False)


def test_one_message_is_enough_for_a_mix(rank: Rank) -> None:
    assert rank.looks.look() == (True, False)
    rank.heard.holds = False
    assert rank.looks.look() == (False, False)


def test_a_neighbour_that_is_too_stale_is_waited_for_until_it_is_lost(rank: Rank) -> None:
    rank.bound(3)
    for _ in range(3):
        assert rank.looks.look() == (True, False)
        rank.mix(rank.all[0])
    # Whatever the other has left.
    assert rank.looks.look() == (True, True)
    rank.heard.holds = False
    assert rank.looks.look() == (False, True)
    rank.silent.holds = True
    assert rank.looks.look() == (True, False)
    rank.silent.holds, rank.heard.holds = False, True
    while rank.looks.look()[1]:
        rank.now_s += 10.0
    assert rank.all[1].lost and rank.looks.look() == (True, False)
    rank.all[1].lost, rank.all[1].silent_s = False, 0.0
    assert rank.looks.look() == (True, True)
    rank.all[1].finished = True
    assert rank.looks.look() == (True, False)


def test_in_step_all_are_waited_for(rank: Rank) -> None:
    rank.bound(0)
    assert rank.looks.look() == (True, True)
    rank.silent.holds = True
    assert rank.looks.look() == (True, False)


def test_over_a_topology_that_changes_any_neighbour_will_do(rank: Rank) -> None:
    """Each sends at every second update: that the other is stale is no news."""
    rank.bound(2, [{0: 0.5}, {1: 0.5}])
    for _ in range(5):
        assert rank.looks.look() == (True, False)
        rank.mix(rank.all[0])
    rank.heard.holds = False
    assert rank.looks.look() == (False, False)
    rank.mix()
    rank.mix()
    assert rank.looks.look() == (False, True)
    # One that may never send again leaves nobody to count on.
    rank.all[1].finished = True
    assert rank.looks.look() == (False, False)


def test_when_all_are_lost_or_done_nobody_is_left(rank: Rank) -> None:
    assert not rank.looks.all_silent
    rank.all[0].lost = True
    assert not rank.looks.all_silent
    rank.all[1].finished = True
    assert rank.looks.all_silent


@pytest.mark.parametrize("update_s", [1.0, 9.0, 50.0])
def test_who_sends_once_a_period_is_not_lost_in_between(rank: Rank, update_s: float) -> None:
    period = 8
    rank.bound(None, [{0: 0.5} if turn % 2 else {1: 0.5} for turn in range(period)])
    lost = []
    for look in range(20 * period):
        rank.heard.holds = look % period == 3
        lost.append(rank.look_after(update_s))
    assert not any(heard for heard, _ in lost)
    assert lost[-1][1] and not any(silent for _, silent in lost[: int(TIMEOUT_S / update_s)])
