"""The checks that are worth making at the start of every run: what would ruin it, in less than a tenth of a second."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from gala_mpi.doctor.findings import FAIL, OK, Finding, merge
from gala_mpi.doctor.libraries import launch, singletons, windows
from gala_mpi.doctor.placement import by_node, on_one_core, placed
from gala_mpi.doctor.storage import judge_room, shared_memory
from gala_mpi.mpi.room import place_of_windows, room
from gala_mpi.mpi.window import why_no_windows

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def ruinous(comm: Intracomm, nbytes_needed_per_rank: int, out: Path | None, library: str = "") -> list[Finding]:
    """What would ruin a run, FAIL first, the same list on all ranks; empty if nothing would. Collective.

    `nbytes_needed_per_rank` is the size of this rank's windows, none of which is made yet; `out` is the run's
    folder, already made by one rank, or None; `library` is the MPI library's version string, which makes the
    fixes exact.
    """
    here = placed(platform.node(), os.environ)
    of_windows = place_of_windows(library, os.environ)
    found = room(of_windows)
    # Path's own is_dir raises where a folder above may not be entered.
    shown = out is None or os.path.isdir(out)  # noqa: PTH112
    facts = comm.allgather((here, found, nbytes_needed_per_rank, shown, out and room(out)))
    places = [fact[0] for fact in facts]
    launcher = launch(os.environ)
    findings = singletons(launcher, comm.size, library) + on_one_core(places, launcher, library)
    for ranks in by_node(places):
        need = sum(facts[rank][2] for rank in ranks)
        findings.append(shared_memory(facts[ranks[0]][1], need, ranks, library, of_windows))
        if not all(facts[rank][3] for rank in ranks):
            findings.append(_hidden(out, ranks))
        elif out is not None:
            findings.append(judge_room(str(out), "disk", facts[ranks[0]][4], ranks))
    if comm.size > 1 and not any(finding.check == "memory.shm" and finding.status == FAIL for finding in findings):
        findings.append(windows(why_no_windows(comm), library))
    bad = [finding for finding in merge(findings) if finding.status != OK]
    return sorted(bad, key=lambda finding: finding.status != FAIL)


def _hidden(out: Path | None, ranks: tuple[int, ...]) -> Finding:
    message = f"{out} is not there: every rank must write to the same folder"
    return Finding("output.shared", FAIL, message, "--out DIR on a file system that all nodes share", {}, ranks)
