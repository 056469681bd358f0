"""Runs that go on: the same to the bit where that can be, with any number of ranks, from files that may be broken."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import MPIS, ROOT, Mpi, Once, finish, kill, rank_process
from test_cli import start_long_run

from gala_mpi.config import ConfigError
from gala_mpi.status.command import status_of
from gala_mpi.storage import lease, run_folder
from gala_mpi.storage.checkpoint import Checkpoint, CheckpointFolder, encode, ranks_with_checkpoints, read
from gala_mpi.storage.resume import _Found, _shares
from gala_mpi.storage.run_folder import _reopen, saved_config

sys.path.insert(0, str(ROOT / "analysis"))
from learning_curves import curve, seams
from runs import read_run

TRAIN = ("-m", "gala_mpi", "train")
# Every update is 64 steps a rank: T = 8, N = 8.
CARTPOLE = (*TRAIN, "--preset", "cartpole", "--learning-rate-decay", "none", "--record-every", "1")


@pytest.fixture
def run(once: Once, tmp_path: Path) -> Path:
    """A copy of a finished run of 2 ranks with several checkpoints each."""

    def make(folder: Path) -> None:
        args = (*CARTPOLE, "--total-steps", "6_400", "--checkpoint-every-s", "0.02", "--out", str(folder / "run"))
        assert next(iter(MPIS.values())).run(2, *args).returncode == 0

    return Path(shutil.copytree(once("finished", make) / "run", tmp_path / "run"))


def newest(run: Path, rank: int) -> Checkpoint:
    return read(CheckpointFolder(run, rank).newest_first()[0], 10**8)


def assert_same_policies(first: Path, second: Path, size: int) -> None:
    for rank in range(size):
        one, other = newest(first, rank), newest(second, rank)
        assert one.facts.update == other.facts.update and one.facts.agent_steps == other.facts.agent_steps
        assert one.tensors.keys() == other.tensors.keys()
        for name, values in one.tensors.items():
            np.testing.assert_array_equal(values, other.tensors[name], err_msg=f"rank {rank}: {name}")


def resume(mpi: Mpi, run: Path, size: int, *args: str, timeout_s: float = 120) -> str:
    """Go on to the end; the output."""
    done = mpi.run(size, *TRAIN, "--resume", str(run), *args, timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# The last rank asks for the end after an update of a given number.
STOPS = """
import sys
from gala_mpi import cli
from gala_mpi.train import agent
number, train = int(sys.argv.pop(1)), agent.Agent.train
def stopping(self, stop):
    last = self._comm.rank == self._comm.size - 1
    return train(self, stop, lambda update: stop("the test") if last and update == number else None)
agent.Agent.train = stopping
sys.exit(cli.train(sys.argv[1:]))
"""


def assert_same_parameters(one: Checkpoint, other: Checkpoint) -> None:
    """The parameters and the optimiser's state, to the bit."""
    for name, values in one.tensors.items():
        if name.startswith(("parameters.", "optimiser.")):
            np.testing.assert_array_equal(values, other.tensors[name], err_msg=name)


def assert_goes_on_to_the_bit(
    mpi: Mpi, size: int, args: tuple[str, ...], stop: int, stopped: int, end: int, folder: Path
) -> None:
    """A run of `end` updates is what one is that was asked to stop at `stop`, did after `stopped`, and was resumed."""
    assert mpi.run(size, *TRAIN, *args, "--out", str(folder / "whole")).returncode == 0
    done = mpi.run(size, "-c", STOPS, str(stop), *args, "--out", str(folder / "parts"))
    assert done.returncode == 75 and newest(folder / "parts", 0).facts.update == stopped, done.stderr
    resume(mpi, folder / "parts", size)
    assert newest(folder / "whole", 0).facts.update == end
    assert_same_policies(folder / "whole", folder / "parts", size)


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1"])
def test_one_rank_goes_on_to_the_bit(one_mpi: Mpi, env: str, tmp_path: Path) -> None:
    """With a learning rate that rises and falls over the seam too."""
    args = (*CARTPOLE[3:], "--env", env, "--seed", "3", "--total-steps", "12_800", "--learning-rate-decay", "linear")
    # As many steps an update as before, of so many simulators that the rate is scaled.
    args += ("--simulators", "32", "--rollout-steps", "2", "--learning-rate-scaling", "sqrt")
    args += ("--learning-rate-warmup", "120")
    assert_goes_on_to_the_bit(one_mpi, 1, args, 77, 77, 200, tmp_path)
    whole, parts = read_run(tmp_path / "whole"), read_run(tmp_path / "parts")
    for name in ("updates", "episodes"):
        one, other = whole.table(name), parts.table(name)
        same = [c for c in one.columns if not c.endswith("_s") and c != "segment"]
        assert one[same].equals(other[same]), name


