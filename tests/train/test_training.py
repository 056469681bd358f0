"""Whole runs under mpirun: every rank ends, files tell what happened, and the policy learns."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Mpi, Once
from several import train_all

COMMAND = ("-m", "gala_mpi", "train", "--preset", "cartpole", "--flush-every-s", "0.5", "--record-every", "1")


def rows(folder: Path, rank: int, table: str) -> np.ndarray:
    with h5py.File(folder / f"rank-{rank:05d}.h5", "r", swmr=True, locking=False) as file:
        return file[table][:]


def attribute(folder: Path, rank: int, name: str) -> object:
    with h5py.File(folder / f"rank-{rank:05d}.h5", "r", swmr=True, locking=False) as file:
        return file.attrs[name]


# Short runs by the number of their ranks; those of one number share a launch.
SHORT = {
    2: {
        "independent": ("--exchange", "none", "--total-steps", "20_000"),
        "bfloat16": ("--wire", "bfloat16", "--total-steps", "30_000"),
        "float16": ("--wire", "float16", "--total-steps", "30_000"),
    },
    3: {
        "allreduce": ("--exchange", "allreduce", "--total-steps", "20_000", "--sketch-every-s", "0.05"),
        "zero staleness": ("--max-staleness", "0", "--total-steps", "20_000"),
    },
    4: {
        "complete": ("--topology", "complete", "--total-steps", "30_000"),
        "hypercube": ("--topology", "hypercube", "--total-steps", "30_000"),
    },
}


def short_runs(once: Once, mpi: Mpi, size: int) -> Path:
    """The folder of the short runs of so many ranks."""
    runs = {name: (*COMMAND[3:], *args) for name, args in SHORT[size].items()}
    return once(f"short-{mpi.name}-{size}", lambda folder: train_all(mpi, size, runs, folder))


def gossip_run(once: Once, mpi: Mpi, size: int) -> Path:
    """The folder of a run of gossip over a ring, `run`, and of what it said, `output`."""

    def make(folder: Path) -> None:
        args = ("--total-steps", "24_000", "--sketch-every-s", "0.2", "--seed", "9", "--out", str(folder / "run"))
        done = mpi.run(size, *COMMAND, *args)
        assert done.returncode == 0, done.stderr
        (folder / "output").write_text(done.stdout)

    return once(f"gossip-{mpi.name}-{size}", make)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gossip_runs_to_the_end_of_the_shared_budget(mpi: Mpi, size: int, once: Once) -> None:
    folder = gossip_run(once, mpi, size)
    run, output = folder / "run", (folder / "output").read_text()
    assert len(list(run.glob("rank-*.h5"))) == size
    updates = [rows(run, rank, "updates") for rank in range(size)]
    steps = sum(int(table["agent_steps"][-1]) for table in updates)
    said = re.search(r"finished: ([\d,]+) steps", output)
    assert said is not None and int(said.group(1).replace(",", "")) == steps >= 24_000
    for rank, table in enumerate(updates):
        np.testing.assert_array_equal(table["update"], np.arange(1, len(table) + 1))
        assert np.isfinite([table[name] for name in ("policy_loss", "value_loss", "entropy", "grad_norm")]).all()
        assert (np.diff(table["time_s"]) >= 0).all()
        # Each update posts to one out-neighbour, and what a rank mixes its in-neighbour has sent.
        assert table["messages_sent"][-1] == (len(table) if size > 1 else 0)
        mixed = int(table["messages_mixed"][-1])
        assert mixed <= int(updates[(rank - 1) % size]["messages_sent"][-1]) + 1
        assert (mixed > 0) == (size > 1)
        assert len(rows(run, rank, "sketches")) > 0 and len(rows(run, rank, "episodes")) > 0
        neighbours = rows(run, rank, "neighbours")
        assert set(neighbours["rank"]) == ({(rank - 1) % size} if size > 1 else set())
        assert not neighbours["lost"].any()


def test_all_ranks_share_the_runs_attributes(one_mpi: Mpi, once: Once) -> None:
    run = gossip_run(once, one_mpi, 3) / "run"
    for name in ("run_id", "t0", "started", "config", "size", "env_id", "mpi_library"):
        values = {str(attribute(run, rank, name)) for rank in range(3)}
        assert len(values) == 1, name
    assert [attribute(run, rank, "rank") for rank in range(3)] == [0, 1, 2]
    config = json.loads(str(attribute(run, 0, "config")))
    assert (config["run"]["seed"], config["environment"]["env"]) == (9, "CartPole-v1")
    assert {"gala-mpi", "torch", "mpi4py", "h5py"} <= set(json.loads(str(attribute(run, 0, "versions"))))
    assert (run / "config.toml").exists()


@pytest.mark.check
def test_all_reduce_keeps_every_rank_on_the_same_parameters(mpi: Mpi, once: Once) -> None:
    run = short_runs(once, mpi, 3) / "allreduce"
    tables = [rows(run, rank, "updates") for rank in range(3)]
    assert len({len(table) for table in tables}) == 1
    np.testing.assert_array_equal(tables[0]["grad_norm"], tables[1]["grad_norm"])
    # Wherever two ranks drew a sketch after the same update, the parameters are the same to the bit.
    sketches = [{int(row["update"]): row["sketch"] for row in rows(run, rank, "sketches")} for rank in range(3)]
    shared = set(sketches[0]) & set(sketches[1])
    assert shared
    for update in shared:
        np.testing.assert_array_equal(sketches[0][update], sketches[1][update])


def test_independent_agents_send_nothing_and_drift_apart(one_mpi: Mpi, once: Once) -> None:
    run = short_runs(once, one_mpi, 2) / "independent"
    tables = [rows(run, rank, "updates") for rank in range(2)]
    assert all(table["messages_sent"][-1] == 0 for table in tables)
    assert tables[0]["grad_norm"][0] != tables[1]["grad_norm"][0]


@pytest.mark.parametrize("topology", ["complete", "hypercube"])
def test_other_topologies_mix_all_in_neighbours(one_mpi: Mpi, topology: str, once: Once) -> None:
    run = short_runs(once, one_mpi, 4) / topology
    degree = {"complete": 3, "hypercube": 2}[topology]
    for rank in range(4):
        neighbours = rows(run, rank, "neighbours")
        fresh = {int(source) for source in neighbours["rank"][neighbours["staleness"] == 0]}
        assert len(fresh) == len(set(neighbours["rank"])) == degree
        # At an update as many as have left a message, whoever has not.
        mixed = np.diff(rows(run, rank, "updates")["messages_mixed"])
        assert mixed.sum() > 0 and set(mixed) <= set(range(degree + 1))


def test_auto_chooses_a_topology_says_and_records_it_and_chooses_anew_for_another_number_of_ranks(
    one_mpi: Mpi, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    args = (*COMMAND, "--learning-rate-scaling", "effective", "--simulators", "4")
    done = one_mpi.run(9, *args, "--total-steps", "18_000", "--out", str(run), timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert "gossip over topology one-peer-exponential (auto)" in done.stdout and "a ring of" not in done.stderr
    assert json.loads(str(attribute(run, 0, "config")))["exchange"]["topology"] == "auto"
    for rank in range(9):
        assert attribute(run, rank, "topology") == "one-peer-exponential"
        assert set(rows(run, rank, "neighbours")["rank"]) == {(rank - step) % 9 for step in (1, 2, 4, 8)}
        assert rows(run, rank, "updates")["messages_mixed"][-1] > 0
    done = one_mpi.run(3, "-m", "gala_mpi", "train", "--resume", str(run), "--total-steps", "24_000", timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "gossip over topology ring (auto)" in done.stdout
    with h5py.File(run / "segment-1" / "rank-00000.h5", swmr=True) as file:
        assert file.attrs["topology"] == "ring"


# As if the warning began at 2 ranks.
SHORT_RING = """
import sys
from gala_mpi import cli
from gala_mpi.gossip import topology
topology.RING_WARNING_FROM = 2
cli.main()
"""


def test_a_long_ring_is_warned_of_once_at_the_start(one_mpi: Mpi, tmp_path: Path) -> None:
    args = (*COMMAND[2:], "--total-steps", "2000", "--out", str(tmp_path / "run"))
    done = one_mpi.run(2, "-c", SHORT_RING, *args, "--topology", "ring")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a ring of 2 ranks mixes slowly") == 1


RATES = """
from dataclasses import replace
from mpi4py import MPI
from gala_mpi.config import ExchangeConfig, LearnerConfig, TrainConfig
from gala_mpi.gossip.topology import make_topology
from gala_mpi.train.preparation import learning_rate, ranks_that_count

