"""The doctor's examination of a job: every rank says what it sees, rank 0 judges it.

In this order: what each rank knows of itself, what the first rank of each node finds there, the clocks, the links.
A rank that does not answer ends the examination, with what is known by then.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gala_mpi.doctor import devices, libraries, links, placement, storage, verdicts
from gala_mpi.doctor.findings import OK, WARN, Finding, merge
from gala_mpi.doctor.peers import Peers
from gala_mpi.gossip.topology import Topology
from gala_mpi.mpi.room import place_of_windows, room

PACKAGES = ("gala-mpi", "torch", "mpi4py", "h5py", "numpy", "ale-py")
FACTS, PLAN, CHECKED, ROUNDS, MEASURED = range(1, 6)


@dataclass(frozen=True)
class Facts:
    """What a rank knows of itself."""

    placed: placement.Placed
    thread_level: str
    library: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What rank 0 made of all facts: the node of every rank, and a folder of its own where `out` would be."""

    nodes: tuple[str, ...]
    probe: str

    def firsts(self) -> dict[str, int]:
        """The first rank of every node, which looks at the node for all of its ranks."""
        return {node: self.nodes.index(node) for node in dict.fromkeys(self.nodes)}

    def ranks_of(self, node: str) -> tuple[int, ...]:
        """The ranks of a node."""
        return tuple(rank for rank, other in enumerate(self.nodes) if other == node)


class Examination:
    """One examination of the job, over the topology that there is among its nodes.

    `nodes[r]` is the node of rank r, once it is known. Not `healthy`: some rank or link is silent.
    """

    def __init__(self, parameters: int, out: Path, topology: Callable[[Sequence[str]], Topology], peers: Peers) -> None:
        self._parameters, self._out, self._topology = parameters, out, topology
        self._edges: list[links.Edge] = []
        self._peers, self._watch, self._rank = peers, peers.watch, peers.comm.rank
        self._here = own_facts()
        self.nodes: tuple[str, ...] = ()
        self.healthy = True

    def findings(self) -> list[Finding]:
        """All findings on rank 0, a part of them elsewhere. All ranks call it."""
        self._watch.doing = "asking all ranks where they are"
        facts: list[Facts | None] = self._peers.gather(self._here, FACTS, self._watch.patience_s())
        known = [fact for fact in facts if fact is not None]
        found = judge_facts(known) if self._rank == 0 else []
        found += verdicts.silent(sorted(self._peers.silent), self._watch.doing)
        with self._probe() as probe:
            # Without knowing who is where, the rest has no ground.
            nodes = () if self._peers.silent else tuple(fact.placed.node for fact in known)
            plan: Plan = self._peers.tell_all(Plan(nodes, probe), PLAN)
            self.nodes = plan.nodes
            if not plan.nodes:
                self.healthy = False
                return found
            graph = self._topology(plan.nodes)
            self._edges = [(origin, target) for origin in range(graph.size) for target in graph.out_neighbours(origin)]
            found += self._look_at_nodes(plan)
        found += self._compare_clocks(plan)
        return found + self._measure_links(found)

    @contextlib.contextmanager
    def _probe(self) -> Iterator[str]:
        """On rank 0 a folder for the other nodes to look for; empty if none can be made, and elsewhere."""
        with contextlib.ExitStack() as stack:
            probe = ""
            if self._rank == 0:
                with contextlib.suppress(OSError):
                    probe = str(stack.enter_context(storage.probe_folder(self._out)).resolve())
            yield probe

    def _look_at_nodes(self, plan: Plan) -> list[Finding]:
        """What the first rank of every node finds there; on rank 0 of all nodes."""
        watch, node, library = self._watch, plan.nodes[self._rank], self._here.library
        found: list[Finding] = []
        if plan.firsts()[node] == self._rank:
            ranks = plan.ranks_of(node)
            watch.doing = f"looking at /dev/shm and the GPUs of {node}"
            need = sum(need_bytes(self._parameters, self._edges, self._ways(plan.nodes), ranks))
            place = place_of_windows(library, os.environ)
            found.append(storage.shared_memory(room(place), need, ranks, library, place))
            found += devices.devices(ranks, library)
            watch.doing = f"writing to {self._out} on {node}"
            found += [storage.output_room(self._out, ranks), storage.hdf5(self._out, ranks)]
            if plan.probe and self._rank:
                found.append(storage.visible(plan.probe, self._out, ranks))
        watch.doing = "waiting for what the nodes find on themselves"
        gathered = self._peers.gather(found, CHECKED, watch.left_s() / 2)
        return [finding for of_rank in gathered for finding in of_rank or []]

    def _ways(self, nodes: Sequence[str]) -> Sequence[str]:
        """The nodes, for ranks whose messages to others a courier can carry; else as if all were on one."""
        return nodes if self._here.thread_level == "multiple" else [""] * len(nodes)

    def _compare_clocks(self, plan: Plan) -> list[Finding]:
        """On rank 0 how far the clocks of the other nodes are from its own."""
        others = {node: rank for node, rank in plan.firsts().items() if rank}
        if self._rank in others.values():
            links.answer_clock(self._peers)
        offsets = {}
        for node, other in others.items() if self._rank == 0 else ():
            self._watch.doing = f"comparing the clock of {node}"
            if other not in self._peers.silent:
                offsets[node] = links.clock_offset(self._peers, other)
                if offsets[node] is None:
                    self._peers.silent.add(other)
        return verdicts.clocks(offsets) if self._rank == 0 else []

    def _measure_links(self, found: Sequence[Finding]) -> list[Finding]:
        """On rank 0 the speed and the behaviour of all links, or why they are not known."""
        peers, watch = self._peers, self._watch
        refusal = "some ranks do not answer" if peers.silent else links.no_room(found)
        rounds = [] if refusal else links.rounds_of(self._edges, self.nodes)
        fitting = max(int(watch.left_s() / 2 / links.ROUND_S), 1)
        rounds, go = peers.tell_all((rounds[:fitting], not peers.silent), ROUNDS)
        mine = links.Measured([], complete=False, windows=None)
        if go:
            mine = links.measure(peers, rounds, self._here.thread_level == "multiple")
        watch.doing = "collecting what was measured"
        all_ranks: list[links.Measured | None] = peers.gather(mine, MEASURED, watch.left_s() / 2)
        answers = [answer for answer in all_ranks if answer is not None] or [mine]
        self.healthy = not peers.silent and all(answer.complete for answer in answers)
        if self._rank:
            return []
        if not self.healthy:
            refusal = refusal or "another link or rank did not answer"
        return self._judge_links([link for answer in answers for link in answer.links], mine.windows, refusal)

    def _judge_links(self, measured: list[links.Link], windows: str | None, refusal: str) -> list[Finding]:
        """Findings on the links that were measured, on those that were not, and on ranks that fell silent."""
        library, threads = self._here.library, self._here.thread_level == "multiple"
        seen = {(link.origin, link.target) for link in measured}
        left = [edge for edge in self._edges if edge not in seen]
        if windows:
            refusal = "windows cannot be used here"
        fix = "mend what fails first" if refusal else "a larger --deadline-s"
        return [
            *([] if windows is None else [libraries.windows(windows, library)]),
            *verdicts.links(measured, self.nodes, threads, library, os.environ),
            *verdicts.unmeasured(left, refusal or "all would take longer than --deadline-s allows", fix),
            *verdicts.silent(sorted(self._peers.silent), "the examination went on"),
        ]


