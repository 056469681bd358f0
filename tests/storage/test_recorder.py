"""The recorder: what was flushed is never lost, and readers see a file grow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from gala_mpi.config import RecordConfig
from gala_mpi.storage.recorder import Recorder
from gala_mpi.storage.run_folder import rank_file
from gala_mpi.storage.schema import TABLES

WRITER = """
import sys, time
from pathlib import Path
from gala_mpi.config import RecordConfig
from gala_mpi.storage.recorder import Recorder
config = RecordConfig(flush_every_s=0.2, sketch_dimension=8)
recorder = Recorder(Path(sys.argv[1]), {"run_id": "x"}, config, seed=1)
n = 0
while True:
    n += 1
    row = {"update": n, "agent_steps": 10 * n, "env_index": 0, "episode_return": float(n), "length": n}
    recorder.append("episodes", time_s=time.time(), **row)
    recorder.flush_if_due()
    if n % 10 == 0:
        print(n, time.time(), flush=True)
    time.sleep(0.001)
"""


EPISODE = {"time_s": 0.0, "update": 1, "agent_steps": 1, "env_index": 0, "episode_return": 1.0, "length": 1}


def open_for_reading(path: Path) -> h5py.File:
    return h5py.File(path, "r", swmr=True, locking=False)


def start_writer(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)


def wait_for_rows(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists():
            try:
                with open_for_reading(path) as file:
                    if len(file["episodes"]) > 100:
                        return
            except (OSError, KeyError):
                pass  # not in SWMR mode yet
        time.sleep(0.05)
    pytest.fail("the writer wrote nothing")


def test_a_killed_writer_loses_no_more_than_the_last_interval(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0)
    process = start_writer(path)
    wait_for_rows(path, process)
    os.kill(process.pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    last_said, said_at_s = out.splitlines()[-1].split()
    with open_for_reading(path) as file:
        rows = file["episodes"][:]
    # Every row is whole and there is none missing in between.
    np.testing.assert_array_equal(rows["update"], np.arange(1, len(rows) + 1))
    np.testing.assert_array_equal(rows["agent_steps"], 10 * rows["update"])
    # What is lost is younger than the interval, with room for a writer that was not scheduled for a while.
    assert float(said_at_s) - rows["time_s"][-1] < 0.2 + 1.0
    assert len(rows) <= int(last_said) + 10


def test_a_reader_follows_a_live_run(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0)
    process = start_writer(path)
    try:
        wait_for_rows(path, process)
        seen = []
        with open_for_reading(path) as file:
            deadline = time.monotonic() + 120
            while len(set(seen)) < 4 and time.monotonic() < deadline:
                file["episodes"].refresh()
                rows = file["episodes"][:]
                np.testing.assert_array_equal(rows["update"], np.arange(1, len(rows) + 1))
                seen.append(len(rows))
                time.sleep(0.1)
        assert seen == sorted(seen) and len(set(seen)) >= 4
    finally:
        process.kill()
        process.communicate(timeout=120)


def test_the_file_follows_the_schema(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 3)
    recorder = Recorder(path, {"rank": 3, "config": {"a": {"b": 1}}}, RecordConfig(sketch_dimension=16), seed=5)
    recorder.append("sketches", time_s=0.5, update=1, norm=2.0, sketch=np.arange(16, dtype=np.float32))
    recorder.close()
    assert path.name == "rank-00003.h5"
    with h5py.File(path, "r") as file:
        assert set(file) == {"updates", "profile", "episodes", "sketches", "neighbours"}
        assert file.attrs["schema"] == 1 and file.attrs["rank"] == 3
        assert json.loads(file.attrs["config"]) == {"a": {"b": 1}}
        for table in TABLES:
            names = [column.name for column in table.columns]
            assert list(file[table.name].dtype.names) == names
            units, meaning = (json.loads(file[table.name].attrs[name]) for name in ("units", "meaning"))
            assert list(units) == names and list(meaning) == names
            assert all(units.values()) and all(meaning.values())
        assert dict(file["sketches"].attrs)["interval_s"] == 10 and file["sketches"].attrs["seed"] == 5
        np.testing.assert_array_equal(file["sketches"][0]["sketch"], np.arange(16))


def test_an_existing_file_is_never_touched(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0)
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        Recorder(path, {}, RecordConfig(), seed=1)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("change", ["a column less", "a column more"])
def test_a_row_has_a_value_for_each_column_and_no_other(tmp_path: Path, change: str) -> None:
    recorder = Recorder(rank_file(tmp_path, 0), {}, RecordConfig(), seed=1)
    row = {**EPISODE, "lives": 3} if change == "a column more" else {k: v for k, v in EPISODE.items() if k != "length"}
    missing, unknown = ([], ["lives"]) if change == "a column more" else (["length"], [])
    said = f"a row of episodes: columns without values: {missing}; values without columns: {unknown}"
    with pytest.raises(ValueError, match=re.escape(said)):
        recorder.append("episodes", **row)
    # In whatever order they are given.
    recorder.append("episodes", **dict(reversed({**EPISODE, "length": 7}.items())))
    recorder.close()
    with h5py.File(rank_file(tmp_path, 0), "r") as file:
        assert file["episodes"][:].tolist() == [(0.0, 1, 1, 0, 1.0, 7)]


def test_rows_reach_the_file_only_with_a_flush_and_then_all(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0)
    recorder = Recorder(path, {}, RecordConfig(flush_every_s=3600), seed=1)
    for n in range(1000):
        recorder.append("episodes", **{**EPISODE, "update": n})
        recorder.flush_if_due()
    with open_for_reading(path) as file:
        assert len(file["episodes"]) == 0
    recorder.flush()
    with open_for_reading(path) as file:
        assert len(file["episodes"]) == 1000
    recorder.close()
    recorder.close()


def test_the_first_flush_comes_earlier_by_its_phase_and_the_others_do_not(tmp_path: Path) -> None:
    path = rank_file(tmp_path, 0)
    recorder = Recorder(path, {}, RecordConfig(flush_every_s=3600), seed=1, phase=0.9999999)
    for n in range(1000):
        recorder.append("episodes", **{**EPISODE, "update": n})
        recorder.flush_if_due()
    with open_for_reading(path) as file:
        assert 0 < len(file["episodes"]) < 1000
    recorder.close()