def rate(scaling, exchange, topology):
    learner, exchange = LearnerConfig(learning_rate=1.0, learning_rate_scaling=scaling), ExchangeConfig(exchange)
    config = replace(TrainConfig(), learner=learner, exchange=exchange)
    return learning_rate(config, ranks_that_count(config, MPI.COMM_WORLD, topology))

ring, complete = make_topology("ring", 1024), make_topology("complete", 1024)
found = [rate("none", "gossip", ring), rate("sqrt", "gossip", ring) ** 2, rate("sqrt", "none", None) ** 2]
found += [rate("effective", "gossip", graph) ** 2 for graph in (ring, complete)]
found += [rate("effective", exchange, None) ** 2 for exchange in ("allreduce", "none")]
if MPI.COMM_WORLD.rank == 1:
    print(" ".join(f"{rate:.2f}" for rate in found))
"""


def test_the_learning_rate_goes_by_all_ranks_or_by_those_that_a_rank_gains_from(one_mpi: Mpi) -> None:
    """With as many simulators on a rank as the rate is for; 1,024 ranks are only said to be there."""
    done = one_mpi.run(2, "-c", RATES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.00", "2.00", "2.00", "11.00", "1024.00", "2.00", "1.00"]


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_narrow_wires_keep_ranks_together(one_mpi: Mpi, wire: str, once: Once) -> None:
    """Closer than 4 as a rule: orthogonal layers of this network have a norm of about 16, and a loaded machine may keep
    one rank waiting while the other goes on. Never farther than both have gone, and what bfloat16 rounds: 16 / 512."""
    run = short_runs(once, one_mpi, 2) / wire
    updates = [rows(run, rank, "updates") for rank in range(2)]
    for table, other in (updates, updates[::-1]):
        assert table["messages_mixed"][-1] > 0 and table["messages_rejected"][-1] == 0
        distance = table["neighbour_distance"]
        assert np.nanquantile(distance, 0.9) < 4
        seen = np.searchsorted(other["time_s"], table["time_s"], side="right").clip(max=len(other) - 1)
        gone = np.cumsum(table["update_norm"]) + np.cumsum(other["update_norm"])[seen]
        mixed = ~np.isnan(distance)
        assert (distance[mixed] <= gone[mixed] + 16 / 512).all()


@pytest.mark.check
def test_zero_staleness_mixes_at_every_update(mpi: Mpi, once: Once) -> None:
    run = short_runs(once, mpi, 3) / "zero staleness"
    for rank in range(3):
        table = rows(run, rank, "updates")
        np.testing.assert_array_equal(table["staleness"], 0)
        np.testing.assert_array_equal(table["messages_mixed"], table["update"])


SLOW = """
import time
from mpi4py import MPI
from gala_mpi.learning import rollout
collect = rollout.Collector.collect
def slow(self):
    if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
        begin = time.perf_counter()
        rollout_made = collect(self)
        time.sleep(9 * (time.perf_counter() - begin))
        return rollout_made
    return collect(self)
