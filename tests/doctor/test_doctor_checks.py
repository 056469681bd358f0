"""The doctor's judgement, on what it might see: pure functions of values, and checks of this host alone."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gala_mpi.doctor import command as doctor
from gala_mpi.doctor import devices, examination, libraries, links, placement, storage, verdicts
from gala_mpi.doctor.findings import FAIL, OK, WARN, Finding, as_json, as_text, failed, merge
from gala_mpi.mpi.library import family as family_of
from gala_mpi.mpi.library import netmod, netmods
from gala_mpi.mpi.room import Room
from gala_mpi.units import in_units, spans

MPICH, OPENMPI = "MPICH Version: 5.0.2", "Open MPI v5.0.11, package: ..."
SRUN = libraries.Launch("srun", 4, 0)
NO_LAUNCH = libraries.Launch()


# Findings


def test_a_finding_that_is_not_ok_has_a_fix() -> None:
    with pytest.raises(ValueError, match="needs a fix"):
        Finding("a.b", FAIL, "broken")
    assert Finding("a.b", OK, "fine").fix == ""


def test_findings_that_differ_in_their_ranks_alone_are_one() -> None:
    alike = [Finding("a.b", OK, "fine", ranks=(rank,)) for rank in (2, 0, 1, 4)]
    other = Finding("a.b", WARN, "not so", "do", ranks=(3,))
    merged = merge([alike[0], other, *alike[1:]])
    assert merged == [Finding("a.b", OK, "fine", ranks=(0, 1, 2, 4)), other]
    text = as_text(merged, "title").splitlines()
    assert text == [
        "title",
        "a",
        "  OK    ranks 0-2,4: fine",
        "  WARN  rank 3: not so; fix: do",
        "1 OK, 1 WARN, 0 FAIL",
    ]
    entries = json.loads(as_json(merged, ["x", "x", "y", "y", "y"]))
    assert [entry["nodes"] for entry in entries] == [["x", "y"], ["y"]]
    assert set(entries[0]) == {"check", "status", "ranks", "nodes", "message", "fix", "values"}
    assert not failed(merged) and failed([*merged, Finding("c.d", FAIL, "broken", "do")])


def test_numbers_for_people() -> None:
    assert [spans(ranks) for ranks in ((3,), (0, 1), (7, 0, 1, 2))] == ["rank 3", "ranks 0-1", "ranks 0-2,7"]
    sizes = [in_units(nbytes) for nbytes in (0, 999, 1_000, 67_108_864, 6_720_000, 999_600_000, 2.4e13, 5e17)]
    assert sizes == ["0 bytes", "999 bytes", "1 kB", "67 MB", "6.7 MB", "1 GB", "24 TB", "500 PB"]


# The MPI library and its launcher


@pytest.mark.parametrize(
    ("library", "family"),
    [
        (MPICH, "mpich"),
        (OPENMPI, "openmpi"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28", "cray"),
        ("Intel(R) MPI Library 2021.11 for Linux* OS", "intel"),
        ("MVAPICH2 Version      :\t2.3.7", "mvapich"),
        ("Something else", "other"),
    ],
)
def test_the_family_of_a_library(library: str, family: str) -> None:
    assert family_of(library) == family


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, NO_LAUNCH),
        ({"SLURM_NTASKS": "4"}, NO_LAUNCH),  # a shell in an allocation
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, libraries.Launch("Slurm", 4, 2)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, libraries.Launch("srun", 1, 0)),
        # An mpirun inside an allocation has the last word.
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "PMI_SIZE": "1", "PMI_RANK": "0"},
            libraries.Launch("the mpirun of MPICH or Intel MPI", 1, 0),
        ),
        # But srun --mpi=pmi2 sets its variables too.
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "PMI_SIZE": "8", "PMI_RANK": "3"},
            libraries.Launch("srun", 8, 3),
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
            libraries.Launch("the mpirun of Open MPI", 2, 1),
        ),
    ],
)
def test_what_the_environment_says_of_the_launcher(environ: dict[str, str], expected: libraries.Launch) -> None:
    assert libraries.launch(environ) == expected


@pytest.mark.parametrize(
    ("found", "library", "fix"),
    [
        (SRUN, MPICH, "srun --mpi=pmi2"),
        (SRUN, OPENMPI, "srun --mpi=pmix"),
        (SRUN, "CRAY MPICH", "srun --mpi=cray_shasta"),
        (SRUN, "Intel(R) MPI", "I_MPI_PMI_LIBRARY"),
        (libraries.Launch("the mpirun of MPICH or Intel MPI", 4, 0), OPENMPI, "start with the mpirun of Open MPI"),
    ],
)
def test_ranks_that_are_runs_of_their_own_fail(found: libraries.Launch, library: str, fix: str) -> None:
    [finding] = libraries.ranks(found, ["node"], library)
    assert finding.status == FAIL and "started 4 ranks" in finding.message and fix in finding.fix


def test_ranks_that_see_each_other_are_counted() -> None:
    [finding] = libraries.ranks(SRUN, ["a", "a", "b", "b"], MPICH)
    assert finding.status == OK and "4 rank(s) on 2 node(s), 2 a node" in finding.message
    assert libraries.ranks(NO_LAUNCH, ["a"], MPICH)[0].status == OK


def test_fewer_threads_matter_between_nodes_only() -> None:
    def level(granted: str, nodes: int, environ: dict[str, str]) -> tuple[str, str]:
        finding = libraries.thread_level(granted, nodes, "CRAY MPICH", environ)
        return finding.status, finding.fix

    assert level("multiple", 2, {}) == (OK, "")
    assert level("serialized", 1, {}) == (OK, "")
    assert level("serialized", 2, {}) == (WARN, "export MPICH_MAX_THREAD_SAFETY=multiple")
    assert level("single", 2, {"MPI4PY_RC_THREAD_LEVEL": "single"}) == (WARN, "unset MPI4PY_RC_THREAD_LEVEL")


def test_who_dies_elsewhere_costs_a_rank_on_mpich_over_ucx_alone() -> None:
    both, one = "MPICH Version: 5.0.2\nMPICH Device: ch4:ucx ofi\n", "MPICH Device: ch4:ucx\n"
    (found,) = libraries.lost_ranks(2, both, {})
    assert found.status == WARN and found.fix == "export MPIR_CVAR_CH4_NETMOD=ofi"
    assert "built" in libraries.lost_ranks(2, one, {})[0].fix
    taken = {"MPICH_CH4_NETMOD": "ofi"}
    for nodes, library, environ in (
        (1, both, {}),
        (2, both, taken),
        (2, "MPICH Device: ch4:ofi", {}),
        (2, "Open MPI", {}),
    ):
        assert libraries.lost_ranks(nodes, library, environ) == []
    assert netmod(one, {"MPIR_CVAR_CH4_NETMOD": "ofi"}) == "ofi" and netmods(both) == ["ucx", "ofi"]


def test_windows_must_be_unified() -> None:
    assert libraries.windows("", MPICH).status == OK
    problem = "the memory model of windows is not MPI_WIN_UNIFIED"
    finding = libraries.windows(problem, OPENMPI)
    assert finding.status == FAIL and "OMPI_MCA_osc=sm,rdma,ucx" in finding.fix and finding.message == problem
    # All-reduce needs them too: the board lies in one.
    assert "allreduce" not in finding.fix and "OMPI" not in libraries.windows(problem, MPICH).fix


# Cores


def place(cpus: set[int], node: str = "a", cores: int = 8, omp: str = "") -> placement.Placed:
    return placement.Placed(node, frozenset(cpus), cores, omp)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([place({0, 1}), place({2, 3})], [(OK, (0,)), (OK, (1,))]),
        ([place({0, 1}), place({0, 1})], [(OK, (0, 1))]),
        ([place({3}), place({3})], [(FAIL, (0, 1))]),
        ([place({0}, cores=1), place({0}, cores=1)], [(WARN, (0, 1))]),  # there is no other core
        ([place({0, 1}), place({0, 1}), place({0, 1})], [(WARN, (0, 1, 2))]),
        ([place({0}), place({0}), place({1})], [(WARN, (0, 1)), (OK, (2,))]),
        ([place({0}, "a"), place({0}, "b")], [(OK, (0,)), (OK, (1,))]),  # the same number on another node
        ([place({0, 1}), place({4, 5}), place({1, 4})], [(OK, (0, 1, 2))]),  # joined by the last
    ],
)
def test_ranks_that_share_cores(places: list[placement.Placed], expected: list[tuple[str, tuple[int, ...]]]) -> None:
    findings = placement.bindings(places, SRUN, MPICH)
    assert [(finding.status, finding.ranks) for finding in findings] == expected
    assert placement.on_one_core(places, SRUN, MPICH) == [f for f in findings if f.status == FAIL]


def test_more_ranks_than_cores_work_and_are_warned_of() -> None:
    [finding] = placement.bindings([place({0, 1}, cores=2)] * 4, SRUN, MPICH)
    assert finding.status == WARN
    assert finding.message == "4 ranks share 2 core(s): the run works, but they take turns"
    assert finding.fix == "for full speed at most 2 rank(s) a node"


@pytest.mark.parametrize(
    ("found", "library", "fix"),
    [
        (SRUN, MPICH, "srun --cpus-per-task=4"),
        (NO_LAUNCH, MPICH, "mpirun -bind-to core"),
        (NO_LAUNCH, OPENMPI, "--bind-to none"),
        (NO_LAUNCH, "Intel(R) MPI", "I_MPI_PIN"),
    ],
)
def test_the_fix_for_a_binding_is_that_of_the_launcher(found: libraries.Launch, library: str, fix: str) -> None:
    [finding] = placement.bindings([place({0}), place({0})], found, library)
    assert fix in finding.fix


def test_threads_are_compared_with_the_ranks_share_of_its_cores() -> None:
    places = [place({0, 1, 2, 3}, omp=omp) for omp in ("", "2", "3", "4,2")]
    assert [finding.status for finding in placement.threads(places[:2])] == [OK, OK]
    findings = placement.threads(places)
    assert [finding.status for finding in findings] == [OK, WARN, WARN, WARN]
    assert findings[1].fix == "export OMP_NUM_THREADS=1"


def test_this_process_knows_its_cores() -> None:
    here = placement.placed("n", {"OMP_NUM_THREADS": "3"})
    assert here.cpus == os.sched_getaffinity(0) and here.omp_num_threads == "3" and here.node_cores >= 1


# Memory and files


@pytest.mark.parametrize(("need", "status"), [(0, OK), (799, OK), (900, WARN), (1000, WARN), (1001, FAIL)])
def test_windows_must_fit_into_shared_memory(need: int, status: str) -> None:
    finding = storage.shared_memory(Room(5000, 1000), need, (0, 1), MPICH)
    assert finding.status == status
    assert finding.values == {"need_bytes": need, "free_bytes": 1000, "total_bytes": 5000}


def test_the_fix_for_shared_memory_makes_room_beside_what_is_used() -> None:
    mib = 2**20
    finding = storage.shared_memory(Room(64 * mib, 44 * mib), 80 * mib, (0, 1), OPENMPI)
    assert "docker run --shm-size=120m" in finding.fix and "OMPI_MCA_osc_sm_backing_directory" in finding.fix
    assert "OMPI" not in storage.shared_memory(None, 1, (0, 1), MPICH).fix
    assert storage.shared_memory(Room(0, 0), 10**9, (5,), MPICH).status == OK, "a rank alone shares nothing"


MOUNTS = r"""proc /proc proc rw 0 0
/dev/sda / ext4 rw 0 0
none /scratch tmpfs rw 0 0
server:/scratch /scratch lustre rw 0 0
server:/my\040runs /home/my\040runs nfs4 rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/scratchy", "ext4"),
        ("/scratch/me", "lustre"),
        ("/home/my runs/a", "nfs4"),
        ("/home", "ext4"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert storage.filesystem(Path(path), MOUNTS) == kind


def test_mpi_itself_needs_shared_memory() -> None:
    room = Room(64 * 10**6, 60 * 10**6)
    assert storage.too_small_to_start(room, 7) == "" == storage.too_small_to_start(Room(1, 1), 1)
    assert "MPI may crash as it starts 8 ranks" in storage.too_small_to_start(room, 8)
    found = libraries.Launch("srun", 32, 0)
    assert libraries.ranks_here(found, {}) == 32
    assert libraries.ranks_here(found, {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}) == 8


def test_what_a_killed_run_left_under_this_process_number_is_removed_or_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPICH would wait for it for ever, or end."""
    monkeypatch.setattr(storage, "SHARED_MEMORY", tmp_path)
    assert storage.way_barred(0xAB) == ""
    names = ("mpich_shm_ab_0", "mpich_shm_ab_1", "mpich_shm_abc_0", "mpich_shm_cd_0", "mine_ab_0")
    for name in names:
        (tmp_path / name).touch()
    assert storage.way_barred(0xAB) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
    (tmp_path / names[0]).mkdir()  # which cannot be unlinked either
    said = storage.way_barred(0xAB)
    assert str(tmp_path / names[0]) in said and (tmp_path / names[0]).owner() in said and "start again" in said


def test_a_full_or_a_fleeting_file_system_is_told() -> None:
    def status(kind: str, free: float) -> str:
        return storage.judge_room("runs", kind, Room(10**13, int(free)), (0,)).status

    assert [status("lustre", 1e12), status("ext4", 1e8), status("tmpfs", 1e12)] == [OK, WARN, WARN]
    assert storage.judge_room("runs", "unknown", None, (0,)).status == FAIL


def test_a_file_is_written_and_followed_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "not" / "yet"
    assert storage.hdf5(out, (0,)).status == OK
    assert storage.output_room(out, (0,)).values["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_in_the_folders_place_fails(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    finding = storage.hdf5(Path(f"{tmp_path}/file{below}"), (0,))
    assert finding.status == FAIL and "file is no folder" in finding.message and finding.fix.startswith("--out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_only_rank_0_sees_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "APPEARS_WITHIN_S", 0.1)
    assert storage.visible(str(tmp_path), tmp_path, (1,)).status == OK
    finding = storage.visible(str(tmp_path / "elsewhere"), tmp_path, (1,))
    assert finding.status == FAIL and "all nodes share" in finding.fix


# GPUs


@pytest.mark.parametrize(
    ("present", "usable", "aware", "library", "expected"),
    [
        (0, 0, False, MPICH, {"gpu.devices": OK}),
        (4, 4, True, MPICH, {"gpu.devices": OK, "gpu.mpi": OK}),
        (4, 4, False, "CRAY MPICH", {"gpu.devices": OK, "gpu.mpi": WARN}),
        (4, 4, None, OPENMPI, {"gpu.devices": OK, "gpu.mpi": WARN}),
        (4, 0, True, MPICH, {"gpu.devices": FAIL}),
        (4, None, True, MPICH, {"gpu.devices": FAIL}),
    ],
)
def test_gpus(present: int, usable: int | None, aware: bool | None, library: str, expected: dict[str, str]) -> None:
    findings = devices.judge(present, usable, aware, (0, 1), library)
    assert {finding.check: finding.status for finding in findings} == expected
    if library.startswith("CRAY"):
        assert "MPICH_GPU_SUPPORT_ENABLED=1" in findings[1].fix


def test_gpus_are_counted_by_their_device_files(tmp_path: Path) -> None:
    assert devices.gpus_present(tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia0x"):
        (tmp_path / name).touch()
    assert devices.gpus_present(tmp_path) == 2


# Links and clocks


@given(
    st.integers(1, 12).flatmap(
        lambda size: st.tuples(
            st.lists(st.sampled_from("abcd"), min_size=size, max_size=size),
            st.sets(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=40),
        )
    )
)
def test_no_node_is_measured_twice_at_once(graph: tuple[list[str], set[tuple[int, int]]]) -> None:
    nodes, edges = graph
    rounds = links.rounds_of(sorted(edges), nodes)
    assert sorted(edge for together in rounds for edge in together) == sorted(edges)
    for together in rounds:
        ends = [node for origin, target in together for node in {nodes[origin], nodes[target]}]
        assert len(ends) == len(set(ends)), together


def test_a_ring_of_pairs_of_nodes_is_measured_side_by_side() -> None:
    nodes = ["a", "a", "b", "b", "c", "c", "d", "d"]
    rounds = links.rounds_of([(rank, (rank + 1) % 8) for rank in range(8)], nodes)
    assert len(rounds) <= 4 and max(map(len, rounds)) >= 3


def link(origin: int = 0, target: int = 1, **changes: Any) -> links.Link:
    return dataclasses.replace(links.Link(origin, target, 1e-3, 2e-6, 1e-3, 0.5), **changes)


def judge(*measured: links.Link, threads: bool = True, environ: dict[str, str] | None = None) -> list[Finding]:
    return verdicts.links(measured, ["a", "a", "b", "b"], threads, MPICH, environ or {})


def test_links_of_the_same_kind_are_one_finding() -> None:
    [here, there] = judge(link(0, 1), link(1, 2), link(2, 3, put_s=2e-3))
    assert (here.status, here.ranks) == (OK, (0, 2)) and "3,360 to 6,720 MB/s" in here.message
    assert (there.status, there.ranks) == (OK, (1,)) and "another node" in there.message
    assert there.values["links"][0]["needs_progress"] is False


@pytest.mark.parametrize(
    ("measured", "threads", "environ", "status", "fix"),
    [
        (link(0, 1, silent_s=0.49), True, {"MPIR_CVAR_NOLOCAL": "1"}, WARN, "unset MPIR_CVAR_NOLOCAL"),
        (link(0, 1, silent_s=0.49), True, {}, WARN, "--delivery background"),
        (link(1, 2, silent_s=0.49), True, {}, OK, ""),
        (link(1, 2, silent_s=0.49), False, {}, WARN, "MPI_THREAD_MULTIPLE"),
        (link(1, 2, put_s=0.6, silence_s=2.0, silent_s=0.6), True, {}, WARN, "--wire bfloat16"),
        (link(1, 2, failure="no answer within 5 s"), True, {}, FAIL, "UCX_NET_DEVICES"),
        (link(0, 1, failure="no answer within 5 s"), True, {}, FAIL, "ps"),
    ],
)
def test_what_a_link_means(measured: links.Link, threads: bool, environ: dict[str, str], status: str, fix: str) -> None:
    [finding] = judge(measured, threads=threads, environ=environ)
    assert finding.status == status and fix in finding.fix
    assert ("needs a progress thread" in finding.message) == (measured.silent_s > 0.4 and measured.put_s < 0.1)


def test_what_is_not_measured_is_told() -> None:
    assert verdicts.unmeasured([], "reason", "fix") == [] == verdicts.silent([], "looking")
    [finding] = verdicts.unmeasured([(0, 1), (0, 2)], "reason", "fix")
    assert (finding.status, finding.ranks) == (WARN, (0,)) and "2 link(s) not measured: reason" in finding.message
    [finding] = verdicts.silent([3], "looking")
    assert (finding.status, finding.ranks) == (FAIL, (3,))


def test_no_window_is_made_where_it_would_not_fit() -> None:
    def refusal(free: int) -> str:
        return links.no_room([storage.shared_memory(Room(free, free), 1, (0, 1), MPICH)])

    assert refusal(10**9) == "" and "no room" in refusal(2 * links.PAYLOAD_BYTES)
    assert links.no_room([storage.shared_memory(Room(0, 0), 1, (0,), MPICH)]) == ""


def test_the_shortest_round_trip_says_how_far_a_clock_is() -> None:
    ahead = 0.2
    trips = [(10.0, 10.0 + ahead + 0.04, 10.05), (11.0, 11.0 + ahead + 0.001, 11.002), (12.0, 12.0 + ahead, 12.1)]
    offset, error = links.offset_of(trips)
    assert offset == pytest.approx(ahead) and error == pytest.approx(0.001)


def test_clocks_that_differ_are_told() -> None:
    assert [finding.status for finding in verdicts.clocks({})] == [OK]
    findings = verdicts.clocks({"b": (0.01, 1e-4), "c": (-0.3, 1e-4), "d": (0.06, 0.03), "e": None})
    assert [finding.status for finding in findings] == [WARN, OK]
    assert "c is -300 ms" in findings[0].message and "chronyd" in findings[0].fix
    assert set(findings[1].values["offsets_s"]) == {"b", "d"}, "a bound that reaches zero proves nothing"


def test_versions_must_not_differ() -> None:
    same = dict.fromkeys(("python", *examination.PACKAGES), "1.0")
    assert [(f.status, f.ranks) for f in examination.versions([same, same])] == [(OK, ())]
    found = examination.versions([same, {**same, "torch": "2.0"}, same])
    assert [(finding.status, finding.ranks) for finding in found] == [(WARN, (0, 2)), (WARN, (1,))]
    lacking = {name: version for name, version in same.items() if name != "ale-py"}
    assert examination.versions([lacking])[0].fix == "pip install ale-py"
    assert "mpi4py.MPI" not in sys.modules


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], 120.0),
        (["--deadline-s", "7"], 7.0),
        (["--json", "--deadline_s=0.5"], 0.5),
        (["--deadline-s"], 120.0),
        (["--deadline-s", "-3"], 120.0),
        (["--deadline-s", "soon"], 120.0),
        (["--deadline-s", "inf"], 120.0),
    ],
)
def test_the_deadline_is_known_before_the_arguments_are_read(args: list[str], expected: float) -> None:
    assert doctor._deadline_s(args) == expected
