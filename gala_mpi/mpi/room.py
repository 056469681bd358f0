"""Whether a node has room for the windows of its ranks.

Windows of ranks that share a node lie in a file system of its memory, and take its pages as they are first written:
where there is none left, the process ends by SIGBUS, without a word. So whoever makes windows asks first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gala_mpi.config import UsageError
from gala_mpi.mpi.library import family
from gala_mpi.units import in_units

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

SHARED_MEMORY = Path("/dev/shm")
# Open MPI's own settings, which move its windows elsewhere: those of one node, and those of a job over several.
MOVED_BY = "OMPI_MCA_osc_sm_backing_directory"
FAR_ONES_MOVED_BY = "OMPI_MCA_osc_rdma_backing_directory"
# Beyond this share of what is free, other users of it (MPI's own queues, torch) may not find room.
TIGHT = 0.8


class NoRoomError(UsageError, MemoryError):
    """A node has no room for the windows of its ranks. Raised on all ranks; the text says what helps."""


@dataclass(frozen=True)
class Room:
    """Bytes of a file system: in all, and free for this user."""

    total: int
    free: int


def room(path: Path) -> Room | None:
    """The room of the file system at `path`; None if there is none. Local."""
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    return Room(stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize)


def place_of_windows(library: str, environ: Mapping[str, str]) -> Path:
    """Where the windows of a node's ranks lie, under the MPI library of that version string."""
    moved = environ.get(MOVED_BY) if family(library) == "openmpi" else None
    # If only those of one node are moved, a job may still have others.
    return Path(moved) if moved and environ.get(FAR_ONES_MOVED_BY) == moved else SHARED_MEMORY


def in_words(found: Room | None, need: int, place: Path) -> str:
    """What windows of `need` bytes together find at their place."""
    if found is None:
        return f"there is no {place}"
    return f"the windows need {in_units(need)} of {place}, {in_units(found.free)} of {in_units(found.total)} free"


def enlarge(found: Room | None, need: int, library: str) -> str:
    """How to make room for `need` bytes beside what is used already, by MPI's own queues among others."""
    used = 0 if found is None else found.total - found.free
    size = f"{-(-int(used + need / TIGHT) // 2**20)}m"
    fix = f"docker run --shm-size={size} (or --ipc=host); as root: mount -o remount,size={size} {SHARED_MEMORY}"
    if family(library) == "openmpi":
        fix += f"; or a local disk: export {MOVED_BY}=/tmp {FAR_ONES_MOVED_BY}=/tmp"
    return f"{fix}; or fewer ranks a node"


def ask_for_room(comm: Intracomm, leaders: Sequence[int], nbytes: int) -> None:
    """Raise NoRoomError, on all ranks, if some node has no room for windows of `nbytes` on each of its ranks.

    `leaders[r]` is the lowest rank of the node of rank r; `nbytes` may differ. Windows that are made already must have
    been written, so that they count as used. Collective.
    """
    # Not at the top: that import starts MPI, before which the command line looks at the room.
    from gala_mpi.mpi.window import library_version

    library = library_version()
    place = place_of_windows(library, os.environ)
    facts: list[tuple[int, Room | None]] = comm.allgather((nbytes, room(place)))
    needs = dict.fromkeys(leaders, 0)
    alone = dict.fromkeys(leaders, True)
    for rank, (leader, (need, _)) in enumerate(zip(leaders, facts, strict=True)):
        needs[leader] += need
        alone[leader] &= rank == leader
    for leader, need in needs.items():
        found = facts[leader][1]
        # The memory of a rank alone on its node is its own.
        if not alone[leader] and need and (found is None or need > found.free):
            raise NoRoomError(f"{in_words(found, need, place)}; what helps: {enlarge(found, need, library)}")
