"""Thin ranks: a small job of them starts, mixes, loses one, and ends as it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


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
