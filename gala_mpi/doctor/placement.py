"""Which cores the ranks of a node may use, and how many threads want them. Pure functions of values.

A rank takes its threads from its share of the cores that it may run on, so a wrong mask costs speed silently.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gala_mpi.doctor.findings import FAIL, OK, WARN, Finding
from gala_mpi.doctor.libraries import Launch, bind_fix

CPUSETS = (Path("/sys/fs/cgroup/cpuset.cpus.effective"), Path("/sys/fs/cgroup/cpuset/cpuset.effective_cpus"))


@dataclass(frozen=True)
class Placed:
    """Where a rank runs: its node, the cores that it may use, the node's number of cores, OMP_NUM_THREADS."""

    node: str
    cpus: frozenset[int]
    node_cores: int
    omp_num_threads: str = ""


def placed(node: str, environ: Mapping[str, str]) -> Placed:
    """Where this process runs. Local."""
    return Placed(node, frozenset(os.sched_getaffinity(0)), cores_of_node(), environ.get("OMP_NUM_THREADS", ""))


def cores_of_node() -> int:
    """Cores that this node, or the container, has for all ranks together. Local."""
    for path in CPUSETS:
        if path.is_file():
            spans = [span.partition("-") for span in path.read_text("ascii").strip().split(",") if span]
            return sum(int(last or first) - int(first) + 1 for first, _, last in spans) or 1
    return os.cpu_count() or 1


def bindings(places: Sequence[Placed], found: Launch, library: str) -> list[Finding]:
    """One finding for each set of ranks that share cores; `places[r]` is that of rank r."""
    here = Counter(place.node for place in places)
    return [
        _binding(ranks, cpus, here[places[ranks[0]].node], places[ranks[0]].node_cores, found, library)
        for ranks, cpus in _sharing(places)
    ]


def on_one_core(places: Sequence[Placed], found: Launch, library: str) -> list[Finding]:
    """The findings of `bindings` that would ruin a run."""
    return [finding for finding in bindings(places, found, library) if finding.status == FAIL]


def by_node(places: Sequence[Placed]) -> list[tuple[int, ...]]:
    """The ranks of each node, ascending, in the order of their first ones."""
    found: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        found.setdefault(place.node, []).append(rank)
    return [tuple(ranks) for ranks in found.values()]


def _sharing(places: Sequence[Placed]) -> list[tuple[tuple[int, ...], frozenset[int]]]:
    """Ranks of a node whose masks overlap, directly or through others, with all the cores of these masks."""
    found: list[tuple[tuple[int, ...], frozenset[int]]] = []
    for here in by_node(places):
        groups: list[tuple[tuple[int, ...], frozenset[int]]] = []
        for rank in here:
            touched = [group for group in groups if group[1] & places[rank].cpus]
            ranks = tuple(sorted({rank}.union(*(group[0] for group in touched))))
            groups = [group for group in groups if group not in touched]
            groups.append((ranks, places[rank].cpus.union(*(group[1] for group in touched))))
        found += groups
    return found


def _binding(
    ranks: tuple[int, ...], cpus: frozenset[int], node_ranks: int, node_cores: int, found: Launch, library: str
) -> Finding:
    values = {"cores": len(cpus), "sharing": len(ranks), "node_ranks": node_ranks, "node_cores": node_cores}
    if len(ranks) == 1:
        return Finding("cores.binding", OK, f"{len(cpus)} core(s) of its own", "", values, ranks)
    share = max(node_cores // node_ranks, 1)
    if len(cpus) == 1 and len(ranks) == node_ranks and node_cores > 1:
        message = f"all {len(ranks)} ranks of the node are bound to one of its {node_cores} cores"
        return Finding("cores.binding", FAIL, message, bind_fix(found, library, share), values, ranks)
    message = f"{len(ranks)} ranks share {len(cpus)} core(s)"
    if len(ranks) <= len(cpus):
        return Finding("cores.binding", OK, message, "", values, ranks)
    fix = f"for full speed at most {node_cores} rank(s) a node"
    if node_cores >= node_ranks:
        fix = bind_fix(found, library, share)
    return Finding("cores.binding", WARN, f"{message}: the run works, but they take turns", fix, values, ranks)


def threads(places: Sequence[Placed]) -> list[Finding]:
    """Whether OMP_NUM_THREADS asks for more threads than a rank has cores."""
    findings = []
    for ranks, _ in _sharing(places):
        for rank in ranks:
            mine = places[rank].cpus
            sharing = sum(1 for other in ranks if places[other].cpus & mine)
            findings.append(_threads(rank, places[rank].omp_num_threads, max(len(mine) // sharing, 1)))
    return sorted(findings, key=lambda finding: finding.ranks)


def _threads(rank: int, omp: str, share: int) -> Finding:
    values = {"omp_num_threads": omp, "cores_per_rank": share}
    asked = omp.partition(",")[0].strip()
    if asked.isdigit() and int(asked) > share:
        message = f"OMP_NUM_THREADS={asked}, but the rank has {share} core(s)"
        return Finding("cores.threads", WARN, message, f"export OMP_NUM_THREADS={share}", values, (rank,))
    said = f"OMP_NUM_THREADS={omp}" if omp else "OMP_NUM_THREADS is not set"
    return Finding("cores.threads", OK, f"{said}; training takes {share} thread(s) a rank", "", values, (rank,))
