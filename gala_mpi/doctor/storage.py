"""What a run needs of a node's file systems: /dev/shm for the windows, and a folder where HDF5 works as it is used.

The functions that judge are pure; those that look or write are local, and leave nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gala_mpi.doctor.findings import FAIL, OK, WARN, Finding
from gala_mpi.mpi.room import SHARED_MEMORY, TIGHT, Room, enlarge, in_words, room
from gala_mpi.units import in_units

# What MPI's own queues take there for each rank: 5 MB were seen with MPICH, which crashes without them.
QUEUES_BYTES = 8_000_000
SCARCE_BYTES = 1e9
# File systems that end with the node's memory or the container.
FLEETING = ("tmpfs", "ramfs", "overlay")
ROWS = 100
# A new folder may show late on another node of a network file system.
APPEARS_WITHIN_S = 3.0


def shared_memory(
    found: Room | None, need: int, ranks: tuple[int, ...], library: str, place: Path = SHARED_MEMORY
) -> Finding:
    """Whether the windows of a node's `ranks`, `need` bytes together, fit into their place."""
    if len(ranks) == 1:
        return Finding("memory.shm", OK, f"one rank on the node: no window in {place}", "", {}, ranks)
    values = {"need_bytes": need}
    message, fix = in_words(found, need, place), enlarge(found, need, library)
    if found is None:
        return Finding("memory.shm", FAIL, message, fix, values, ranks)
    values |= {"free_bytes": found.free, "total_bytes": found.total}
    if need > found.free:
        return Finding("memory.shm", FAIL, message, fix, values, ranks)
    if need > TIGHT * found.free:
        return Finding("memory.shm", WARN, f"{message}: tight", fix, values, ranks)
    return Finding("memory.shm", OK, message, "", values, ranks)


def too_small_to_start(found: Room | None, ranks: int) -> str:
    """Why MPI may crash as it starts `ranks` ranks on a node, in one line; empty if it will not for want of room."""
    need = QUEUES_BYTES * ranks
    if ranks == 1 or found is None or found.free >= need:
        return ""
    free = f"{in_units(found.free)} of {in_units(found.total)} of /dev/shm are free"
    return f"{free}: MPI may crash as it starts {ranks} ranks; fix: {enlarge(found, need, '')}"


def way_barred(pid: int) -> str:
    """What keeps MPICH from starting this process without a launcher, in one line; empty if nothing does.

    It names its shared memory by the process number alone. What a killed run left under that number makes it wait for
    ever, if it is this user's, and end else. What can be removed is: a process that still has it mapped needs no name.
    """
    for path in SHARED_MEMORY.glob(f"mpich_shm_{pid:x}_*"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            return (
                f"{path} of {_owner(path)}, left by a run that was killed, has the name that MPICH takes for this "
                f"process ({pid}), and cannot be removed ({error.strerror}): MPICH, if you use it, will not start; "
                "what helps: start again (the number is another one then), by mpirun -n 1, or have its owner remove it"
            )
    return ""


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "another user"


def anchor(out: Path) -> Path:
    """The nearest path at or above `out` that exists: where a run's folder would be made. Local."""
    path = out.absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def filesystem(path: Path, mounts: str) -> str:
    """Type of the file system that holds `path`, by the text of /proc/mounts."""
    kind, best = "unknown", -1
    for line in mounts.splitlines():
        fields = line.split(" ")
        # The kernel writes blanks in a mount point as \040.
        point = Path(fields[1].replace("\\040", " ")) if len(fields) > 2 else None
        # Later mounts hide earlier ones at the same place.
        if point is not None and path.is_relative_to(point) and len(point.parts) >= best:
            kind, best = fields[2], len(point.parts)
    return kind


def output_room(out: Path, ranks: tuple[int, ...]) -> Finding:
    """Type and free space of the output's file system. Local."""
    where = anchor(out)
    with contextlib.suppress(OSError):
        where = where.resolve()
    mounts = Path("/proc/mounts")
    kind = filesystem(where, mounts.read_text("utf-8", "replace") if mounts.exists() else "")
    return judge_room(str(out), kind, room(where), ranks)


def judge_room(out: str, kind: str, found: Room | None, ranks: tuple[int, ...]) -> Finding:
    """What the type and the free space of the output's file system mean for a run."""
    if found is None:
        return Finding("output.room", FAIL, f"{out} is on no file system", "--out DIR on another one", {}, ranks)
    values = {"type": kind, "free_bytes": found.free}
    message = f"{out} is on {kind}, {in_units(found.free)} free"
    if found.free < SCARCE_BYTES:
        message += ", which is little"
        return Finding(
            "output.room", WARN, message, f"free space there, or --out DIR elsewhere than {out}", values, ranks
        )
    if kind in FLEETING:
        message += ", which ends with the node or the container"
        return Finding("output.room", WARN, message, "--out DIR on a disk or a network file system", values, ranks)
    return Finding("output.room", OK, message, "", values, ranks)


def hdf5(out: Path, ranks: tuple[int, ...]) -> Finding:
    """Whether a file can be written there and followed while it is written, as the recorder does. Local."""
    # Not at the top: neither the start of training nor a test of the rest needs HDF5.
    import h5py

    try:
        with probe_folder(out) as folder:
            _follow(folder / "probe.h5")
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename:
            reason = error.strerror or reason
        message = f"no HDF5 file can be written and followed in {out} ({reason})"
        return Finding("output.hdf5", FAIL, message, "--out DIR where you may write, on another file system", {}, ranks)
    message = f"a SWMR file without locks is written and followed in {out} (HDF5 {h5py.version.hdf5_version})"
    return Finding("output.hdf5", OK, message, "", {"locking": False, "swmr": True}, ranks)


@contextlib.contextmanager
def probe_folder(out: Path) -> Iterator[Path]:
    """A new folder where `out` is or would be, removed at the end. Local."""
    where = anchor(out)
    if not where.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{where.name} is no folder", str(out))
    folder = Path(tempfile.mkdtemp(prefix=".gala-mpi-doctor-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _follow(path: Path) -> None:
    """Write rows as the recorder does, and read them in a second view of the file before it is closed."""
    import h5py
    import numpy as np

    with h5py.File(path, "x", libver=("v110", "v110"), locking=False) as file:
        rows = file.create_dataset("rows", (0,), "<f8", maxshape=(None,), chunks=(ROWS,))
        file.swmr_mode = True
        rows.resize((ROWS,))
        rows[:] = np.arange(ROWS)
        rows.flush()
        with h5py.File(path, "r", swmr=True, locking=False) as reader:
            if not np.array_equal(reader["rows"][:], np.arange(ROWS)):
                raise OSError("rows that were flushed cannot be read back")


def visible(folder: str, out: Path, ranks: tuple[int, ...]) -> Finding:
    """Whether a folder that rank 0 made where `out` is shows on this node too. Local."""
    deadline = time.monotonic() + APPEARS_WITHIN_S
    while not Path(folder).is_dir():
        if time.monotonic() > deadline:
            message = f"{out} is not the folder that rank 0 has: every rank must write to the same one"
            return Finding("output.shared", FAIL, message, "--out DIR on a file system that all nodes share", {}, ranks)
        time.sleep(0.05)
    return Finding("output.shared", OK, f"{out} is shared with the node of rank 0", "", {}, ranks)
