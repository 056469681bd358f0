"""Who is there: rows are whole and never go back, who is silent is lost, and nobody else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Mpi

from gala_mpi.gossip.news import Heirs, heirs_among
from gala_mpi.gossip.patience import Patience

PROGRAM = str(Path(__file__).parent / "programs" / "roster_properties.py")
TIMEOUT_S = 10.0


class Watch:
    """A rank's patience with three others, of which some beat, on a clock of its own."""

    def __init__(self) -> None:
        self.patience, self.now_s = Patience(3, TIMEOUT_S), 100.0
        self._beats = np.zeros(3, np.int64)
        self.look(0.0)

    def look(self, after_s: float, *alive: int) -> list[int]:
        """Look again; the `alive` have beaten since the last look. Who is lost."""
        self.now_s += after_s
        self._beats[list(alive)] += 1
        self.patience.look(self._beats, self.now_s)
        assert self.patience.unbroken != self.patience.exhausted().any()
        return np.flatnonzero(self.patience.exhausted()).tolist()


def test_who_is_silent_for_the_timeout_is_lost_and_is_back_with_its_next_beat() -> None:
    watch = Watch()
    while watch.now_s < 100 + TIMEOUT_S - 1:
        assert watch.look(0.5, 0, 1) == []
    assert watch.look(0.5, 0, 1) == [] and watch.look(1.0, 0, 1) == [2]
    assert watch.patience.silent_s(2) == pytest.approx(watch.now_s - 100)
    assert watch.look(0.5, 0, 2) == []


@pytest.mark.parametrize("pause_s", [0.9 * TIMEOUT_S, 2 * TIMEOUT_S, 1e6])
def test_after_a_pause_of_its_own_a_rank_misses_nobody(pause_s: float) -> None:
    watch = Watch()
    for _ in range(5):
        # What others did in the pause may not have come yet.
        assert watch.look(pause_s) == []
        for _ in range(4):
            assert watch.look(TIMEOUT_S / 10) == []
        assert watch.look(0.1, 0, 1, 2) == []


@pytest.mark.parametrize("update_s", [0.3 * TIMEOUT_S, 0.6 * TIMEOUT_S, 0.9 * TIMEOUT_S, 3 * TIMEOUT_S])
def test_however_long_updates_are_who_is_dead_is_lost_and_who_lives_is_not(update_s: float) -> None:
    watch = Watch()
    # News that others pass on, and updates that vary: a beat may come in some of this rank's looks only.
    seen = [watch.look(update_s, 0, *([1] if look % 4 == 3 else [])) for look in range(12)]
    assert seen == [[]] * 4 + [[2]] * 8


@pytest.mark.parametrize("timeout_s", [5.0, 8.0, 10.0, 60.0])
def test_four_looks_are_no_loss_however_sums_are_rounded(timeout_s: float) -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        patience, now_s, beats = Patience(1, timeout_s), 1e5 * random.random(), np.zeros(1, np.int64)
        for _ in range(20):
            now_s += random.random()
            beats += 1
            patience.look(beats, now_s)
        for look in range(5):
            now_s += timeout_s
            patience.look(beats, now_s)
            assert patience.wavers(0) == (look > 0) and patience.exhausted()[0] == (look == 4)


def test_patience_begins_with_the_first_look() -> None:
    patience = Patience(2, TIMEOUT_S)
    patience.look(np.zeros(2, np.int64), 1e9)
    assert patience.silent_s(0) == 0 and patience.unbroken and not patience.exhausted().any()


def test_a_rank_wavers_long_before_it_is_lost() -> None:
    watch = Watch()
    while not watch.patience.wavers(2):
        assert watch.look(0.5, 0, 1) == []
    assert watch.now_s - 100 == pytest.approx(TIMEOUT_S / 4, abs=0.6) and not watch.patience.wavers(0)


def test_rows_are_whole_never_go_back_and_arrive_to_the_last_word(mpi: Mpi) -> None:
    done = mpi.run(10, PROGRAM, "whole")
    assert done.returncode == 0 and "as promised" in done.stdout, done.stderr


@pytest.mark.parametrize("variant", ["slow", "two-leaders"])
def test_they_do_so_with_slow_writers_and_with_two_leaders_on_a_node(one_mpi: Mpi, variant: str) -> None:
    done = one_mpi.run(10, PROGRAM, "whole", variant)
    assert done.returncode == 0 and "as promised" in done.stdout, done.stderr


@pytest.mark.parametrize(("variant", "noticed"), [("torn", "torn: "), ("backwards", "back: ")])
def test_rows_that_are_torn_or_go_back_are_noticed(one_mpi: Mpi, variant: str, noticed: str) -> None:
    done = one_mpi.run(10, PROGRAM, "whole", variant)
    assert done.returncode != 0 and noticed in done.stderr


def test_who_may_lead_a_node_is_spread_over_it() -> None:
    assert [heirs_among(ranks) for ranks in (1, 2, 3, 5, 32)] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 10, 21]]
    heirs = Heirs([0, 0, 0, 0, 4, 4, 4, 4])
    assert (
        heirs.neighbours_of(3) == [[4, 5, 6]] and heirs.in_neighbours(2) == [4, 5, 6] and heirs.in_neighbours(3) == []
    )


@pytest.mark.parametrize("variant", ["", "two"])
def test_leaders_that_fall_silent_are_succeeded_and_nobody_else_is_lost(mpi: Mpi, variant: str) -> None:
    done = mpi.run(10, PROGRAM, "silent", *([variant] if variant else []))
    assert done.returncode == 0 and "as promised" in done.stdout, done.stderr


def test_however_long_updates_are_on_many_nodes_nobody_who_lives_is_lost(one_mpi: Mpi) -> None:
    done = one_mpi.run(1, str(Path(PROGRAM).with_name("roster_news.py")), timeout_s=120)
    assert done.returncode == 0, done.stderr