@pytest.mark.check
def test_all_reduce_goes_on_to_the_bit(mpi: Mpi, tmp_path: Path) -> None:
    """Stopped in the warm-up of a learning rate that falls as well."""
    args = (*CARTPOLE[3:], "--exchange", "allreduce", "--total-steps", "25_600", "--learning-rate-decay", "linear")
    args += ("--simulators", "16", "--learning-rate-scaling", "sqrt", "--learning-rate-warmup", "80")
    # All end together, an update after one of them asked for it.
    assert_goes_on_to_the_bit(mpi, 2, args, 40, 41, 100, tmp_path)


def test_a_signal_and_a_resume_lose_nothing(mpi: Mpi, tmp_path: Path) -> None:
    """Steps, updates, sums and times go on where they ended, on every rank."""
    run = tmp_path / "run"
    process = start_long_run(mpi, run, 3, "--record-every", "1")
    os.kill(rank_process(process.pid, 1), signal.SIGUSR1)
    done = finish(process, 60)
    assert done.returncode == 75, done.stderr
    assert f"go on with --resume {run}" in done.stdout
    before = [newest(run, rank).facts for rank in range(3)]
    total = sum(facts.agent_steps for facts in before)
    assert f"{total:,} steps in" in done.stdout
    said = resume(mpi, run, 3, "--total-steps", str(total + 3 * 64 * 50))
    assert "changed: --total-steps from 1000000000 to" in said
    table = read_run(run).table("updates")
    for rank, facts in enumerate(before):
        rows = table[table["rank"] == rank]
        # The last update before the seam, and the first one after it, follow each other.
        assert rows["update"].tolist() == list(range(1, len(rows) + 1))
        assert rows["agent_steps"].tolist() == [64 * update for update in rows["update"]]
        assert facts.update in rows["update"].tolist() and len(rows) > facts.update
        sums = [c for c in rows.columns if c.startswith("messages_") or (c.endswith("_s") and c != "message_age_s")]
        assert len(sums) > 8
        for column in (*sums, "divergences"):
            assert (np.diff(rows[column]) >= 0).all(), column
        after = rows[rows["segment"] == 1]
        with h5py.File(run / "segment-1" / f"rank-{rank:05d}.h5", "r") as file:
            resumed = json.loads(file.attrs["resumed"])
            assert file.attrs["segment"] == 1 and file.attrs["run_id"] == facts.run_id
        assert resumed["updates"] == [f.update for f in before] and resumed["agent_steps"] == facts.agent_steps
        # No time passes between the end of one segment and the beginning of the next.
        assert 0 <= after["time_s"].iloc[0] - facts.time_s < 2


