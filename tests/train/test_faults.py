"""What befalls a run: full disks, folders that vanish, simulators that break or hang, want of memory, clocks set back.

Each fault is injected into one rank of a real run; the others must end, or go on, as the README says.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import Mpi, finish
from test_cli import assert_closed

from gala_mpi import files
from gala_mpi.config import RecordConfig
from gala_mpi.mpi.waiting import wait_until
from gala_mpi.status.command import status_of
from gala_mpi.storage.checkpoint import CheckpointError, CheckpointFolder, read
from gala_mpi.storage.recorder import Recorder
from gala_mpi.storage.run_folder import rank_file
from gala_mpi.storage.schema import TABLES

TRAIN = ("-m", "gala_mpi", "train", "--preset", "cartpole", "--record-every", "1", "--flush-every-s", "0.2")
LONG = ("--total-steps", "100_000_000")

# A fault in rank 1, after some updates.
FAULTY = """
import os, shutil, sys, time
import numpy as np
from mpi4py import MPI
from gala_mpi import cli
from gala_mpi.learning import environments
step, calls, wall = environments.Simulators.step, [], time.time
fault = sys.argv.pop(1)
class Broken:
    def __init__(self, env):
        self.env = env
    def __getattr__(self, name):
        return getattr(self.env, name)
    def step(self, actions):
        observations, rewards, *rest = self.env.step(actions)
        if fault == "observations":
            observations[2] = np.nan
        else:
            rewards[2] = np.inf
        return observations, rewards, *rest
def faulty(self, actions):
    calls.append(1)
    if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1 and len(calls) == 400:
        if fault == "raise":
            raise RuntimeError("the simulator broke")
        elif fault == "memory":
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
            np.ones(2**40)
        elif fault == "hang":
            time.sleep(10_000)
        elif fault in ("observations", "rewards"):
            self.env = Broken(self.env)
        elif fault == "clock":
            time.time = lambda: wall() - 3600
    return step(self, actions)
