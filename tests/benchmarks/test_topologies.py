"""The comparison of topologies: cases whose figures are known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
import topologies
from topologies import MESSAGE_BYTES, in_step, out_of_step

from gala_mpi.gossip.topology import make_topology


def test_costs_are_those_of_a_rank_and_of_a_node() -> None:
    """32 ranks on 2 nodes of 16."""
    ring, hierarchy = in_step("ring", 32), in_step("hierarchical", 32)
    assert (ring["messages_of_a_rank"], ring["bytes_of_a_rank"]) == (1, MESSAGE_BYTES)
    assert ring["messages_out_of_a_node"] == hierarchy["messages_out_of_a_node"] == 1
    assert hierarchy["messages_of_a_rank"] == 1 + 2 / 32 and hierarchy["nodes"] == 2
    assert (ring["most_mailboxes_of_a_rank"], hierarchy["most_mailboxes_of_a_rank"]) == (1, 5)
    assert in_step("auto", 32)["stands_for"] == "hierarchical"


def test_out_of_step_a_rank_alone_is_worth_one_and_no_group_more_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies, "BEFORE", 300)
    monkeypatch.setattr(topologies, "COUNTED", 1500)
    rng = np.random.default_rng(7)
    alone = out_of_step(make_topology("ring", 1), rng)
    assert alone["neighbours"] == pytest.approx(1, abs=0.25) and alone["progress"] == pytest.approx(1, abs=0.01)
    assert alone["mixes_of_an_update"] == 0 and alone["least_unit"] == alone["greatest_unit"] == pytest.approx(1)
    # Messages that wait hold it up.
    together = out_of_step(make_topology("complete", 4), rng)
    assert 2.5 < together["neighbours"] < 4.8 and 0.6 < together["progress"] < 0.95


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies, "BEFORE", 50)
    monkeypatch.setattr(topologies, "COUNTED", 200)


def by_way(name: str, case: str) -> dict[str, dict[str, float]]:
    ways = ("all", "come", "aged")
    return {way: out_of_step(make_topology(name, 5), np.random.default_rng(3), way, case) for way in ways}


def test_who_waits_for_all_is_held_up_by_one(short: None) -> None:
    found = by_way("complete", "silent")
    assert found["all"]["mixes_of_an_update"] == 0 and found["all"]["progress"] == pytest.approx(1, abs=0.02)
    # Nobody hears of what the silent rank has learned.
    assert all(figures["unit_of_the_rank_apart"] == 0 for figures in found.values())
    assert all(found[way]["mixes_of_an_update"] > 0.95 for way in ("come", "aged"))
    slow = by_way("complete", "half speed")
    assert slow["all"]["mixes_of_an_update"] < 0.7 < 0.95 < slow["come"]["mixes_of_an_update"]


def test_of_one_neighbour_what_has_come_is_all(short: None) -> None:
    for name in ("ring", "one-peer-exponential"):
        found = by_way(name, "half speed")
        assert found["all"] == found["come"] != found["aged"]
