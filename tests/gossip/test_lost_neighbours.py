"""Ranks that are killed, stopped or cut off: the survivors finish the budget, name the lost and say so.

Launchers are told not to end the job with the first rank that dies. Every run has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np
import pytest
from cluster import Cluster
from conftest import ROOT, Mpi, finish, kill, rank_process
from test_cli import has_rows
from test_training import rows

from gala_mpi.status.command import status_of

PACED = str(ROOT / "tests" / "train" / "programs" / "paced.py")
# 64 steps in 20 ms or more: some 7 s for three ranks, 10 s for two. Alone, the budget outlasts what happens to ranks.
BUDGET = 55_000
ARGS = ("--preset", "cartpole", "--flush-every-s", "0.2", "--record-every", "1", "--total-steps", str(BUDGET))
EXIT_LOST = 3
# No rank is held up for so long on a busy machine.
PATIENT_S = 8.0


@contextlib.contextmanager
def started(
    mpi: Mpi,
    folder: Path,
    size: int,
    *args: str,
    timeout_s: float = 2.0,
    pause_s: float = 0.02,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A run that has taken its first updates on all ranks."""
    patience = ("--neighbour-timeout-s", str(timeout_s), "--out", str(folder))
    process = mpi.start(size, PACED, str(pause_s), *ARGS, *patience, *args, env=env)
    try:
        deadline = time.monotonic() + 90
        while not all(has_rows(folder / f"rank-{rank:05d}.h5", 6) for rank in range(size)):
            assert time.monotonic() < deadline and process.poll() is None, "the run did not start"
            time.sleep(0.1)
        yield process
    finally:
        kill(process)
        process.communicate()


def assert_survived(done: subprocess.CompletedProcess[str], folder: Path, size: int, lost: set[int]) -> None:
    """The survivors spent the budget, closed their files, and named those that were lost."""
    assert done.returncode == EXIT_LOST, (done.returncode, done.stdout, done.stderr)
    named = re.search(r"^lost ranks: ([\d, ]+)$", done.stdout, re.MULTILINE)
    assert named is not None and set(map(int, named.group(1).split(", "))) == lost
    said = re.search(r"finished: ([\d,]+) steps", done.stdout)
    assert said is not None and int(said.group(1).replace(",", "")) >= BUDGET
    for survivor in set(range(size)) - lost:
        assert missed(done.stderr, f"[{survivor}/{size}] WARNING: ") == lost
        with h5py.File(folder / f"rank-{survivor:05d}.h5", "r+") as file:  # refuses what its writer did not close
            assert file["updates"]["agent_steps"][-1] > BUDGET / size
    for rank in lost:
        assert len(rows(folder, rank, "updates")) > 5


def missed(said: str, before: str = "") -> set[int]:
    """The ranks that somebody had not heard of: those of lines "rank 3 has not ..." and "ranks 1,4-6 have not ..."."""
    found = re.findall(re.escape(before) + r"ranks? ([\d,-]+) ha(?:s|ve) not been heard of for", said)
    runs = [list(map(int, run.split("-"))) for text in found for run in text.split(",")]
    return {rank for run in runs for rank in range(run[0], run[-1] + 1)}


def assert_nobody_else_was_missed(done: subprocess.CompletedProcess[str], lost: set[int]) -> None:
    """Not even for a while."""
    assert missed(done.stderr) == lost


def assert_mixed_again(folder: Path, size: int, victim: int) -> None:
    """The rank after the victim in the ring lost it, found it, and then mixed most of what it can have sent."""
    after = (victim + 1) % size
    lost = rows(folder, after, "neighbours")["lost"]
    updates = rows(folder, after, "updates")
    mixed = updates["messages_mixed"]
    assert lost.any() and not lost[-1]
    back = int(np.flatnonzero(lost)[-1]) + 1
    # There is one message for each of the victim's updates, and one is mixed at each of its own: one may be slower.
    sent = int((rows(folder, victim, "updates")["time_s"] > updates["time_s"][back]).sum())
    assert sent > 0.25 * (len(mixed) - back)
    assert mixed[-1] - mixed[back] > 0.5 * min(len(mixed) - back, sent) > 10


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_survivors_of_a_killed_rank_finish(mpi: Mpi, victim: int, tmp_path: Path) -> None:
    with started(mpi.surviving(), tmp_path / "run", 3, env={"TELL_SHARES": "1"}) as process:
        os.kill(rank_process(process.pid, victim), signal.SIGKILL)
        done = finish(process, 90)
        assert_survived(done, tmp_path / "run", 3, {victim})
    # The learning rate went by who was there.
    for survivor in {0, 1, 2} - {victim}:
        (shares,) = re.findall(rf"^\[{survivor}\] shares \[(.*)\]$", done.stderr, re.MULTILINE)
        assert {"0.67", "1.0"} <= set(shares.split(", "))