environments.Simulators.step = faulty
sys.exit(cli.train(sys.argv[1:]))
"""


# A row of each table.
ZEROS = {table.name: {column.name: 0 for column in table.columns} for table in TABLES}


def run_faulty(mpi: Mpi, fault: str, size: int, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return mpi.run(size, "-c", FAULTY, fault, *TRAIN[3:], *args, "--out", str(folder), timeout_s=100)


def updates(run: Path, rank: int) -> np.ndarray:
    with h5py.File(rank_file(run, rank), "r", swmr=True, locking=False) as file:
        return file["updates"][:]


@pytest.mark.parametrize("exchange", ["gossip", "allreduce"])
def test_a_simulator_that_raises_ends_all_ranks_with_checkpoints(mpi: Mpi, exchange: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_faulty(mpi, "raise", 3, run, *LONG, "--exchange", exchange)
    assert done.returncode == 1, done.stderr
    assert "[2/3] RuntimeError: the simulator broke" in done.stderr
    assert "[2/3] Traceback (most recent call last):" in done.stderr
    assert "--resume goes on" in done.stderr and "ranks that ended by an error: 2" in done.stdout
    assert "stopped (rank 2 ended by an error, see above): " in done.stdout and "another rank" not in done.stdout
    assert_closed(run, 3, failed={2})
    for rank in range(2):
        # Not only the one of the beginning.
        newest = read(CheckpointFolder(run, rank).newest_first()[0], 10**8)
        assert newest.facts.update == updates(run, rank)["update"][-1] > 0
    steps = sum(int(updates(run, rank)["agent_steps"][-1]) for rank in range(3))
    again = mpi.run(3, *TRAIN[:3], "--resume", str(run), "--total-steps", str(steps + 3 * 64 * 10))
    assert again.returncode == 0, again.stderr


SAID = {
    "observations": r"SimulatorError: simulator 2 of this rank gave observations that are not finite \(\[nan",
    "rewards": r"SimulatorError: simulator 2 of this rank gave rewards that are not finite \(inf\)",
    "memory": r"MemoryError: Unable to allocate",
}


def check_what_breaks_the_last_rank(mpi: Mpi, size: int, fault: str, run: Path) -> None:
    done = run_faulty(mpi, fault, size, run, *LONG)
    assert done.returncode == 1, done.stderr
    assert re.search(rf"\[{size - 1}/{size}\] .*{SAID[fault]}", done.stderr), done.stderr
    assert_closed(run, size, failed={size - 1})


@pytest.mark.parametrize("fault", SAID)
def test_what_breaks_one_rank_is_named_and_ends_the_run(mpi: Mpi, fault: str, tmp_path: Path) -> None:
    check_what_breaks_the_last_rank(mpi, 2, fault, tmp_path / "run")


@pytest.mark.parametrize("fault", SAID)
def test_what_breaks_the_only_rank_is_named_and_ends_the_run(one_mpi: Mpi, fault: str, tmp_path: Path) -> None:
    check_what_breaks_the_last_rank(one_mpi, 1, fault, tmp_path / "run")


@pytest.mark.check
def test_a_simulator_that_hangs_ends_its_rank_with_its_stack(one_mpi: Mpi, tmp_path: Path) -> None:
    done = run_faulty(one_mpi, "hang", 1, tmp_path / "run", *LONG, "--simulator-timeout-s", "3")
    assert done.returncode == 1
    assert "a rollout takes longer than 3 s (--simulator-timeout-s)" in done.stderr and "in faulty" in done.stderr
    # Its file can be read, as that of any killed rank.
    updates(tmp_path / "run", 0)


def test_a_simulator_that_hangs_does_not_hold_others_up(mpi: Mpi, tmp_path: Path) -> None:
    """It counts as lost, and the others finish the budget."""
    args = ("--total-steps", "60_000", "--neighbour-timeout-s", "2", "--simulator-timeout-s", "500")
    done = run_faulty(mpi, "hang", 3, tmp_path / "run", *args)
    assert done.returncode == 3, done.stderr
    assert "lost ranks: 2" in done.stdout and status_of(tmp_path / "run").code == 3


def test_a_clock_that_is_set_back_changes_nothing(one_mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_faulty(one_mpi, "clock", 2, run, *LONG, "--time-limit-s", "8")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        times = updates(run, rank)["time_s"]
        assert (np.diff(times) > 0).all() and 7 < times[-1] < 12
        with h5py.File(rank_file(run, rank), "r") as file:
            assert (np.diff(file["sketches"]["time_s"]) >= 0).all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], check=False)
    if mounted.returncode != 0:
        if os.environ.get("GALA_MPI_REQUIRE_CLUSTER"):
            pytest.fail("a small file system is required: only root may mount one")
        pytest.skip("only root may mount a small file system")
    yield place
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", "-l", str(place)], check=True)


def resize(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def start(mpi: Mpi, run: Path, *args: str) -> subprocess.Popen[str]:
    return mpi.start(2, *TRAIN, *args, "--checkpoint-every-s", "0.5", "--out", str(run))


def wait_for_rows(run: Path, count: int, newer_than: int = 0) -> None:
    """Until each rank has left so many rows, and a checkpoint of a later update."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, RuntimeError, KeyError, IndexError, CheckpointError):
            newest = [CheckpointFolder(run, rank).newest_first()[0] for rank in range(2)]
            if all(len(updates(run, rank)) >= count for rank in range(2)) and all(
                read(path, 10**7).facts.update > newer_than for path in newest
            ):
                return
        time.sleep(0.1)
    pytest.fail(f"{run} has no {count} rows")