rollout.Collector.collect = slow
"""
# Budget, exchange, and the bound of staleness.
SLOWED = [
    ("shared", "gossip", None),
    ("per-rank", "gossip", None),
    ("per-rank", "gossip", 4),
    ("shared", "none", None),
    ("per-rank", "none", None),
    ("shared", "allreduce", None),
]


def slowed_runs(once: Once, mpi: Mpi) -> Path:
    """The folder of a run of 3 ranks for each of SLOWED, by its place there, of which the last rank is slow."""
    runs = {}
    for number, (budget, exchange, staleness) in enumerate(SLOWED):
        args = ("--budget", budget, "--exchange", exchange, "--total-steps", "12_000")
        args += () if staleness is None else ("--max-staleness", str(staleness))
        runs[str(number)] = (*COMMAND[3:], *args)
    return once(f"slowed-{mpi.name}", lambda folder: train_all(mpi, 3, runs, folder, first=SLOW, timeout_s=280))


@pytest.mark.parametrize(("budget", "exchange", "staleness"), SLOWED)
def test_every_rank_ends_when_one_is_ten_times_slower(
    mpi: Mpi, budget: str, exchange: str, staleness: int | None, once: Once
) -> None:
    run = slowed_runs(once, mpi) / str(SLOWED.index((budget, exchange, staleness)))
    steps = [int(rows(run, rank, "updates")["agent_steps"][-1]) for rank in range(3)]
    assert sum(steps) >= 12_000
    if budget == "per-rank":
        rollout = 16 * 8
        assert all(4_000 <= taken < 4_000 + rollout for taken in steps)
    elif exchange != "allreduce":
        assert steps[2] < min(steps[:2]) / 2
    if staleness is not None:
        assert max(int(rows(run, rank, "updates")["staleness"].max()) for rank in range(3)) >= staleness


# Rank 1 is silent until rank 2 has long done without it. Rank 2 ends the run once it has mixed with rank 1 for a while.
SILENT = """
import sys, time
from collections import deque
from pathlib import Path
from gala_mpi import cli
from gala_mpi.learning import rollout
from gala_mpi.train import agent
from mpi4py import MPI
rank, missed = MPI.COMM_WORLD.rank, Path("missed")
collect, train, calls = rollout.Collector.collect, agent.Agent.train, []
def silent(self):
    calls.append(1)
    end = time.monotonic() + 300
    while rank == 1 and len(calls) == 40 and not missed.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return collect(self)
