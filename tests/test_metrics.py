"""What a rank tells of a network that no longer learns."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from conftest import Mpi
from test_training import rows

from gala_mpi.metrics import BLIND_ROWS, BlindnessWatch


@pytest.mark.parametrize(
    ("values", "warns"),
    [
        ([1e-7, -1e-7] * BLIND_ROWS, True),
        # Rounding now and then gives more.
        (([0.0] * 9 + [0.02]) * BLIND_ROWS, True),
        ([0.0] * (BLIND_ROWS - 1), False),
        # Explains hardly anything, as at the beginning of a run.
        ([1e-3, -2e-3, 5e-4] * BLIND_ROWS, False),
        ([0.0, 0.9, 0.8] * BLIND_ROWS, False),
        ([float("nan")] * 2 * BLIND_ROWS, False),
    ],
)
def test_values_that_do_not_vary_are_told_once(
    values: list[float], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    watch = BlindnessWatch()
    with caplog.at_level(logging.WARNING):
        for update, value in enumerate(values):
            watch.note(value, update)
    assert len(caplog.records) == warns
    assert not warns or "--learning-rate-scaling none" in caplog.text


@pytest.mark.parametrize("rate", ["0.05", "1e-4"])
def test_a_dead_network_is_told(one_mpi: Mpi, rate: str, tmp_path: Path) -> None:
    """The first rewards of Pong, at a rate at which no ReLU survives them, and at one at which most do."""
    run = tmp_path / "run"
    args = ("--env", "ALE/Pong-v5", "--simulators", "4", "--learning-rate", rate, "--learning-rate-scaling", "none")
    args += ("--record-every", "1", "--total-steps", "4_400", "--out", str(run))
    done = one_mpi.run(2, "-m", "gala_mpi", *args, timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the values of all observations") == (rate == "0.05"), done.stderr
    assert (abs(rows(run, 0, "updates")["explained_variance"][-20:]) < 1e-5).all() == (rate == "0.05")