def test_a_full_disk_is_waited_out(mpi: Mpi, small_disk: Path) -> None:
    run = small_disk / "run"
    process = start(mpi, run, *LONG)
    wait_for_rows(run, 5)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"x" * 65536)
    time.sleep(6)
    # All that is there can be read, on a disk that is still full.
    before = [len(updates(run, rank)) for rank in range(2)]
    newest = 0
    for rank in range(2):
        folder = CheckpointFolder(run, rank)
        update = read(folder.newest_first()[0], 10**7).facts.update
        assert update > 0
        newest = max(newest, update)
        # Both go on trying.
        assert wait_until(lambda: not list(folder.path.glob("*.tmp")), 10)  # noqa: B023
    filler.unlink()
    resize(small_disk, "size=200m")
    wait_for_rows(run, max(before) + 1, newer_than=newest)
    process.send_signal(signal.SIGUSR1)
    done = finish(process, 60)
    assert done.returncode == 75, done.stderr
    for rank in range(2):
        assert f"rank-{rank:05d}.h5: metrics cannot be written" in done.stderr
        assert f"rank-{rank:05d}: no checkpoint can be written" in done.stderr
        assert f"rank-{rank:05d}.h5: is written again" in done.stderr
        assert f"rank-{rank:05d}: checkpoints are written again" in done.stderr
        table = updates(run, rank)
        assert len(table) > before[rank] and table["update"].tolist() == list(range(1, len(table) + 1))
        assert read(CheckpointFolder(run, rank).newest_first()[0], 10**7).facts.update == len(table)


@pytest.mark.parametrize("ended", ["time", "signal"])
def test_a_disk_that_stays_full_costs_what_could_not_be_written(one_mpi: Mpi, ended: str, small_disk: Path) -> None:
    """Also where the run was told to end: who queues it again at once would lose the same again."""
    run = small_disk / "run"
    (small_disk / "filler").write_bytes(b"x" * 1_200_000)
    process = start(one_mpi, run, *LONG, "--time-limit-s", "12" if ended == "time" else "1000")
    if ended == "signal":
        wait_for_rows(run, 1)
        time.sleep(10)
        process.send_signal(signal.SIGUSR1)
    done = finish(process, 100)
    # It filled what was left by itself.
    assert done.returncode == 5, done.stderr
    assert "ranks that could not write all metrics, or their last checkpoint: 0, 1" in done.stdout
    for rank in range(2):
        table = updates(run, rank)
        assert len(table) > 0 and table["update"].tolist() == list(range(1, len(table) + 1))
        assert read(CheckpointFolder(run, rank).newest_first()[0], 10**7).facts.update > 0


@pytest.mark.parametrize("how", ["read-only", "removed"])
def test_a_folder_that_cannot_be_written_any_more_does_not_end_the_run(
    one_mpi: Mpi, how: str, small_disk: Path
) -> None:
    resize(small_disk, "size=200m")
    run = small_disk / "run"
    process = start(one_mpi, run, *LONG, "--time-limit-s", "8")
    wait_for_rows(run, 5)
    if how == "removed":
        # At once: it is being written.
        gone = run.rename(small_disk / "gone")
        shutil.rmtree(gone)
    else:
        # Files that are open for writing stay so: those are written on.
        subprocess.run(["mount", "-o", "bind", str(small_disk), str(small_disk)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(small_disk)], check=True)
    done = finish(process, 60)
    assert done.returncode == 5, done.stderr
    assert re.search(r"rank-0000\d: no checkpoint can be written \(.*(No such file|Read-only)", done.stderr)
    if how == "removed":
        assert re.search(r"rank-0000\d.h5: metrics cannot be written", done.stderr)
    else:
        subprocess.run(["umount", str(small_disk)], check=True)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from gala_mpi.config import RecordConfig