def test_a_staleness_bound_does_not_hold_survivors_up(mpi: Mpi, tmp_path: Path) -> None:
    with started(mpi.surviving(), tmp_path / "run", 3, "--max-staleness", "0") as process:
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        assert_survived(finish(process, 90), tmp_path / "run", 3, {1})
        # Rank 2 waited for the silent one as long as it is allowed to, and then no more.
        assert 0.5 < rows(tmp_path / "run", 2, "updates")["wait_s"][-1] < 10


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_stopped_for_good_does_not_hold_the_job(mpi: Mpi, victim: int, tmp_path: Path) -> None:
    with started(mpi.surviving(), tmp_path / "run", 3) as process:
        stopped = rank_process(process.pid, victim)
        os.kill(stopped, signal.SIGSTOP)
        assert_survived(finish(process, 90), tmp_path / "run", 3, {victim})
        deadline = time.monotonic() + 10
        while Path(f"/proc/{stopped}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not Path(f"/proc/{stopped}").exists()


@pytest.mark.parametrize("victims", [{2, 3}, {1, 2}])
def test_two_of_four_ranks_may_be_killed(one_mpi: Mpi, victims: set[int], tmp_path: Path) -> None:
    """Those that are left still hear of each other, whatever ranks were between them."""
    with started(one_mpi.surviving(), tmp_path / "run", 4) as process:
        for victim in victims:
            os.kill(rank_process(process.pid, victim), signal.SIGKILL)
        assert_survived(finish(process, 90), tmp_path / "run", 4, victims)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_that_comes_back_is_mixed_with_again(mpi: Mpi, victim: int, tmp_path: Path) -> None:
    with started(mpi, tmp_path / "run", 3) as process:
        stopped = rank_process(process.pid, victim)
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(4)
        os.kill(stopped, signal.SIGCONT)
        done = finish(process, 90)
        assert done.returncode == 0, done.stderr
        assert f"rank {victim} is back in the run" in done.stderr
        # The others went on while it could not look.
        assert not missed(done.stderr, f"[{victim}/3] WARNING: ")
        assert_mixed_again(tmp_path / "run", 3, victim)


def test_a_dead_rank_is_found_although_updates_take_most_of_the_timeout(mpi: Mpi, tmp_path: Path) -> None:
    with started(mpi.surviving(), tmp_path / "run", 3, pause_s=1.5) as process:
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        missing = {f"[{survivor}/3] WARNING: rank 1 has not been heard of for 2 s" for survivor in (0, 2)}
        # The run has hours to go, so it is not its end at which the rank is missed.
        assert process.stderr is not None
        for line in process.stderr:
            missing = {words for words in missing if words not in line}
            if not missing:
                break
        assert not missing and process.poll() is None


def on_cluster(cluster: Cluster, mpi: Mpi, ranks_per_host: int = 1) -> Mpi:
    return cluster.mpi(mpi.surviving(), ranks_per_host=ranks_per_host)


def rank_on(cluster: Cluster, rank: int) -> int:
    """The process of a rank, below the shell that may have started it."""
    pid = next(pid for host in cluster.hosts for found, pid in cluster.ranks(host).items() if found == rank)
    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sh\0"):
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
    return pid


@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_on_other_hosts_finish(cluster: Cluster, mpich: Mpi, victim: int, tmp_path: Path) -> None:
    with started(on_cluster(cluster, mpich), tmp_path / "run", 3) as process:
        os.kill(rank_on(cluster, victim), signal.SIGKILL)
        assert_survived(finish(process, 90), tmp_path / "run", 3, {victim})


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_stopped_for_good_does_not_hold_those_on_other_hosts(
    cluster: Cluster, mpi: Mpi, victim: int, tmp_path: Path
) -> None:
    with started(on_cluster(cluster, mpi), tmp_path / "run", 3) as process:
        os.kill(rank_on(cluster, victim), signal.SIGSTOP)
        assert_survived(finish(process, 90), tmp_path / "run", 3, {victim})


def test_survivors_of_one_hosts_ranks_finish(cluster: Cluster, mpich: Mpi, tmp_path: Path) -> None:
    with started(
        on_cluster(cluster, mpich, 2), tmp_path / "run", 6, "--topology", "hierarchical", timeout_s=PATIENT_S
    ) as process:
        for rank in (2, 3):
            os.kill(rank_on(cluster, rank), signal.SIGKILL)
        done = finish(process, 90)
        assert_survived(done, tmp_path / "run", 6, {2, 3})
        assert_nobody_else_was_missed(done, {2, 3})


@pytest.mark.parametrize("leader", [0, 2])
def test_when_a_hosts_first_rank_is_killed_nobody_else_is_lost(
    cluster: Cluster, mpich: Mpi, leader: int, tmp_path: Path
) -> None:
    """The first rank of a host speaks for all of it to the other."""
    with started(on_cluster(cluster, mpich, 2), tmp_path / "run", 4, timeout_s=PATIENT_S) as process:
        os.kill(rank_on(cluster, leader), signal.SIGKILL)
        done = finish(process, 90)
        assert_survived(done, tmp_path / "run", 4, {leader})
        assert_nobody_else_was_missed(done, {leader})


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_on_another_host_comes_back(cluster: Cluster, mpi: Mpi, victim: int, tmp_path: Path) -> None:
    with started(on_cluster(cluster, mpi), tmp_path / "run", 3) as process:
        stopped = rank_on(cluster, victim)
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(4)
        os.kill(stopped, signal.SIGCONT)
        done = finish(process, 90)
        assert done.returncode == 0, done.stderr
        assert_mixed_again(tmp_path / "run", 3, victim)


def test_neighbours_inside_a_node_go_on_beside_a_silent_one_elsewhere(
    cluster: Cluster, mpich: Mpi, tmp_path: Path
) -> None:
    """Ranks 0 and 1 share a node, and rank 1 sends to rank 2, which is stopped for a while."""
    with started(on_cluster(cluster, mpich, 2), tmp_path / "run", 4) as process:
        stopped = rank_on(cluster, 2)
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(4)
        os.kill(stopped, signal.SIGCONT)
        done = finish(process, 90)
        assert done.returncode == 0, done.stderr
        assert_mixed_again(tmp_path / "run", 4, 2)
        for rank in (0, 1):
            assert np.diff(rows(tmp_path / "run", rank, "updates")["time_s"]).max() < 2


def test_a_host_that_is_cut_off_for_a_while_is_mixed_with_again(cluster: Cluster, mpi: Mpi, tmp_path: Path) -> None:
    with started(on_cluster(cluster, mpi), tmp_path / "run", 3) as process:
        cluster.cut(cluster.hosts[1])
        time.sleep(4)
        cluster.heal(cluster.hosts[1])
        done = finish(process, 90)
        assert done.returncode == 0, done.stderr
        assert_mixed_again(tmp_path / "run", 3, 1)


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_whose_parameters_turn_nan_adopts_a_neighbours(mpi: Mpi, size: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = (PACED, "0", "--preset", "cartpole", "--record-every", "1", "--total-steps", "40_000", "--out", str(run))
    done = mpi.run(size, *args, env={"NAN_AT": "1:30"})
    assert done.returncode == 0, done.stderr
    assert f"[1/{size}] WARNING: the parameters are not finite after update 30: went on with those of a" in done.stderr
    assert rows(run, 1, "updates")["divergences"][-1] == 1
    for rank in range(size):
        table = rows(run, rank, "updates")
        # Nobody was sent a value that is not finite, let alone mixed one.
        assert table["messages_rejected"][-1] == 0 and np.isfinite(table["policy_loss"]).all()
        assert np.isfinite(rows(run, rank, "sketches")["norm"]).all() and len(table) > 60


def test_a_rank_that_is_to_stop_on_divergence_ends_alone(mpi: Mpi, tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = ("--preset", "cartpole", "--record-every", "1", "--total-steps", "40_000", "--on-divergence", "stop")
    done = mpi.run(3, PACED, "0", *args, "--out", str(run), env={"NAN_AT": "1:30"})
    assert done.returncode == 4, done.stderr
    assert "ranks that diverged: 1" in done.stdout and status_of(run).code == 4
    last = rows(run, 1, "updates")[-1]
    assert last["update"] == 30 and last["divergences"] == 1
    assert sum(int(rows(run, rank, "updates")["agent_steps"][-1]) for rank in (0, 2)) > 35_000
    for rank in (0, 2):
        table = rows(run, rank, "updates")
        assert table["messages_rejected"][-1] == 0 and np.isfinite(table["policy_loss"]).all()


@pytest.mark.parametrize(
    ("exchange", "where", "diverged", "every"), [("none", "1", "1", 7), ("allreduce", "all", "0, 1, 2", 1)]
)
def test_a_rank_without_a_neighbour_to_adopt_from_ends(
    one_mpi: Mpi, exchange: str, where: str, diverged: str, every: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    args = ("--preset", "cartpole", "--record-every", str(every), "--total-steps", "20_000", "--exchange", exchange)
    done = one_mpi.run(3, PACED, "0", *args, "--out", str(run), env={"NAN_AT": f"{where}:30"})
    assert done.returncode == 4, done.stderr
    assert f"ranks that diverged: {diverged}\n" in done.stdout
    last = rows(run, 1, "updates")[-1]
    assert last["update"] == 30 and last["divergences"] == 1 and np.isfinite(last["entropy"])
    # What was not measured at that update is not told as if it were zero.
    assert np.isnan([last["update_norm"], last["explained_variance"]]).all() == (30 % every != 0)
    assert (rows(run, 0, "updates")["update"][-1] > 30) == (exchange == "none")
