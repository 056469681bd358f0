"""The simulation of many ranks: cases that can be worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from gala_mpi.gossip.topology import make_topology

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
from simulation import Checkpoints, Cluster, Network, Outcome, Straggling, allreduce, gossip


def working(times: np.ndarray, per_node: int = 1, topology: str = "ring", **settings: object) -> Outcome:
    """Ranks that only work, over a topology on nodes of so many."""
    cluster = Cluster(make_topology(topology, times.shape[1]), per_node, **settings)  # type: ignore[arg-type]
    return gossip(cluster, np.zeros_like(times), times)


def test_equal_ranks_mix_at_every_update_but_the_first() -> None:
    # Both end each update at 1, 2, 3 and so on; a message takes half an update. The last update is that of one rank.
    found = working(np.ones((10, 2)), message_s=0.5)
    assert found.updates_per_s.tolist() == [1.0, 0.9]
    assert found.mixed_share == pytest.approx((9 + 8) / 19)
    assert found.staleness_most == 1
    assert found.messages_sent == 1 and found.messages_mixed == pytest.approx((9 + 8) / 19)


def test_an_exchange_costs_its_own_time_alone() -> None:
    found = working(np.ones((100, 3)), exchange_s=0.25)
    assert found.updates_per_s[0] == pytest.approx(1 / 1.25)


def test_a_slow_rank_holds_nobody_up_but_is_seldom_heard() -> None:
    times = np.ones((1000, 4))
    times[:, -1] = 2
    found = working(times, message_s=0.1)
    assert found.updates_per_s[:3] == pytest.approx([1, 1, 1], rel=0.01)
    assert found.updates_per_s[3] == pytest.approx(0.5, rel=0.01)
    # Rank 0 hears the slow one at every second update; each other rank at every one.
    assert found.mixed_share == pytest.approx((0.5 + 1 + 1 + 0.5) / 3.5, rel=0.01)
    # The slow rank's first message comes after the second update of rank 0.
    assert found.staleness_most == 2
    assert allreduce(times, 0.0).updates_per_s.tolist() == [0.5] * 4


def test_on_a_slow_link_the_newest_message_goes_next() -> None:
    # A message takes 2.5 updates: one arrives every 2.5 updates, and never more than one waits.
    found = working(np.ones((1001, 2)), message_s=2.5)
    assert found.mixed_share == pytest.approx(1 / 2.5, rel=0.01)
    assert found.updates_per_s[0] == pytest.approx(1, rel=0.01)


def test_inside_a_node_a_message_is_there_at_once() -> None:
    assert working(np.ones((1001, 4)), per_node=4, message_s=2.5).mixed_share == pytest.approx(1, abs=0.01)
    # Of a ring over two nodes every other edge is between them.
    assert working(np.ones((1001, 4)), per_node=2, message_s=2.5).mixed_share == pytest.approx(0.7, abs=0.01)


def test_a_topology_of_rounds_sends_one_message_an_update() -> None:
    found = working(np.ones((400, 8)), per_node=8, topology="one-peer-exponential")
    assert found.messages_sent == 1 and found.messages_mixed == pytest.approx(1, abs=0.01)


def test_ranks_that_share_cores_take_turns() -> None:
    rests, works = np.full((200, 8), 3.0), np.ones((200, 8))
    ring = make_topology("ring", 8)
    alone = gossip(Cluster(ring, 8), rests, works).updates_per_s.sum()
    assert alone == pytest.approx(8 / 4, rel=0.01)
    assert gossip(Cluster(ring, 8, cores=8), rests, works).updates_per_s.sum() == alone
    # More work than the core can do: it is never idle.
    assert gossip(Cluster(ring, 8, cores=1), rests, works).updates_per_s.sum() == pytest.approx(1, rel=0.01)
    # Couriers take a quarter of it.
    shared = Cluster(ring, 8, cores=1, courier_share=1 / 32)
    assert gossip(shared, rests, works).updates_per_s.sum() == pytest.approx(0.75, rel=0.01)
    with pytest.raises(ValueError, match="take all of 1 cores"):
        gossip(Cluster(ring, 8, cores=1, courier_share=1 / 8), rests, works)


def test_news_inside_a_node_is_as_old_as_the_others_last_update() -> None:
    rng = np.random.default_rng(1)
    found = working(rng.uniform(0.9, 1.1, (400, 8)), per_node=8)
    assert found.news_mean_s == pytest.approx(0.5, abs=0.05) and found.news_oldest_s < 1.2


def test_news_between_nodes_waits_for_a_round() -> None:
    rng = np.random.default_rng(1)
    times = rng.uniform(0.9, 1.1, (400, 8))
    at_once, late = (working(times, per_node=4, news_s=news_s) for news_s in (0.0, 3.0))
    # Of seven others four are elsewhere, and their leader's news is 3 s longer on its way.
    assert late.news_mean_s - at_once.news_mean_s == pytest.approx(3 * 4 / 7, abs=0.3)
    assert late.news_oldest_s > 3


def test_checkpoints_wait_for_each_other() -> None:
    times = np.ones((1001, 4))
    found = working(times, per_node=4, checkpoints=Checkpoints(100, 2.0, 1.0))
    # In turn, so that none waits: 2 s in each 100 s.
    assert found.checkpoint_share == pytest.approx(0.02, rel=0.15)
    # 2 s, and 1 s for each of the other three.
    together = allreduce(times, 0.0, Checkpoints(100, 2.0, 1.0))
    assert together.updates_per_s[0] == pytest.approx(1 / 1.05) and together.checkpoint_share == pytest.approx(5 / 105)


def test_what_comes_before_the_warm_up_is_not_counted() -> None:
    times = np.ones((100, 2))
    times[:50] = 4
    cluster = Cluster(make_topology("ring", 2), 2)
    assert gossip(cluster, np.zeros_like(times), times, warm_up_s=200).updates_per_s[0] == pytest.approx(1, rel=0.03)


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
    pausing = Straggling(pause_s=10, pause_share=0.1)
    assert pausing.draw(measured, 4, 5000, rng).mean() == pytest.approx(1.5 + 1, rel=0.1)
    ones = [pausing.one(1.5, last=False, rng=rng) for _ in range(20_000)]
    assert np.mean(ones) == pytest.approx(1.5 + 1, rel=0.1) and min(ones) == 1.5
    assert Straggling(factor=3).one(1.5, last=True, rng=rng) == 4.5