from gala_mpi.storage.recorder import Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    Recorder(path, {"config": "x" * 3000}, RecordConfig(), 1)
except OSError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("limit", [0, 512, 2048, 4096, 6000, 9000])
def test_a_file_that_cannot_be_begun_is_refused_and_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """As on a disk that is full from the start."""
    args = [sys.executable, "-c", LIMITED, str(tmp_path / "rank-00000.h5"), str(limit)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and done.stdout.startswith("refused"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_quota_that_is_reached_is_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rank_file(tmp_path, 0)
    recorder = Recorder(path, {}, RecordConfig(), 1)

    def no_more(_handle: int, _begin: int, _length: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as quota:
        quota.setattr(files, "_fallocate", no_more)
        for count in range(1, 101):
            recorder.append("episodes", **{**ZEROS["episodes"], "update": count})
            assert not recorder.flush()
    assert list(tmp_path.iterdir()) == [path]
    assert recorder.close()
    with h5py.File(path, "r") as file:
        assert file["episodes"]["update"].tolist() == list(range(1, 101))


def test_a_flush_makes_no_file_and_keeps_no_more_than_it_needs(tmp_path: Path) -> None:
    """Thousands of ranks flush into one folder, every few seconds."""
    path = rank_file(tmp_path, 0)
    recorder = Recorder(path, {}, RecordConfig(), 1)
    folder = tmp_path.stat().st_mtime_ns
    set_aside: list[int] = []
    for count in range(1, 101):
        recorder.append("episodes", **{**ZEROS["episodes"], "update": count})
        assert recorder.flush()
        set_aside.append(512 * path.stat().st_blocks - path.stat().st_size)
    assert tmp_path.stat().st_mtime_ns == folder
    # What is set aside does not grow from flush to flush, and is given back at the end.
    assert max(set_aside[1:]) <= 2**20
    assert recorder.close() and 512 * path.stat().st_blocks < path.stat().st_size + 2**16
    with h5py.File(path, "r") as file:
        assert file["episodes"]["update"].tolist() == list(range(1, 101))


@pytest.mark.parametrize("room", [0, 2**30])
def test_where_no_room_can_be_kept_what_is_free_counts(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS before 4.2."""
    recorder = Recorder(rank_file(tmp_path, 0), {}, RecordConfig(), 1)

    def cannot(_handle: int, _begin: int, _length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as old:
        old.setattr(files, "_fallocate", cannot)
        old.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=room // 4096, f_frsize=4096))
        recorder.append("episodes", **ZEROS["episodes"])
        assert recorder.flush() == bool(room)
    assert recorder.close()


WRITER = """
import sys
from pathlib import Path
from gala_mpi.config import RecordConfig
from gala_mpi.storage.recorder import Recorder
from gala_mpi.storage.schema import TABLES
zeros = {table.name: {column.name: 0 for column in table.columns} for table in TABLES}
recorder, count = Recorder(Path(sys.argv[1]), {}, RecordConfig(), 1), 0
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(500):
        count += 1
        for table in ("episodes", "updates"):
            recorder.append(table, **{**zeros[table], "update": count})
    print(int(recorder.flush() if line == "flush\\n" else recorder.close()), flush=True)
"""


@pytest.mark.parametrize("space", range(150, 900, 50))
def test_a_file_on_a_disk_of_any_size_stays_readable(space: int, small_disk: Path) -> None:
    """Whatever does not fit any more: a chunk, its index, or the file's own list of rows."""
    path = rank_file(small_disk, 0)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None

        def tell(order: str) -> bool:
            assert writer.stdin is not None and writer.stdout is not None
            writer.stdin.write(f"{order}\n")
            writer.stdin.flush()
            return writer.stdout.readline() == "1\n"

        assert writer.stdout.readline() == "ready\n"
        (small_disk / "filler").write_bytes(b"x" * (3 * 2**20 - space * 1024))
        failures = 0
        for count in range(500, 15_000, 500):
            written = tell("flush")
            failures += not written
            assert written or failures > 0
            with h5py.File(path, "r", swmr=True, locking=False) as file:
                for table in ("episodes", "updates"):
                    rows = file[table]["update"]
                    assert rows.tolist() == list(range(1, len(rows) + 1))
                    assert not written or len(rows) == count
        assert failures
        if space % 100:
            resize(small_disk, "size=30m")
        assert tell("close") == bool(space % 100)
        writer.stdin.close()
        assert writer.wait(10) == 0
    with h5py.File(path, "r", swmr=True, locking=False) as file:
        for table in ("episodes", "updates"):
            rows = file[table]["update"]
            assert rows.tolist() == list(range(1, len(rows) + 1))
            assert space % 100 == 0 or len(rows) == 15_000
