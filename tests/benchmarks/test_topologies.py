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
    alone, progress = out_of_step(make_topology("ring", 1), rng)
    assert alone == pytest.approx(1, abs=0.25) and progress == pytest.approx(1, abs=0.01)
    # Messages that wait hold it up.
    together, progress = out_of_step(make_topology("complete", 4), rng)
    assert 2.5 < together < 4.8 and 0.6 < progress < 0.95