def test_another_number_of_ranks_goes_on(mpi: Mpi, run: Path) -> None:
    totals = []
    for size, before in ((4, 2), (3, 4), (1, 3)):
        old = [newest(run, rank) for rank in range(before)]
        total = sum(checkpoint.facts.agent_steps for checkpoint in old)
        # No budget is left: what is written is what was taken over.
        said = resume(mpi, run, size, "--total-steps", "100")
        assert f"changed: ranks from {before} to {size}" in said
        steps = 0
        for rank in range(size):
            found, source = newest(run, rank), old[rank % before]
            assert found.facts.size == size and found.facts.update == source.facts.update
            steps += found.facts.agent_steps
            assert_same_parameters(source, found)
            for name, values in source.tensors.items():
                if rank >= before and name.endswith("stream"):
                    # Another rank's streams are not drawn twice.
                    assert not np.array_equal(found.tensors[name], values), name
        assert total - size < steps <= total
        totals += [total]
    # Each rank takes its share, so that none finds the budget spent.
    said = resume(mpi, run, 3, "--total-steps", "25_600", "--budget", "per-rank")
    assert re.search(r"2[56],\d\d\d steps, \d+,?\d* of them in", said)
    found = read_run(run)
    data, marks = curve(found, 10), seams(found)
    assert (np.diff(data["agent_steps"]) >= 0).all()
    assert (np.diff(marks["time_s"]) >= 0).all() and len(marks) == 4
    np.testing.assert_allclose(marks["agent_steps"], [*totals, steps], atol=4)
    # The curve ends with the last episode: within 500 steps of each of the 24 simulators one ends.
    assert marks["agent_steps"].iloc[-1] < data["agent_steps"].iloc[-1]
    updates, episodes = (table[table["segment"] == 4] for table in (found.table("updates"), found.table("episodes")))
    final = updates.groupby("rank")["agent_steps"].max().sum()
    assert 25_000 < final < 27_000 and final - 24 * 520 < data["agent_steps"].iloc[-1] <= final
    # No row is missing of those ranks whose count began with the segment.
    for rank in (1, 2):
        assert (episodes["rank"] == rank).sum() == newest(run, rank).facts.episodes > 0


@pytest.mark.slow
def test_a_policy_is_as_sure_after_the_seam_as_before(one_mpi: Mpi, tmp_path: Path) -> None:
    """Stopped while it climbs, and changed in nothing: what the policy or the optimiser lost would show at once."""
    run = tmp_path / "run"
    # A quarter of the budget.
    done = one_mpi.run(4, "-c", STOPS, "490", "--preset", "cartpole", "--out", str(run), timeout_s=240)
    assert done.returncode == 75, done.stderr
    said = resume(one_mpi, run, 4, timeout_s=240)
    assert "changed:" not in said
    found = read_run(run)
    # Not by returns: the simulators of a policy that stumbles fall together, and a run that was not stopped dips like
    # that too. But a policy that is lost is one of two like actions, and a lost optimiser soon makes it so.
    doubt = found.table("updates").set_index("rank")
    begun, gone_on = (doubt[doubt["segment"] == segment]["entropy"].groupby("rank") for segment in (0, 1))
    before, after = begun.tail(5).mean(), gone_on.head(5).mean()
    assert before < 0.9 * math.log(2)
    assert after - before < (math.log(2) - before) / 2
    episodes = found.table("episodes").sort_values("time_s")
    assert episodes["episode_return"].iloc[-100:].mean() >= 475


# Each rank writes down every update when it is done, at once.
NOTES = """
import os, sys
from gala_mpi import cli
from gala_mpi.train import agent
folder, train = sys.argv.pop(1), agent.Agent.train
def noting(self, stop):
    notes = os.open(f"{folder}/{self._comm.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return train(self, stop, lambda update: os.write(notes, f"{update} {self._now_s()}\\n".encode()))
agent.Agent.train = noting
sys.exit(cli.train(sys.argv[1:]))
"""


