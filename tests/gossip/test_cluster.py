"""The virtual cluster itself: its hosts are hosts to MPI, and what passes between them passes their links."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import NAMESPACES, Cluster
from conftest import ROOT, Mpi, finish

PROGRAMS = Path(__file__).parent / "programs"
TRANSFER = str(PROGRAMS / "cluster_transfer.py")
# Well beyond what the launchers and MPI's start-up exchange.
MEGABYTES = 4
MESSAGE_BYTES = MEGABYTES * 1_000_000


def transfer(mpi: Mpi, size: int, *args: str) -> dict:
    done = mpi.run(size, TRANSFER, *args, timeout_s=40)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def wait_for(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("ranks_per_host", [1, 2])
def test_ranks_share_memory_on_their_host_only(cluster: Cluster, mpi: Mpi, ranks_per_host: int) -> None:
    size = 3 * ranks_per_host
    found = transfer(cluster.mpi(mpi, ranks_per_host), size, "--mbytes", "0.1")
    host_of = [rank // ranks_per_host for rank in range(size)]
    assert found["hosts"] == [cluster.hosts[host] for host in host_of]
    assert found["sharing"] == [[other for other in range(size) if host_of[other] == host] for host in host_of]


def test_what_ranks_exchange_passes_the_links_unless_they_share_a_host(cluster: Cluster, mpi: Mpi) -> None:
    node0, node1, node2 = cluster.hosts
    transfer(cluster.mpi(mpi, ranks_per_host=2), 2, "--mbytes", str(MEGABYTES))
    assert max(map(cluster.sent_bytes, cluster.hosts)) < MESSAGE_BYTES / 4
    transfer(cluster.mpi(mpi), 3, "--mbytes", str(MEGABYTES))
    # Two messages leave node0. An Allreduce sends each rank's own part at least.
    assert cluster.sent_bytes(node0) > 2 * MESSAGE_BYTES
    assert min(cluster.received_bytes(node1), cluster.received_bytes(node2)) > 1.5 * MESSAGE_BYTES
    assert min(cluster.sent_bytes(node1), cluster.sent_bytes(node2)) > 0.5 * MESSAGE_BYTES


@pytest.mark.parametrize("slow", [0, 1])
def test_a_link_is_no_faster_than_its_limit_whichever_end_it_is_at(cluster: Cluster, mpi: Mpi, slow: int) -> None:
    on_cluster = cluster.mpi(mpi)
    unlimited = transfer(on_cluster, 2, "--mbytes", str(MEGABYTES))["send_s"]
    cluster.limit(cluster.hosts[slow], "20mbit")
    limited = transfer(on_cluster, 2, "--mbytes", str(MEGABYTES))["send_s"]
    expected = MESSAGE_BYTES * 8 / 20e6
    assert unlimited < 0.8 * expected
    assert 0.8 * expected < limited < 5 * expected


def test_a_transfer_stops_while_its_receiver_is_cut_off_and_then_goes_on(cluster: Cluster, mpi: Mpi) -> None:
    _, node1, _ = cluster.hosts
    for host in cluster.hosts:
        cluster.limit(host, "100mbit")
    process = cluster.mpi(mpi).start(2, TRANSFER, "--mbytes", str(MEGABYTES), "--transfers", "5")
    try:
        wait_for(lambda: cluster.received_bytes(node1) > 1.5 * MESSAGE_BYTES)
        cluster.cut(node1)
        before = cluster.received_bytes(node1)
        time.sleep(1)
        assert cluster.received_bytes(node1) == before
        assert process.poll() is None
    finally:
        cluster.heal(node1)
        # The program checks every element that it receives.
        done = finish(process, 20)
    assert done.returncode == 0, done.stderr
    assert cluster.received_bytes(node1) > 5 * MESSAGE_BYTES


@pytest.mark.parametrize("delivery", ["inline", "background"])
def test_the_mailbox_keeps_its_promises_across_hosts(cluster: Cluster, mpi: Mpi, delivery: str) -> None:
    program = str(PROGRAMS / "stress_mailbox.py")
    arguments = ("--exchanges", "2000", "--delivery", delivery)
    done = cluster.mpi(mpi).run(3, program, *arguments, timeout_s=100)
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout.splitlines()[-1])
    assert totals["posted"] > totals["taken"] >= 2000
    # In the background, much is replaced before it is sent.
    share = 1 if delivery == "inline" else 10
    assert sum(map(cluster.sent_bytes, cluster.hosts)) > totals["bytes_posted"] / share


def test_ranks_are_found_on_their_hosts_and_end_with_the_cluster(cluster: Cluster, mpi: Mpi) -> None:
    program = "import subprocess; subprocess.run(['sleep', '60'])"
    process = cluster.mpi(mpi, ranks_per_host=2).start(6, "-c", program)
    expected = [{0, 1}, {2, 3}, {4, 5}]
    wait_for(lambda: [set(cluster.ranks(host)) for host in cluster.hosts] == expected)
    ranks = [pid for host in cluster.hosts for pid in cluster.ranks(host).values()]
    # The ranks themselves, neither the launcher nor what they started.
    assert all(program in Path(f"/proc/{pid}/cmdline").read_text() for pid in ranks)
    # At least a launcher on each host, and what each rank started.
    wait_for(lambda: sum(len(cluster.pids(host)) for host in cluster.hosts) > 2 * len(ranks))
    everything = [pid for host in cluster.hosts for pid in cluster.pids(host)]
    # Neither a stopped process nor a host that is cut off is in the way.
    os.kill(ranks[3], signal.SIGSTOP)
    cluster.cut(cluster.hosts[2])
    cluster.__exit__()
    process.communicate(timeout=40)
    assert not any(map(runs, [process.pid, *everything]))


def test_a_hang_on_the_cluster_is_a_failure_and_leaves_no_process(cluster: Cluster, mpi: Mpi) -> None:
    program = "import time; from mpi4py import MPI; MPI.COMM_WORLD.Barrier(); time.sleep(60)"
    process = cluster.mpi(mpi).start(3, "-c", program)
    wait_for(lambda: all(map(cluster.ranks, cluster.hosts)))
    everything = [pid for host in cluster.hosts for pid in cluster.pids(host)]
    # Where the launcher's end can no longer be heard.
    cluster.cut(cluster.hosts[1])
    with pytest.raises(pytest.fail.Exception, match="no end after"):
        finish(process, 1)
    wait_for(lambda: not any(map(runs, everything)))


def test_a_dead_session_leaves_nothing_behind_and_a_living_one_is_left_alone(cluster: Cluster) -> None:
    program = (
        "import subprocess, sys, time; sys.path.insert(0, sys.argv[1]); from cluster import Cluster\n"
        "cluster = Cluster().__enter__()\n"
        "args = ['ip', 'netns', 'exec', f'{cluster._prefix}-node0', 'sleep', '60']\n"
        "child = subprocess.Popen(args, stdout=subprocess.DEVNULL)\n"
        "while cluster.pids('node0') != [child.pid]: time.sleep(0.01)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    folder = str(ROOT / "tests")
    with subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True) as session:
        try:
            child = int(session.stdout.readline())
        finally:
            session.kill()
    names = f"gala-{session.pid}-*"
    assert runs(child) and list(NAMESPACES.glob(names))
    with Cluster() as another:
        assert not runs(child) and not list(NAMESPACES.glob(names))
        # With the same addresses, and apart all the same.
        assert another.pids("node0") == cluster.pids("node0") == []
        before = cluster.sent_bytes("node0")
    assert cluster.sent_bytes("node0") >= before
