"""The stopwatch: every moment belongs to one part, and the run's profile says so."""

from __future__ import annotations

import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Mpi

from gala_mpi.stopwatch import LEARN, PARTS, ROLLOUT, Stopwatch, profile_table


def test_laps_add_up_to_the_time_that_passed() -> None:
    settled = []
    begin = time.perf_counter()
    watch = Stopwatch(lambda: settled.append(1))
    time.sleep(0.02)
    watch.lap("emulator")
    watch.lap("forward")
    time.sleep(0.01)
    watch.lap("backward")
    passed = time.perf_counter() - begin
    assert watch.seconds["emulator"] >= 0.02 and watch.seconds["forward"] < 0.01 and watch.seconds["backward"] >= 0.01
    assert sum(watch.seconds.values()) == pytest.approx(passed, abs=0.005)
    assert watch.sum(*ROLLOUT) + watch.sum(*LEARN) == pytest.approx(sum(watch.seconds.values()))
    assert len(settled) == 3


def test_the_table_gives_milliseconds_an_update_and_shares() -> None:
    seconds = {**dict.fromkeys(PARTS, 0.0), "emulator": 3.0, "exchange": 1.0}
    lines = profile_table(seconds, 1000).splitlines()
    assert "mean of 1,000: 4.000 ms" in lines[0]
    assert next(line for line in lines if "emulator" in line).split()[1:4] == ["3.000", "ms", "75.0%"]
    assert len(lines) == 1 + len(PARTS)
    assert profile_table(dict.fromkeys(PARTS, 0.0), 0)


@pytest.mark.parametrize("exchange", ["gossip", "allreduce"])
def test_a_run_tells_where_its_time_went(one_mpi: Mpi, exchange: str, tmp_path: Path) -> None:
    args = ("--preset", "cartpole", "--total-steps", "20_000", "--record-every", "1", "--exchange", exchange)
    args += ("--checkpoint-every-s", "0.05")
    done = one_mpi.run(2, "-m", "gala_mpi", *args, "--profile", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert all(f"  {part} " in done.stdout for part in PARTS)
    with h5py.File(tmp_path / "run" / "rank-00000.h5", "r", locking=False) as file:
        profile, updates = file["profile"][:], file["updates"][:]
    assert len(profile) == len(updates) > 0
    passed = profile["time_s"][-1] - profile["time_s"][0]
    parts = {part: profile[f"{part}_s"][-1] - profile[f"{part}_s"][0] for part in PARTS}
    assert all(seconds > 0 for part, seconds in parts.items())
    assert sum(parts.values()) == pytest.approx(passed, rel=0.05)
    # Of a usual update: where it is held up between two clocks, by other work, one of them counts that alone.
    usual, counted = (np.median(np.diff(table["exchange_s"])) for table in (profile, updates))
    assert usual == pytest.approx(counted, rel=0.5)