def judge_facts(facts: Sequence[Facts]) -> list[Finding]:
    """Findings from what the ranks know of themselves."""
    places = [fact.placed for fact in facts]
    nodes = [place.node for place in places]
    library, launched = facts[0].library, libraries.launch(os.environ)
    levels = {fact.thread_level for fact in facts}
    return [
        Finding("mpi.library", OK, " ".join(library.split("\n", 1)[0].split()), "", {"version": library}),
        *(libraries.thread_level(level, len(set(nodes)), library, os.environ) for level in sorted(levels)),
        *libraries.lost_ranks(len(set(nodes)), library, os.environ),
        *libraries.ranks(launched, nodes, library),
        *placement.bindings(places, launched, library),
        *placement.threads(places),
        *versions([fact.versions for fact in facts]),
    ]


def own_facts() -> Facts:
    """What this rank knows of itself. Local."""
    from mpi4py import MPI

    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    library = MPI.Get_library_version().strip("\x00 \n")
    here = placement.placed(platform.node(), os.environ)
    return Facts(here, levels[MPI.Query_thread()], library, installed())


def installed() -> dict[str, str]:
    """Versions of Python and of what a run needs; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def versions(found: Sequence[dict[str, str]]) -> list[Finding]:
    """Versions on all ranks, which must not differ."""
    same = all(versions == found[0] for versions in found)
    findings = []
    for rank, mine in enumerate(found):
        missing = [name for name in PACKAGES if name not in mine]
        message = ", ".join(f"{name} {version}" for name, version in mine.items())
        where = () if same else (rank,)
        if missing:
            fix = f"pip install {' '.join(missing)}"
            findings.append(Finding("versions.packages", WARN, f"{', '.join(missing)} missing", fix, {}, where))
        elif not same:
            fix = f"one environment for all nodes, such as rank 0's {sys.prefix} on a network file system"
            findings.append(Finding("versions.packages", WARN, f"ranks differ: {message}", fix, mine, where))
        else:
            findings.append(Finding("versions.packages", OK, message, "", mine, where))
    return merge(findings)


def need_bytes(parameters: int, edges: Sequence[links.Edge], nodes: Sequence[str], ranks: Sequence[int]) -> list[int]:
    """Bytes of the windows of `ranks`, on `nodes`, for gossip of so many float32 parameters."""
    from gala_mpi.gossip.mailboxes import gossip_bytes

    inline = Counter(target for origin, target in edges if nodes[origin] == nodes[target])
    carried = Counter(target for origin, target in edges if nodes[origin] != nodes[target])
    return [gossip_bytes(4 * parameters, inline[rank], carried[rank]) for rank in ranks]
