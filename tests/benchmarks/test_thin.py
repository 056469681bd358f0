"""Thin ranks: a small job of them starts, mixes, loses one, and ends as it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import mixing
from thin import Seen


def test_thin_ranks_mix_lose_one_and_end(tmp_path: Path) -> None:
    out = tmp_path / "thin.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "thin.py"), "--ranks", "4", "--kill", "1", "--out", str(out)]
    command += ["--update-s", "0.02", "--timeout-s", "8", "--settle-s", "2", "--looks", "1", "--topology", "ring"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    before, after = found["acts"]
    assert found["exit_codes"] == [3]
    assert before["living"] == 4 and before["detours"] == 0 and before["least_mixed_per_update"] > 0
    assert after["living"] == after["know_of_all_lost"] == 3
    # The ring of four without one of them is a chain.
    assert after["detours"] == 2
    assert 0 < before["consensus_distance"] < 100 and 0 < after["consensus_distance"] < 100


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