def test_killed_ranks_lose_no_more_than_an_interval(mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = (
        "--preset",
        "cartpole",
        "--total-steps",
        "1_000_000_000",
        "--learning-rate-decay",
        "none",
        "--out",
        str(run),
    )
    cadence = ("--checkpoint-every-s", "0.5", "--flush-every-s", "0.5", "--record-every", "1")
    process = mpi.start(3, "-c", NOTES, str(tmp_path), *args, *cadence)
    deadline = time.monotonic() + 240
    while len(list(run.glob("rank-*.h5"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(5)
    kill(process)
    process.communicate(timeout=120)
    facts = [newest(run, rank).facts for rank in range(3)]
    lost = {}
    for rank, mine in enumerate(facts):
        with h5py.File(run / f"rank-{rank:05d}.h5", "r", swmr=True, locking=False) as file:
            rows = file["updates"][:]
        done = [line.split() for line in (tmp_path / str(rank)).read_text().splitlines()]
        last, last_s = int(done[-1][0]), float(done[-1][1])
        lost[rank] = int((rows["update"] > mine.update).sum())
        # Rows are flushed every half second, checkpoints written as often; an update, and the writing, come on top.
        assert mine.update > 0 and rows["update"][-1] <= last + 1
        assert last_s - rows["time_s"][-1] < 1.0 and last_s - mine.time_s < 1.0, (
            last_s,
            rows["time_s"][-1],
            mine.time_s,
        )
    resume(mpi, run, 3, "--total-steps", str(sum(f.agent_steps for f in facts) + 3 * 64 * 20))
    table = read_run(run).table("updates")
    for rank, mine in enumerate(facts):
        rows = table[table["rank"] == rank]
        # What was lost is not counted twice.
        assert rows["update"].tolist() == list(range(1, len(rows) + 1)), lost
        assert rows[rows["update"] <= mine.update]["segment"].max() == 0
    data = curve(read_run(run), 10)
    assert (np.diff(data["agent_steps"]) >= 0).all()


@pytest.mark.parametrize(
    ("one", "other"), [("cut off", "a byte changed"), ("another run's", "a link"), ("of another rank", "no floats")]
)
def test_a_broken_checkpoint_is_named_and_the_one_before_taken(
    one_mpi: Mpi, one: str, other: str, run: Path, tmp_path: Path
) -> None:
    """On both ranks, of each in another way."""
    expected = [_break_newest(run, 0, one, tmp_path), _break_newest(run, 1, other, tmp_path)]
    said = resume(one_mpi, run, 2, "--total-steps", "100")
    for rank, (broken, before, update) in enumerate(expected):
        assert re.search(rf"WARNING: .*rank-{rank:05d}.*{broken}: cannot be used: \S", said)
        assert f"rank {rank} goes on from {before}, of update {update}, instead" in said
        assert newest(run, rank).facts.update == update


def _break_newest(run: Path, rank: int, how: str, tmp_path: Path) -> tuple[str, str, int]:
    """Break a rank's newest checkpoint; its name, that of the one before, and the update of that one."""
    folder = CheckpointFolder(run, rank)
    last, before = folder.newest_first()[:2]
    # It may be of the same update as the last one.
    (folder.path / "best.safetensors").unlink(missing_ok=True)
    content = last.read_bytes()
    if how == "cut off":
        last.write_bytes(content[: len(content) // 2])
    elif how == "a byte changed":
        last.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == "another run's":
        checkpoint = read(last, 10**8)
        last.write_bytes(encode(checkpoint.tensors, dataclasses.replace(checkpoint.facts, run_id="0" * 32)))
    elif how == "of another rank":
        shutil.copy(CheckpointFolder(run, 1 - rank).newest_first()[0], last)
    elif how == "no floats":
        _with_nan(last)
    else:
        (tmp_path / "elsewhere").write_bytes(content)
        last.unlink()
        last.symlink_to(tmp_path / "elsewhere")
    return last.name, before.name, read(before, 10**8).facts.update


def test_a_best_one_that_is_newer_than_what_is_left_is_taken(one_mpi: Mpi, run: Path) -> None:
    folder = CheckpointFolder(run, 1)
    last, before = folder.newest_first()[:2]
    shutil.copy(last, folder.path / "best.safetensors")
    expected = read(last, 10**8).facts.update
    last.write_bytes(b"damaged")
    said = resume(one_mpi, run, 2, "--total-steps", "100")
    assert f"rank 1 goes on from best.safetensors, of update {expected}, instead" in said
    assert newest(run, 1).facts.update == expected > read(before, 10**8).facts.update


def test_a_run_that_still_goes_on_is_refused(one_mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_long_run(one_mpi, run, 2)
    done = one_mpi.run(2, *TRAIN, "--resume", str(run))
    assert done.returncode == 6 and "expected a run that has ended; lease.json is still" in done.stderr, done.stderr
    assert not (run / "config.1.toml").exists()
    assert status_of(run).state == "goes on" and status_of(run).code == 6
    os.kill(process.pid, signal.SIGUSR1)
    assert finish(process, 60).returncode == 75
    assert status_of(run).state == "stopped by a signal" and status_of(run).code == 75
    resume(one_mpi, run, 2, "--total-steps", "100")


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_of_two_starts_at_once_one_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other may have its lease, or its configuration, only."""
    before = saved_config(run)
    assert before is not None
    config = dataclasses.replace(before, run=dataclasses.replace(before.run, resume=run))
    run_id = run_folder.run_id_of(run)
    monkeypatch.setattr(lease, "WAIT_S", 0.5)
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    waits: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: waits.append(seconds) or sleep(seconds))
    scratch = [f"{name}.tmp" for name in ("config.1.toml.0123456789ab", "lease.json.0123456789ab", "rank-00000.h5")]
    for name in (*scratch, "mine.tmp", "config.toml.mine.tmp"):
        (run / name).write_text("not whole")
    # It has ended in order: nobody waits.
    assert _reopen(config).segment == 1 and not waits
    assert sorted(path.name for path in run.glob("*.tmp")) == ["config.toml.mine.tmp", "mine.tmp"]
    holder = lease.Lease(run, run_id, 1)
    holder.hold()
    with pytest.raises(ConfigError, match=r"expected a run that has ended; lease.json is still being touched"):
        _reopen(config)
    assert status_of(run).code == 6 and waits.pop() == 0.5
    holder.end(lease.End(ended=True, code=75))
    (run / "segment-1").mkdir()
    (run / "segment-1" / "rank-00003.h5.tmp").write_text("not whole")
    assert waits == [0.5] and _reopen(config).segment == 2 and waits == [0.5]
    assert not list((run / "segment-1").iterdir())
    # Killed, or just so slow that it is not there yet: the one is seen, the other not.
    assert _reopen(config).segment == 3 and waits == [0.5, 0.5]
    (run / "config.4.toml").write_text("")
    monkeypatch.setattr(lease.time, "sleep", lambda _: lease.write_lease(run, run_id, 4))
    with pytest.raises(ConfigError, match="still being touched"):
        _reopen(config)
    lease.write_lease(run, run_id, 4, lease.End(ended=True, code=0))
    # What could not be begun leaves nothing.
    with monkeypatch.context() as full, pytest.raises(ConfigError, match="No space left"):
        full.setattr(run_folder, "write_lease", no_room)
        _reopen(config)
    assert not (run / "config.5.toml").exists()
    # Both have found the same number free.
    monkeypatch.setattr(run_folder, "check_free", lambda *_: (run / "config.5.toml").write_text(""))
    with pytest.raises(ConfigError, match="expected a run that nobody else goes on with just now"):
        _reopen(config)
    assert (run / "config.5.toml").read_text() == ""


def test_who_was_taken_for_dead_ends(one_mpi: Mpi, tmp_path: Path) -> None:
    """A job that was suspended, for so long that another went on with its run, leaves it to that one."""
    run = tmp_path / "run"
    process = start_long_run(one_mpi, run, 2)
    pids = [rank_process(process.pid, rank) for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    resume(one_mpi, run, 1, "--total-steps", "100")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    done = finish(process, 60)
    assert done.returncode == 75 and "stopped (another start has the run's folder)" in done.stdout, done.stderr
    held = json.loads((run / "lease.json").read_text())
    expected = {"run_id": run_folder.run_id_of(run), "segment": 1, "ended": True, "code": 0}
    assert held.pop("steps") > 0 and held == expected


@pytest.mark.parametrize("with_lease", [False, True])
def test_a_start_that_was_killed_at_once_can_be_gone_on_with(
    one_mpi: Mpi, with_lease: bool, run: Path, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    started.mkdir()
    shutil.copy(run / "run.json", started / "run.json")
    if with_lease:
        lease.write_lease(started, run_folder.run_id_of(started), 0)
    done = one_mpi.run(1, *TRAIN, "--resume", str(started), "--env", "Pendulum-v1")
    assert done.returncode == 2, done.stderr
    done = one_mpi.run(1, *CARTPOLE, "--total-steps", "1280", "--out", str(started))
    assert done.returncode == 2 and "(--resume goes on with one)" in done.stderr
    done = one_mpi.run(1, *CARTPOLE, "--total-steps", "1280", "--resume", str(started))
    assert done.returncode == 0 and "the run begins anew" in done.stderr, done.stderr
    assert read_run(started).table("updates")["update"].max() == 20


def test_a_time_limit_is_of_one_start_and_what_is_left_is_told(one_mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = one_mpi.run(1, *CARTPOLE, "--total-steps", "100_000", "--time-limit-s", "0.1", "--out", str(run))
    assert done.returncode == 0 and f"; go on with --resume {run}" in done.stdout
    said = resume(one_mpi, run, 1, "--total-steps", "10_000")
    assert "time-limit" not in said and re.search(r"finished: 10,\d\d\d steps, ", said) and "go on with" not in said
    assert "all 10,000 steps were taken before: --total-steps" in resume(one_mpi, run, 1)


def _with_nan(path: Path) -> None:
    """Rewrite a checkpoint with a parameter that is not finite."""
    checkpoint = read(path, 10**8)
    tensors = {name: values.copy() for name, values in checkpoint.tensors.items()}
    next(values for name, values in tensors.items() if name.startswith("parameters.")).flat[0] = np.nan
    path.write_bytes(encode(tensors, checkpoint.facts))


def test_a_run_of_which_no_checkpoint_can_be_used_is_refused_and_stays_as_it_is(mpi: Mpi, run: Path) -> None:
    for rank in ranks_with_checkpoints(run):
        for path in CheckpointFolder(run, rank).path.iterdir():
            path.write_bytes(b"not any more")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = mpi.run(2, *TRAIN, "--resume", str(run))
    assert done.returncode == 2
    assert re.search(r"expected a run with a checkpoint that can be used, but none of its \d can", done.stderr)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_rank_that_left_none_takes_another_ranks(one_mpi: Mpi, run: Path) -> None:
    rows = len(read_run(run).table("updates"))
    taken = sum(newest(run, rank).facts.agent_steps for rank in range(2))
    shutil.rmtree(CheckpointFolder(run, 1).path)
    said = resume(one_mpi, run, 2, "--total-steps", "12_800")
    assert "rank 1 left no checkpoint: rank 1 goes on from that of rank 0" in said
    # Its steps are counted all the same, and its rows stay, whatever it goes on from later.
    kept = len(read_run(run).table("updates"))
    assert kept >= rows + (12_800 - taken) // 64
    resume(one_mpi, run, 2, "--total-steps", "12_900")
    assert len(read_run(run).table("updates")) >= kept


def test_lost_training_does_not_count() -> None:
    """Of ranks that were killed: their newest checkpoints are behind what others knew of them."""
    found = {rank: _Found(Path("it"), 0, 2, 10 * steps, steps, 2000, 1.0) for rank, steps in ((0, 1000), (1, 400))}
    for size, shares in ((2, [1000, 400]), (1, [1400]), (4, [350] * 4)):
        assert _shares(found, 2000, 2, size, False) == shares
    assert _shares(found, 2000, 2, 2, True) == [700, 700]
    # Of rank 1 nothing is left but what rank 0 knew.
    del found[1]
    assert _shares(found, 2000, 2, 2, False) == [1000, 1000]


def test_a_segment_is_numbered_after_checkpoints_too(run: Path) -> None:
    """Somebody has put away the metrics of all but the first start: newer checkpoints must have newer names."""
    folder = CheckpointFolder(run, 0)
    last = folder.newest_first()[0]
    shutil.copy(last, folder.path / "segment-5-update-000000000001.safetensors")
    assert run_folder.segments(run) == [0, 5]
    (run / "segment-999999999").mkdir()
    config = saved_config(run)
    assert config is not None
    with pytest.raises(ConfigError, match=r"--resume: .* a run whose files have segments below 999999999"):
        _reopen(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=run)))


def test_a_run_whose_folder_another_has_now_ends_and_leaves_it_alone(one_mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_long_run(one_mpi, run, 2)
    run.rename(tmp_path / "away")
    done = one_mpi.run(1, *CARTPOLE, "--total-steps", "1280", "--out", str(run))
    assert done.returncode == 0, done.stderr
    # The one asks for room beside its metrics until it has noticed.
    before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix != ".tmp" and path.is_file()}
    ended = finish(process, 60)
    assert ended.returncode == 5 and "stopped (" in ended.stdout, ended.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_environment_of_a_module_is_imported_if_the_command_line_says_so(one_mpi: Mpi, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Mine-v0', 'gymnasium.envs.classic_control.cartpole:CartPoleEnv', max_episode_steps=9)\n"
    )
    args = ("--env", "mine:Mine-v0", "--total-steps", "1280")
    done = one_mpi.run(2, *CARTPOLE, *args, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = one_mpi.run(2, *TRAIN, "--resume", "run", "--total-steps", "2560", cwd=tmp_path)
    assert done.returncode == 2 and "or --env mine:Mine-v0 beside it to allow it" in done.stderr
    done = one_mpi.run(2, *TRAIN, "--resume", "run", "--env", "mine:Mine-v0", "--total-steps", "2560", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = one_mpi.run(1, *TRAIN, "--env", "nowhere:Mine-v0", cwd=tmp_path)
    assert done.returncode == 2 and "No module named 'nowhere'" in done.stderr and len(done.stderr.splitlines()) == 1
    done = one_mpi.run(1, *TRAIN, "--env", ":Mine-v0", cwd=tmp_path)
    assert done.returncode == 2 and "expected the name of a module before the colon" in done.stderr
    (tmp_path / "broken.py").write_text("int('a mistake of mine')\n")
    done = one_mpi.run(1, *TRAIN, "--env", "broken:Mine-v0", cwd=tmp_path)
    assert done.returncode == 1 and "ValueError: invalid literal" in done.stderr and "broken.py" in done.stderr


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(one_mpi: Mpi, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    lease.write_lease(run, run_folder.run_id_of(run), 0)
    said = resume(one_mpi, run, 2)
    assert "holds no checkpoint: the run begins anew" in said
    table = read_run(run).table("updates")
    # All before it is void.
    assert (table["segment"] == 1).all() and table["agent_steps"].max() < 6_400


def test_a_run_that_ended_in_order_and_lost_its_checkpoints_is_refused(mpi: Mpi, run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for _ in range(2):
        done = mpi.run(2, *TRAIN, "--resume", str(run))
        assert done.returncode == 2 and "expected a run whose checkpoints are still there" in done.stderr, done.stderr
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_could_write_no_checkpoint_is_gone_on_with(one_mpi: Mpi, tmp_path: Path) -> None:
    """As where a disk is full: it has not ended in order."""
    run = tmp_path / "run"
    program = (
        "import errno, sys\n"
        "from gala_mpi import cli; from gala_mpi.storage import checkpoint\n"
        "def full(*args, **more): raise OSError(errno.ENOSPC, 'full')\n"
        "checkpoint.CheckpointFolder.save = full\n"
        "sys.exit(cli.train(sys.argv[1:]))\n"
    )
    done = one_mpi.run(2, "-c", program, *CARTPOLE[3:], "--total-steps", "1280", "--out", str(run))
    assert done.returncode == 5, done.stderr
    assert "holds no checkpoint: the run begins anew" in resume(one_mpi, run, 2)


def test_what_has_changed_is_told_and_what_must_not_is_refused(one_mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    one_mpi.run(1, *CARTPOLE, "--total-steps", "640", "--out", str(run))
    said = resume(one_mpi, run, 1, "--total-steps", "1280", "--gamma", "0.9", "--exchange", "none")
    assert "changed: --gamma from 0.98 to 0.9: ranks learn with it from here on" in said
    assert "changed: --exchange from gossip to none: " in said
    # From now on they are the run's.
    assert "changed: --gamma" not in resume(one_mpi, run, 1)
    for args in (
        ("--env", "Acrobot-v1"),
        ("--hidden", "8"),
        ("--seed", "9"),
        ("--sketch-dimension", "64"),
        ("--out", str(tmp_path / "elsewhere")),
        ("--preset", "gala-atari"),
    ):
        done = one_mpi.run(1, *TRAIN, "--resume", str(run), *args)
        named = args[0] if args[0] != "--preset" else "--env"
        assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "elsewhere").exists()
    assert sorted(path.name for path in run.glob("config*.toml")) == ["config.1.toml", "config.2.toml", "config.toml"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_folder_that_holds_no_run_is_refused(one_mpi: Mpi, size: int, tmp_path: Path) -> None:
    for name, text in (("absent", None), ("empty", ""), ("half", '{"run_id": "../../etc"}'), ("list", "[" * 50_000)):
        folder = tmp_path / name
        if text is not None:
            folder.mkdir()
        if text:
            (folder / "config.toml").write_text('[environment]\nenv = "CartPole-v1"\n')
            (folder / "run.json").write_text(text)
        done = one_mpi.run(size, *TRAIN, "--resume", str(folder))
        assert done.returncode == 2 and "--resume" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert "the folder of a run" in done.stderr


@pytest.mark.parametrize("trick", ["an import", "a pipe", "a link", "not toml", "checkpoints elsewhere"])
def test_a_strangers_folder_runs_no_code_and_writes_nowhere_else(
    one_mpi: Mpi, trick: str, run: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if trick == "an import":
        (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
        text = (run / "config.toml").read_text().replace("CartPole-v1", "evil:CartPole-v1")
        (run / "config.toml").write_text(text)
    elif trick == "a pipe":
        (run / "config.toml").unlink()
        os.mkfifo(run / "config.toml")
    elif trick == "a link":
        (run / "config.toml").unlink()
        (run / "config.toml").symlink_to("/dev/zero")
    elif trick == "not toml":
        (run / "config.toml").write_text("a = " + "[" * 100_000)
    else:
        shutil.move(run / "checkpoints", elsewhere / "checkpoints")
        (run / "checkpoints").symlink_to(elsewhere / "checkpoints")
    before = {path for path in tmp_path.rglob("*")}
    done = one_mpi.run(1, *TRAIN, "--resume", str(run), "--total-steps", "1280", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert trick != "an import" or "--env evil:CartPole-v1 beside it" in done.stderr
    assert {path for path in tmp_path.rglob("*")} == before


def test_an_edge_list_is_found_from_elsewhere(one_mpi: Mpi, tmp_path: Path) -> None:
    (tmp_path / "edges.txt").write_text("0 1 0.25\n1 0 0.25\n")
    args = (*CARTPOLE, "--total-steps", "1280", "--topology", "edges.txt", "--out", "run")
    assert one_mpi.run(2, *args, cwd=tmp_path).returncode == 0
    assert "changed: --topology" not in resume(one_mpi, tmp_path / "run", 2, "--topology", str(tmp_path / "edges.txt"))
    resume(one_mpi, tmp_path / "run", 2, "--total-steps", "1920")


def test_a_resize_that_is_killed_between_two_ranks_first_checkpoints_loses_no_steps(one_mpi: Mpi, run: Path) -> None:
    total = sum(newest(run, rank).facts.agent_steps for rank in range(2))
    resume(one_mpi, run, 4, "--total-steps", "100")
    # As if ranks 1 and 3 had been killed before they had written: rank 1 still has that of the first segment.
    for rank in (1, 3):
        for path in CheckpointFolder(run, rank).newest_first():
            if path.name.startswith("segment-1-"):
                path.unlink()
    said = resume(one_mpi, run, 4, "--total-steps", "101")
    assert "rank 3 left no checkpoint: rank 3 goes on from that of rank" in said
    assert total - 4 < sum(newest(run, rank).facts.agent_steps for rank in range(4)) <= total
    resume(one_mpi, run, 4, "--total-steps", "102", "--exchange", "allreduce")
    steps = {newest(run, rank).facts.agent_steps for rank in range(4)}
    assert len(steps) == 1 and total - 8 < 4 * steps.pop() <= total


def test_a_configuration_that_could_not_be_written_leaves_the_run_as_it_is(one_mpi: Mpi, tmp_path: Path) -> None:
    """The lease of the run cannot be read, then can."""
    run = tmp_path / "run"
    one_mpi.run(1, *CARTPOLE, "--total-steps", "640", "--gamma", "0.9", "--out", str(run))
    lease_file = run / "lease.json"
    lease_file.rename(tmp_path / "lease.json")
    lease_file.mkdir()
    done = one_mpi.run(1, *TRAIN, "--resume", str(run))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (run / "config.1.toml").exists()
    lease_file.rmdir()
    (tmp_path / "lease.json").rename(lease_file)
    assert "changed: --gamma from 0.9 to 0.8" in resume(one_mpi, run, 1, "--gamma", "0.8")
