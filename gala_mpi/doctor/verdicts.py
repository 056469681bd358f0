"""What the measurements between ranks mean for a run. Pure functions of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gala_mpi.doctor.findings import FAIL, OK, WARN, Finding
from gala_mpi.doctor.links import PAYLOAD_BYTES, Edge, Link
from gala_mpi.mpi.library import family

# A rank makes an update in about this time; messages that take longer come in less often than they are made.
SLOW_PUT_S = 0.1
CLOCKS_WITHIN_S = 0.05

NETWORK = {
    "openmpi": "export OMPI_MCA_btl_tcp_if_include=IFACE (or UCX_NET_DEVICES=IFACE with OMPI_MCA_pml=ucx)",
    "mpich": "export UCX_NET_DEVICES=IFACE (or MPIR_CVAR_CH4_NETMOD=ofi and FI_TCP_IFACE=IFACE)",
    "intel": "export FI_PROVIDER=mlx (psm3, tcp) and FI_TCP_IFACE=IFACE",
    "cray": "export FI_PROVIDER=cxi",
    "mvapich": "export MV2_IBA_HCA=IFACE",
}


def links(
    measured: Sequence[Link], nodes: Sequence[str], threads: bool, library: str, environ: Mapping[str, str]
) -> list[Finding]:
    """One finding for all links of the same path, behaviour and status. `nodes[r]` is the node of rank r."""
    groups: dict[tuple[Any, ...], list[Link]] = {}
    for link in measured:
        same = nodes[link.origin] == nodes[link.target]
        key = (same, link.failure, link.needs_progress, link.put_s > SLOW_PUT_S)
        groups.setdefault(key, []).append(link)
    findings = []
    for (same, failure, needs, slow), group in groups.items():
        status, fix = _judge(same, failure, needs, slow, threads, library, environ)
        findings.append(_finding(group, same, status, fix))
    return findings


def _judge(
    same: bool, failure: str, needs: bool, slow: bool, threads: bool, library: str, environ: Mapping[str, str]
) -> tuple[str, str]:
    """Status and fix of a group of links."""
    network = NETWORK.get(family(library), "name the network interface that joins the nodes to the MPI library")
    if failure:
        local = "see with ps whether the target runs, and is not stopped"
        return FAIL, local if same else f"{local}; name the interface that joins the nodes: {network}"
    if needs and same:
        return WARN, "unset MPIR_CVAR_NOLOCAL" if environ.get("MPIR_CVAR_NOLOCAL") else "--delivery background"
    if needs and not threads:
        return WARN, "an MPI that grants MPI_THREAD_MULTIPLE (see mpi.threads)"
    if slow:
        return WARN, "--wire bfloat16 halves a message" + ("" if same else f"; a faster network: {network}")
    return OK, ""


def _finding(group: Sequence[Link], same: bool, status: str, fix: str) -> Finding:
    path = "the same node" if same else "another node"
    first = group[0]
    ranks = tuple(sorted({link.origin for link in group}))
    if first.failure:
        named = ", ".join(f"{link.origin} -> {link.target}" for link in group[:8])
        message = f"links {named} on {path}: {first.failure}"
        return Finding("links.put", status, message, fix, _values(group, same), ranks)
    speed = _span([link.put_mb_per_s for link in group])
    atomic = _span([link.atomic_s * 1e6 for link in group])
    way = "done while the target computes (needs no progress thread)"
    if first.needs_progress:
        way = "done only when the target enters MPI (needs a progress thread there"
        way += ")" if status == WARN else ": --delivery auto runs one)"
    put = f"Put of {PAYLOAD_BYTES / 1e6:.1f} MB at {speed} MB/s"
    message = f"{len(group)} link(s) to {path}: {put}, {way}; Fetch_and_op {atomic} us"
    return Finding("links.put", status, message, fix, _values(group, same), ranks)


def _span(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):,.3g}", f"{max(numbers):,.3g}"
    low, high = (f"{float(text.replace(',', '')):,g}" for text in (low, high))
    return low if low == high else f"{low} to {high}"


def _values(group: Sequence[Link], same: bool) -> dict[str, Any]:
    found = []
    for link in group:
        entry: dict[str, Any] = {"origin": link.origin, "target": link.target, "same_node": same}
        if not link.failure:
            entry["put_mb_per_s"] = round(link.put_mb_per_s, 1)
            entry["fetch_and_op_us"] = round(link.atomic_s * 1e6, 2)
            entry["silent_put_s"], entry["silence_s"] = round(link.silent_s, 4), link.silence_s
            entry["needs_progress"] = link.needs_progress
        found.append(entry)
    return {"links": found}


def unmeasured(edges: Sequence[Edge], reason: str, fix: str) -> list[Finding]:
    """Links of which nothing is known."""
    if not edges:
        return []
    ranks = tuple(sorted({origin for origin, _ in edges}))
    message = f"{len(edges)} link(s) not measured: {reason}"
    return [Finding("links.unmeasured", WARN, message, fix, {"links": len(edges)}, ranks)]


def silent(ranks: Sequence[int], doing: str) -> list[Finding]:
    """Ranks that did not answer rank 0 in time."""
    if not ranks:
        return []
    fix = "see on their nodes whether they run (ps: state T is stopped, D waits for a file system), and dmesg"
    return [Finding("ranks.silent", FAIL, f"no answer while {doing}", fix, {}, tuple(sorted(ranks)))]


def clocks(offsets: Mapping[str, tuple[float, float] | None]) -> list[Finding]:
    """Whether the clocks of the nodes agree with rank 0's; by node the offset and its error bound in seconds."""
    if not offsets:
        return [Finding("clocks.offset", OK, "one node, one clock")]
    findings, apart = [], {node: found for node, found in offsets.items() if found is not None}
    within = {node: found for node, found in apart.items() if abs(found[0]) - found[1] <= CLOCKS_WITHIN_S}
    fix = "start the time service there (systemctl start chronyd), or read no message ages between these nodes"
    for node, (offset_s, error_s) in apart.items():
        if node not in within:
            message = f"the clock of {node} is {offset_s * 1e3:+,.0f} ms from rank 0's: message ages are wrong by that"
            values = {"node": node, "offset_s": round(offset_s, 6), "error_s": round(error_s, 6)}
            findings.append(Finding("clocks.offset", WARN, message, fix, values))
    if within:
        worst = max(abs(offset_s) for offset_s, _ in within.values())
        values = {"offsets_s": {node: round(found[0], 6) for node, found in within.items()}}
        message = f"{len(within)} other node(s) within {worst * 1e3:.2g} ms of rank 0's clock"
        findings.append(Finding("clocks.offset", OK, message, "", values))
    return findings
