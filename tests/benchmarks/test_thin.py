"""Thin ranks: a small job of them starts, mixes, loses one, and ends as it should."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import mixing
import scaling
from simulation import FREE
from thin import Seen, courier_rest_s


def lose(kill: str, tmp_path: Path, *more: str) -> dict[str, Any]:
    """What is found of four thin ranks of which some are killed."""
    out = tmp_path / "thin.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "thin.py"), "--ranks", "4", "--kill", kill, "--out", str(out)]
    command += ["--update-s", "0.02", "--timeout-s", "8", "--settle-s", "2", "--looks", "1", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_thin_ranks_mix_lose_one_and_end(tmp_path: Path) -> None:
    found = lose("1", tmp_path, "--topology", "ring")
    before, after = found["acts"]
    assert found["exit_codes"] == [3]
    assert before["living"] == 4 and before["detours"] == 0 and before["least_mixed_per_update"] > 0
    assert after["living"] == after["know_of_all_lost"] == 3 and after["lost"] == 1
    # Of what came since all knew.
    assert after["least_mixed_per_update"] > 0
    # The ring of four without one of them is a chain.
    assert after["detours"] == 2
    assert 0 < before["consensus_distance"] < 100 and 0 < after["consensus_distance"] < 100


def test_thin_ranks_of_two_nodes_lose_one_of_those(tmp_path: Path) -> None:
    found = lose("node", tmp_path, "--nodes", "2", "--topology", "hierarchical", "--checkpoint-every-s", "1")
    before, after = found["acts"]
    assert found["exit_codes"] == [3] and found["nodes"] == 2
    assert before["living"] == 4 and after["killed"] == after["living"] == after["know_of_all_lost"] == 2
    assert after["least_mixed_per_update"] > 0


def look(updates: list[int], vectors: list[list[float]]) -> Seen:
    facts = [{"update": update, "sent": 2 * update, "mixed": update // 2} for update in updates]
    return Seen(dict(enumerate(facts)), np.array(vectors))


def test_what_is_told_of_looks_is_worked_out_by_hand() -> None:
    """Two ranks, of which each parameter that keeps its noise is 1 from the mean; the others have a variance of 4."""
    first = look([100, 120], [[1.0, 5.0, 2.0, -2.0, 90.0], [-1.0, 7.0, 2.0, 2.0, 90.0]])
    last = look([200, 220], [[3.0, 0.0, 2.0, 2.0, 180.0], [5.0, 2.0, -2.0, 2.0, 160.0]])
    assert (first.distance, first.variance, first.steps, first.updates) == (1.0, 4.0, 90.0, 110)
    found = mixing.row("ring", 2, [first, last])
    assert found["distance"] == 1.0 and found["progress"] == pytest.approx(0.8)
    # Alone a rank would have a variance of 100 at the speed 1; here of 4 at the speed 0.8.
    assert found["neighbours"] == pytest.approx(0.8 * 100 / 4)
    assert found["messages"] == 2.0 and found["mixed"] == 0.5 and found["updates"] == 100
    assert found["in_step"] == pytest.approx(2, abs=0.05)


def facts(update: int, time_s: float, learner_s: float, process_s: float, peers: int, news_s: float) -> dict[str, Any]:
    """What a rank tells that mixes two messages at every other update, and writes a checkpoint each second."""
    own = {"update": update, "time_s": time_s, "learner_s": learner_s, "process_s": process_s, "peers": peers}
    own |= {"mixed": update, "sent": update, "mixing_updates": update // 2, "stale_sum": update // 2}
    own |= {"news_mean_s": news_s, "news_oldest_s": 2 * news_s, "pss_bytes": 2**20}
    return own | {"checkpoints": int(time_s), "checkpoint_s": 0.02 * time_s, "board_bytes": 64 * update}


def seen(*told: dict[str, Any]) -> Seen:
    return Seen(dict(enumerate(told)), np.zeros((len(told), 3)))


def test_what_a_thin_rank_costs_and_what_follows_from_it() -> None:
    """Two ranks for 10 s: one of 100 updates with one peer, one of 50 with three."""
    first = seen(facts(0, 0, 0, 0, 1, 0.1), facts(0, 0, 0, 0, 3, 0.3))
    last = seen(facts(100, 10, 0.2, 0.5, 1, 0.1), facts(50, 10, 0.1, 0.8, 3, 0.3))
    found = scaling.told([first, last])
    assert found["updates_per_s"] == 15 and found["others_per_s"] == 10
    assert found["mixed_share"] == found["staleness_mean"] == 0.5 and found["messages_mixed"] == 1
    assert found["news_mean_s"] == pytest.approx(0.2) and found["news_oldest_s"] == 0.6
    assert found["update_cpu_s"] == pytest.approx(0.002)
    assert found["board_bytes_per_s"] == 960 and found["pss_mib"] == found["most_pss_mib"] == 1
    assert found["checkpoint_s"] == pytest.approx(0.02) and found["checkpoint_share"] == pytest.approx(0.02)
    # Couriers took 3 and 7 hundredths of a core: one more of each peer, and one alone.
    assert found["courier_share"] == pytest.approx(0.05) and found["courier_by_peers"] == pytest.approx([0.01, 0.02])
    small = {**found, "start_s": 3.0, "start_cpu_s": 1.0}
    large = {**small, "start_cpu_s": 1.3, "update_cpu_s": 0.005}
    cost = scaling.costs(small, large, (2, 32), cores=2)
    assert cost.update_growth_s == pytest.approx(1e-4) and cost.start_growth_s == pytest.approx(0.01)
    assert cost.launch_s == 2 and cost.look_s == pytest.approx(0.01 * courier_rest_s(32))
    args = argparse.Namespace(checkpoint_every=10.0, timeout_s=60.0, before=20, counted=100)
    foretold = scaling.foretell(32, {**small, "nodes": 4, "update_s": 1.0, "peers": 2.0}, FREE, cost, args)
    cores = len(os.sched_getaffinity(0))
    # 0.05 of a core if it had one to itself; here it waits for one at times.
    assert foretold["update_cpu_s"] == pytest.approx(0.005) and 0.5 * 2 / 32 < foretold["courier_share"] < 0.05
    alone = scaling.courier_share(cost, {**small, "update_s": 1.0, "peers": 2.0}, 32, 10**6, 0.005)
    assert alone == pytest.approx(0.05, rel=0.05)
    assert foretold["start_s"] == pytest.approx(2 + 32 * 1.3 / cores)
    # Its sleep is nearly all of an update.
    assert foretold["updates_per_s"] == pytest.approx(32, rel=0.15) and foretold["news_mean_s"] > 0.2
