"""What a rank tells of learning that has stopped."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import Mpi
from test_training import rows

from gala_mpi.learning.stalls import MOST_ROWS, StallWatch

WELL = {"explained_variance": 0.5, "entropy": 0.5, "value_loss": 1.0}


def told(column: str, values: list[float], caplog: pytest.LogCaptureFixture, actions: int = 2, **others: float) -> str:
    """What is said of rows in which one column has these values."""
    watch = StallWatch(record_every=1, actions=actions)
    with caplog.at_level(logging.WARNING):
        for update, value in enumerate(values):
            watch.note(update, **{**WELL, **others, column: value})
    assert len(caplog.records) <= 1
    return caplog.text


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
    said = told("explained_variance", values, caplog)
    assert bool(said) == warns
    assert not warns or "--learning-rate-scaling none" in said


def test_returns_that_are_too_large_are_told_as_such(caplog: pytest.LogCaptureFixture) -> None:
    """The network is well; values of a usual size explain nothing of them."""
    said = told("explained_variance", [1e-9] * MOST_ROWS, caplog, value_loss=1e20)
    assert "rewards are too large" in said and "1e+20" in said and "dead" not in said


@pytest.mark.parametrize(
    ("values", "actions", "warns"),
    [
        ([1e-7] * MOST_ROWS, 2, True),
        ([0.0] * MOST_ROWS, 18, True),
        # Sure of most, but not of all.
        ([1e-7, 1e-2, 1e-2] * MOST_ROWS, 2, False),
        ([1e-7] * (MOST_ROWS - 1), 2, False),
        # There is no choice.
        ([0.0] * 2 * MOST_ROWS, 1, False),
    ],
)
def test_a_policy_without_doubts_is_told_once(
    values: list[float], actions: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    said = told("entropy", values, caplog, actions)
    assert bool(said) == warns and (not warns or "--entropy-weight" in said)


@pytest.mark.parametrize(("record_every", "count"), [(1, 50), (10, 50), (20, 25), (1000, 10)])
def test_it_takes_some_five_hundred_updates(record_every: int, count: int, caplog: pytest.LogCaptureFixture) -> None:
    watch = StallWatch(record_every, actions=2)
    for row in range(count):
        assert not caplog.records
        watch.note((row + 1) * record_every, **{**WELL, "explained_variance": 0.0})
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
