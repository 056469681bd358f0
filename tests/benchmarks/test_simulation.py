"""The simulation of many ranks: cases that can be worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
from simulation import Network, Straggling, allreduce, gossip, ring


def test_equal_ranks_mix_at_every_update_but_the_first() -> None:
    # Both end each update at 1, 2, 3 and so on; a message takes half an update. The last update is that of one rank.
    found = gossip(np.ones((10, 2)), 0.0, 0.5, ring(2))
    assert found.updates_per_s.tolist() == [1.0, 0.9]
    assert found.mixed_share == pytest.approx((9 + 8) / 19)
    assert found.staleness_most == 1


def test_an_exchange_costs_its_own_time_alone() -> None:
    found = gossip(np.ones((100, 3)), 0.25, 0.0, ring(3))
    # The first of 100 updates follows no exchange.
    assert found.updates_per_s[0] == pytest.approx(100 / (1 + 99 * 1.25))


def test_a_slow_rank_holds_nobody_up_but_is_seldom_heard() -> None:
    times = np.ones((1000, 4))
    times[:, -1] = 2
    found = gossip(times, 0.0, 0.1, ring(4))
    assert found.updates_per_s[:3] == pytest.approx([1, 1, 1], rel=0.01)
    assert found.updates_per_s[3] == pytest.approx(0.5, rel=0.01)
    # Rank 0 hears the slow one at every second update; each other rank at every one.
    assert found.mixed_share == pytest.approx((0.5 + 1 + 1 + 0.5) / 3.5, rel=0.01)
    # The slow rank's first message comes after the second update of rank 0.
    assert found.staleness_most == 2
    assert allreduce(times, 0.0).updates_per_s.tolist() == [0.5] * 4


def test_on_a_slow_link_the_newest_message_goes_next() -> None:
    # A message takes 2.5 updates: one arrives every 2.5 updates, and never more than one waits.
    found = gossip(np.ones((1001, 2)), 0.0, 2.5, ring(2))
    assert found.mixed_share == pytest.approx(1 / 2.5, rel=0.01)
    assert found.updates_per_s[0] == pytest.approx(1, rel=0.01)


def test_all_ranks_of_an_allreduce_wait_for_the_slowest() -> None:
    times = np.array([[1.0, 3.0], [2.0, 1.0]])
    assert allreduce(times, 0.5).updates_per_s == pytest.approx([2 / 6, 2 / 6])


def test_the_network() -> None:
    network = Network(latency_s=1e-6, bytes_per_s=1e9)
    assert network.message_s(10**6) == pytest.approx(1e-3 + 2e-6)
    assert network.allreduce_s(1, 10**6) == 0
    assert network.allreduce_s(8, 10**6) == pytest.approx(6e-6 + 2 * 7 / 8 * 1e-3)


def test_what_is_drawn_is_what_was_measured_and_what_holds_ranks_up() -> None:
    rng = np.random.default_rng(1)
    measured = np.array([1.0, 2.0])
    times = Straggling(factor=3).draw(measured, 4, 5000, rng)
    assert set(np.unique(times[:, :3])) == {1.0, 2.0} and set(np.unique(times[:, 3])) == {3.0, 6.0}
    paused = Straggling(pause_s=10, pause_share=0.1).draw(measured, 4, 5000, rng)
    assert paused.mean() == pytest.approx(1.5 + 1, rel=0.1)
