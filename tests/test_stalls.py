"""What a rank tells of a network that no longer learns."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import Mpi
from test_training import rows

from gala_mpi.stalls import MOST_ROWS, BlindnessWatch


@pytest.mark.parametrize(
    ("values", "warns"),
    [
        ([1e-7, -1e-7] * MOST_ROWS, True),
        # Rounding now and then gives more.
        (([0.0] * 9 + [0.02]) * MOST_ROWS, True),
        ([0.0] * (MOST_ROWS - 1), False),
        # Explains hardly anything, as at the beginning of a run.
        ([1e-3, -2e-3, 5e-4] * MOST_ROWS, False),
        ([0.0, 0.9, 0.8] * MOST_ROWS, False),
        ([float("nan")] * 2 * MOST_ROWS, False),
    ],
)
def test_values_that_do_not_vary_are_told_once(
    values: list[float], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watch = BlindnessWatch(record_every=1)
    with caplog.at_level(logging.WARNING):
        for update, value in enumerate(values):
            watch.note(value, update)
    assert len(caplog.records) == warns
    assert not warns or "--learning-rate-scaling none" in caplog.text


@pytest.mark.parametrize(("record_every", "count"), [(1, 50), (10, 50), (20, 25), (1000, 10)])
def test_it_takes_some_five_hundred_updates(record_every: int, count: int, caplog: pytest.LogCaptureFixture) -> None:
    watch = BlindnessWatch(record_every)
    for row in range(count):
        assert not caplog.records
        watch.note(0.0, (row + 1) * record_every)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("rate", ["0.05", "1e-4"])
def test_a_dead_network_is_told(one_mpi: Mpi, rate: str, tmp_path: Path) -> None:
    """The first rewards of Pong, at a rate at which no ReLU survives them, and at one at which most do."""
    run = tmp_path / "run"
    args = ("--env", "ALE/Pong-v5", "--simulators", "4", "--learning-rate", rate, "--learning-rate-scaling", "none")
    args += ("--exchange", "none", "--budget", "per-rank", "--record-every", "1", "--total-steps", "2_800")
    done = one_mpi.run(2, "-m", "gala_mpi", *args, "--out", str(run), timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the value of all observations") == 2 * (rate == "0.05"), done.stderr
    assert (np.median(abs(rows(run, 0, "updates")["explained_variance"][-50:])) < 1e-5) == (rate == "0.05")
