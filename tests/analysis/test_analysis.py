"""The offline analysis: numbers worked out by hand, runs that are alive or broken, and no import of torch or MPI."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from gala_mpi import _native
from gala_mpi.config import RecordConfig
from gala_mpi.storage.recorder import Recorder
from gala_mpi.storage.run_folder import rank_file

ANALYSIS = ROOT / "analysis"
DIMENSION = 4


def write_rank(
    folder: Path,
    rank: int,
    size: int = 2,
    run_id: str = "one",
    name: str | None = None,
    dimension: int = DIMENSION,
    segment: int = 0,
    **about: object,
) -> Recorder:
    """A new rank file without rows."""
    path = folder / name if name else rank_file(folder, rank, segment)
    path.parent.mkdir(parents=True, exist_ok=True)
    attributes = {"run_id": run_id, "rank": rank, "size": size, "env_id": "Task-v0", "config": {}, "t0": 0.0, **about}
    config = RecordConfig(sketch_dimension=dimension, sketch_every_s=10)
    return Recorder(path, attributes, config, seed=1)


def episode(recorder: Recorder, time_s: float, steps: int, episode_return: float, update: int = 1) -> None:
    row = {"time_s": time_s, "agent_steps": steps, "episode_return": episode_return}
    recorder.append("episodes", **row, update=update, env_index=0, length=10)


def run_script(script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ANALYSIS / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)


def assert_png(path: Path) -> None:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_the_mean_return_and_the_total_steps_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with_rows = [write_rank(run, rank) for rank in range(2)]
    # Rank 0 goes at 100 steps a second, rank 1 at 50.
    for time_s, value in ((1.0, 10.0), (3.0, 30.0)):
        episode(with_rows[0], time_s, round(100 * time_s), value)
    for time_s, value in ((2.0, 20.0), (4.0, 60.0)):
        episode(with_rows[1], time_s, round(50 * time_s), value)
    for recorder in with_rows:
        recorder.close()
    done = run_script("learning_curves.py", run, "--window", "2")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(run / "learning-curve.csv")
    assert table["episode_return"].tolist() == [10, 20, 30, 60]
    assert table["mean_return"].tolist() == [10, 15, 25, 45]
    assert table["episodes_in_window"].tolist() == [1, 2, 2, 2]
    # At 2 s rank 0 is half way between 100 and 300; at 4 s nothing is known of it after 300.
    assert table["agent_steps"].tolist() == [100 + 50, 200 + 100, 300 + 150, 300 + 200]
    assert done.stdout.splitlines()[-1] == str(run / "learning-curve.png")
    assert "4 episodes, 500 agent steps" in done.stdout and "45.00 at the end" in done.stdout
    assert_png(run / "learning-curve.png")


def test_segments_are_joined_in_order(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for segment, name in enumerate(["rank-00000.h5", *(f"segment-{n}/rank-00000.h5" for n in range(1, 12))]):
        recorder = write_rank(run, 0, size=1, name=name)
        episode(recorder, segment + 1.0, segment + 1, float(segment))
        recorder.close()
    assert run_script("learning_curves.py", run, "--out", tmp_path / "out").returncode == 0
    table = pd.read_csv(tmp_path / "out" / "learning-curve.csv")
    assert table["episode_return"].tolist() == list(range(12))
    assert not list(run.glob("*.csv"))


def test_consensus_distances_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = {
        0: [(0.1, (0, 0, 0, 0)), (10.2, (3, 4, 0, 0)), (20.0, (1, 1, 1, 1))],
        1: [(0.3, (0, 0, 0, 2)), (19.9, (3, 4, 0, 0))],
    }
    for rank, sketches in rows.items():
        recorder = write_rank(run, rank)
        for time_s, values in sketches:
            recorder.append("sketches", time_s=time_s, update=5, norm=1.0, sketch=np.array(values, np.float32))
        recorder.close()
    done = run_script("consensus.py", run)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(run / "consensus.csv")
    # Instant 0: the mean is (0, 0, 0, 1), one away from both. Instant 1: equal. Instant 2: one rank only, left out.
    assert table["instant"].tolist() == [0, 0, 1, 1]
    assert table["distance_to_mean"].tolist() == [1, 1, 0, 0]
    assert table["mean_norm"].tolist() == [1, 1, 5, 5]
    assert table["ranks"].tolist() == [2, 2, 2, 2]
    assert_png(run / "consensus.png")


def test_sketches_give_true_distances_within_the_stated_error() -> None:
    """Over many seeds, squared distances are right on average and scatter by sqrt(2 / d)."""
    rng = np.random.default_rng(0)
    size, dimension, seeds = 20_000, 256, 400
    first, second = (rng.normal(size=size).astype(np.float32) for _ in range(2))
    true = float(np.square(first.astype(float) - second).sum())
    estimates = []
    for seed in range(seeds):
        sketches = np.zeros((2, dimension), np.float32)
        for values, sketch in zip((first, second), sketches, strict=True):
            _native.sketch(values, sketch, seed)
        estimates.append(np.square(sketches[0].astype(float) - sketches[1]).sum() / true)
    stated = np.sqrt(2 / dimension)
    # The mean of 400 scatters by stated / 20, their standard deviation by stated / sqrt(800).
    assert abs(np.mean(estimates) - 1) < 4 * stated / np.sqrt(seeds)
    assert abs(np.std(estimates) / stated - 1) < 4 / np.sqrt(2 * seeds)


@pytest.mark.parametrize("script", ["learning_curves.py", "consensus.py"])
def test_a_run_without_rows_gives_an_empty_table_and_a_picture(script: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for rank in range(2):
        write_rank(run, rank).close()
    done = run_script(script, run)
    assert done.returncode == 0, done.stderr
    stem = {"learning_curves.py": "learning-curve", "consensus.py": "consensus"}[script]
    assert len(pd.read_csv(run / f"{stem}.csv")) == 0
    assert_png(run / f"{stem}.png")
    assert " yet" in done.stdout


def broken(tmp_path: Path, kind: str) -> Path:
    run = tmp_path / "run"
    if kind == "no folder":
        return run
    run.mkdir()
    if kind == "not HDF5":
        (run / "rank-00000.h5").write_bytes(b"hello" * 1000)
    elif kind == "other schema":
        with h5py.File(run / "rank-00000.h5", "w") as file:
            file.attrs["schema"] = 99
    elif kind == "two runs":
        write_rank(run, 0, run_id="one").close()
        write_rank(run, 1, run_id="two").close()
    elif kind == "linked table":
        write_rank(run, 0).close()
        with h5py.File(run / "rank-00000.h5", "r+") as file:
            del file["episodes"]
            file["episodes"] = h5py.ExternalLink("elsewhere.h5", "/episodes")
    return run


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no folder", "is no folder"),
        ("empty", "no file rank-00000.h5"),
        ("not HDF5", "rank-00000.h5: cannot be read"),
        ("other schema", "schema 99 is unknown; expected 1"),
        ("two runs", "expected one run"),
        ("linked table", "table episodes is missing"),
    ],
)
@pytest.mark.parametrize("script", ["learning_curves.py", "consensus.py"])
def test_what_cannot_be_read_is_one_line_and_exit_code_2(script: str, kind: str, said: str, tmp_path: Path) -> None:
    done = run_script(script, broken(tmp_path, kind))
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_missing_rank_is_only_warned_of(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recorder = write_rank(run, 1, size=3)
    episode(recorder, 1.0, 10, 5.0)
    recorder.close()
    done = run_script("learning_curves.py", run)
    assert done.returncode == 0 and "no file rank-00000.h5, rank-00002.h5\n" in done.stderr


def test_a_live_run_is_read_while_its_writer_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    recorder = write_rank(run, 0, size=1)
    episode(recorder, 1.0, 10, 5.0)
    recorder.flush()
    assert run_script("learning_curves.py", run).returncode == 0
    episode(recorder, 2.0, 20, 7.0)
    recorder.close()
    assert len(pd.read_csv(run / "learning-curve.csv")) == 1


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("pong/seed1", "breakout/seed1", "pong/seed2")]
    for run in runs:
        recorder = write_rank(run, 0, size=1)
        episode(recorder, 1.0, 100, 10.0)
        recorder.close()
    done = run_script("learning_curves.py", *runs, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(tmp_path / "out" / "learning-curve.csv")["run"].to_list()
    assert found == ["pong/seed1", "breakout/seed1", "pong/seed2"]
    alone = run_script("learning_curves.py", runs[0], runs[2], "--out", tmp_path / "out")
    assert alone.returncode == 0, alone.stderr
    assert pd.read_csv(tmp_path / "out" / "learning-curve.csv")["run"].to_list() == ["seed1", "seed2"]
    twice = run_script("learning_curves.py", runs[0], tmp_path / "pong" / ".." / "pong" / "seed1")
    assert twice.returncode == 2 and "is given twice" in twice.stderr and len(twice.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["learning_curves.py", "consensus.py"])
def test_drawings_come_out_whatever_the_environment_holds(script: str, tmp_path: Path) -> None:
    """A name that matplotlib would hide, a notebook's backend, a home, and an encoding without its letters."""
    run = tmp_path / "_größe"
    for rank in range(2):
        recorder = write_rank(run, rank)
        episode(recorder, 1.0, 100, 10.0)
        recorder.append("sketches", time_s=1.0, update=1, norm=1.0, sketch=np.full(4, rank, np.float32))
        recorder.close()
    environment = {"MPLBACKEND": "module://not_here.backend", "HOME": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    # Who finds no list of fonts there makes one, and says so where that takes longer than 5 s.
    fonts = "import matplotlib.font_manager; print(matplotlib.get_configdir())"
    made = subprocess.run([sys.executable, "-c", fonts], capture_output=True, text=True, check=True)
    environment["MPLCONFIGDIR"] = made.stdout.strip()
    command = [sys.executable, "-W", "error", str(ANALYSIS / script), str(run), "--out=~/figures"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for picture in (tmp_path / "figures").glob("*.png"):
        assert_png(picture)
    assert len(list((tmp_path / "figures").iterdir())) == 2
    for nobody in (">&-", "> /dev/full"):
        silent = subprocess.run(["bash", "-c", f'exec "$0" "$@" {nobody}', *command], capture_output=True, check=False)
        assert silent.returncode == 0 and silent.stderr == b"", silent.stderr
    nowhere = subprocess.run([*command[:-1], "--out="], capture_output=True, text=True, check=False)
    assert nowhere.returncode == 2 and "expected the path of a folder" in nowhere.stderr


@pytest.mark.parametrize("script", ["learning_curves", "consensus"])
def test_neither_torch_nor_mpi_is_imported(script: str) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ANALYSIS)!r}); import {script}\n"
        "bad = {name for name in sys.modules if name.split('.')[0] in ('torch', 'mpi4py', 'gala_mpi')}\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_rows_are_void_only_where_a_rank_went_on_from_before_them(tmp_path: Path) -> None:
    """Rank 1 left no checkpoint: it goes on from rank 0's update 5, counts from there, and is killed at 9, of 7."""
    run = tmp_path / "run"
    starts = (
        (0, None, range(1, 11)),
        (1, {"time_s": 5.0, "update": 5, "agent_steps": 50, "size": 2, "updates": [5, 2**43]}, range(6, 10)),
        (2, {"time_s": 7.0, "update": 7, "agent_steps": 70, "size": 2, "updates": [7, 7]}, range(8, 9)),
    )
    for segment, resumed, updates in starts:
        for rank in range(2):
            recorder = write_rank(run, rank, segment=segment, **({"resumed": resumed} if resumed else {}))
            for update in updates:
                episode(recorder, float(update), 10 * update, 1.0, update)
            recorder.close()
    done = run_script("learning_curves.py", run)
    assert done.returncode == 0, done.stderr
    program = (
        f"import runs; from pathlib import Path; print(runs.read_run(Path({str(run)!r})).table('episodes').to_csv())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ANALYSIS, capture_output=True, text=True, check=True)
    table = pd.read_csv(io.StringIO(done.stdout))
    kept = {(rank, segment): rows["update"].tolist() for (rank, segment), rows in table.groupby(["rank", "segment"])}
    first = {(0, 0): list(range(1, 6)), (1, 0): list(range(1, 11))}
    assert kept == first | {(rank, segment): [6, 7] if segment == 1 else [8] for rank in (0, 1) for segment in (1, 2)}