def watching(self, stop):
    [neighbour], counters = self._exchange.in_neighbours, self._exchange.counters
    without, mixed, last = [], deque(maxlen=21), deque(maxlen=20)
    def look(update):
        mixed.append(counters.messages_mixed)
        last.append(neighbour.lost)
        if neighbour.lost:
            without.append(counters.messages_mixed)
            if len(without) > 60 and without[-1] > without[0]:
                missed.touch()
        elif missed.exists() and len(mixed) == 21 and mixed[-1] - mixed[0] >= 15 and not any(last):
            stop("the test")
    return train(self, stop, look if rank == 2 else None)
rollout.Collector.collect, agent.Agent.train = silent, watching
sys.exit(cli.train(sys.argv[1:]))
"""


def test_a_silent_neighbour_is_lost_and_found_again(mpi: Mpi, tmp_path: Path) -> None:
    """Ranks wait for their neighbour at every update, but no longer than the time after which it counts as lost."""
    run = tmp_path / "run"
    args = ("--max-staleness", "0", "--neighbour-timeout-s", "1", "--time-limit-s", "300", "--out", str(run))
    done = mpi.run(3, "-c", SILENT, *COMMAND[3:], "--total-steps", "1_000_000_000", *args, cwd=tmp_path, timeout_s=400)
    assert done.returncode == 75, done.stderr
    assert "[2/3] WARNING: nothing heard from rank 1 for 1 s" in done.stderr
    assert "[2/3] WARNING: rank 1 is heard again" in done.stderr
    neighbours, table = rows(run, 2, "neighbours"), rows(run, 2, "updates")
    lost = neighbours["lost"].astype(bool)
    assert lost.any() and not lost.all()
    # While its neighbour was silent rank 2 went on without it, and mixed with rank 0: the two are one graph.
    assert neighbours["staleness"].max() > 20
    begin_s, end_s = neighbours["time_s"][lost][[0, -1]]
    without = table[(table["time_s"] >= begin_s) & (table["time_s"] <= end_s)]
    assert int(np.diff(without["messages_mixed"]).sum()) > 0


def test_a_time_limit_ends_all_ranks(one_mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = one_mpi.run(2, *COMMAND, "--time-limit-s", "2", "--total-steps", "1_000_000_000", "--out", str(run))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert rows(run, rank, "updates")["time_s"][-1] == pytest.approx(2, abs=5)


def test_progress_is_shown(one_mpi: Mpi, tmp_path: Path) -> None:
    args = ("--time-limit-s", "5", "--total-steps", "900_000_000", "--progress-every-s", "1")
    done = one_mpi.run(2, *COMMAND, *args, "--out", str(tmp_path / "run"))
    lines = [line for line in done.stdout.splitlines() if "steps/s" in line and "left" in line]
    assert len(lines) >= 3, done.stdout
    steps = [int(re.search(r"([\d,]+) of 900,000,000 steps", line).group(1).replace(",", "")) for line in lines]
    assert all(later > sooner for sooner, later in itertools.pairwise(steps))
    for word in ("mean return", r"over [1-9]\d* episodes", "staleness"):
        assert re.search(word, lines[-1])


@pytest.mark.check
def test_one_rank_without_a_launcher_is_reproducible(tmp_path: Path, one_mpi: Mpi) -> None:
    tables = []
    for name in ("first", "second"):
        done = one_mpi.run(1, *COMMAND, "--total-steps", "6_000", "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        tables.append(rows(tmp_path / name, 0, "updates"))
    for column in ("policy_loss", "value_loss", "entropy", "grad_norm", "agent_steps"):
        np.testing.assert_array_equal(tables[0][column], tables[1][column])


def test_ranks_draw_different_simulators(one_mpi: Mpi, once: Once) -> None:
    run = short_runs(once, one_mpi, 2) / "independent"
    first, second = (rows(run, rank, "episodes")["episode_return"][:20].tolist() for rank in range(2))
    assert first != second


def test_atari_trains(mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = ("--env", "ALE/Breakout-v5", "--simulators", "4", "--total-steps", "3_000", "--out", str(run))
    done = mpi.run(2, "-m", "gala_mpi", "--record-every", "5", *args, timeout_s=240)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        table = rows(run, rank, "updates")
        assert (table["update_norm"] > 0).all() and table["messages_mixed"][-1] > 0
        sketch = rows(run, rank, "sketches")[0]
        # The sketch's norm estimates the norm itself, within three standard errors of a squared norm.
        assert abs(np.square(sketch["sketch"]).sum() / sketch["norm"] ** 2 - 1) < 3 * np.sqrt(2 / 1024)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "precision"), [("gossip", "float32"), ("allreduce", "float32"), ("gossip", "bfloat16")]
)
def test_cartpole_is_solved(one_mpi: Mpi, exchange: str, precision: str, tmp_path: Path) -> None:
    args = ("--preset", "cartpole", "--exchange", exchange, "--seed", "1", "--out", str(tmp_path / "run"))
    args += ("--precision", precision)
    done = one_mpi.run(4, "-m", "gala_mpi", "train", *args, timeout_s=280)
    assert done.returncode == 0, done.stderr
    said = re.search(r"mean return ([\d.]+) over 100 episodes", done.stdout.splitlines()[-2])
    assert said is not None and float(said.group(1)) >= 475
