"""Reading a run's folder: the tables of all ranks and segments as one data frame each.

Reads files that are still being written, and files whose writer was killed. Needs h5py, NumPy and pandas only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import pandas as pd

SCHEMA_VERSION = 1
DEADLINE_S = 60.0
TABLES = ("updates", "episodes", "sketches", "neighbours")
# What the scripts cannot do without.
COLUMNS = {
    "updates": ("time_s", "update", "agent_steps"),
    "episodes": ("time_s", "update", "agent_steps", "episode_return"),
    "sketches": ("time_s", "update", "sketch"),
    "neighbours": ("time_s", "update", "rank"),
}
# In a rank's list of updates: of a rank whose checkpoints were gone.
NOT_ITS_OWN = 2**43
# Of steps and seconds: what the tables can hold.
LARGEST_NUMBER = 2.0**63
# Files that are missing are named up to so many.
NAMED = 20
FILE_NAME = re.compile(r"rank-(\d{5,9})\.h5")
# Of the folder of a start after the first; the first one's files lie in the run's own.
LATER = re.compile(r"segment-([1-9]\d{0,8})")


class RunError(Exception):
    """A folder that cannot be read as a run; the text is the one line that says why."""


@dataclass(frozen=True)
class Segment:
    """One start of a run: its ranks' files, and what it went on from, if it did.

    `resumed` is the attribute of that name. `begins[rank]` are the steps that each rank counted from.
    """

    number: int
    size: int
    files: dict[int, Path]
    resumed: dict[str, Any] | None
    begins: dict[int, int]

    def went_on(self, rank: int) -> int | None:
        """The update of its own that `rank` went on from, after which its rows of earlier segments are void.

        0 if the run began again, without a checkpoint; None in its first segment, and for a rank that took another's.
        """
        if self.resumed is None:
            return None
        if self.resumed["time_s"] == 0:
            return 0
        updates = self.resumed["updates"]
        return updates[rank] if rank < len(updates) and updates[rank] < NOT_ITS_OWN else None


@dataclass(frozen=True)
class Run:
    """A run: what its files share, and its segments in order. `size` is the number of ranks of the last one."""

    folder: Path
    run_id: str
    env_id: str
    config: dict[str, Any]
    segments: list[Segment]

    @property
    def size(self) -> int:
        """Ranks of the last segment."""
        return self.segments[-1].size

    @property
    def sizes(self) -> str:
        """The numbers of ranks of the segments, in words, each once where they follow each other."""
        sizes = [str(size) for size, _ in itertools.groupby(segment.size for segment in self.segments)]
        return f"{', then '.join(sizes)} rank{'' if sizes == ['1'] else 's'}"

    @property
    def missing(self) -> Iterator[str]:
        """The names of files that should be here."""
        for one in self.segments:
            for rank in range(one.size):
                if rank not in one.files:
                    yield f"segment-{one.number}/rank-{rank:05d}.h5" if one.number else f"rank-{rank:05d}.h5"

    def table(self, name: str) -> pd.DataFrame:
        """All rows of a table, rank by rank and segment by segment, with the writer's `rank` and the `segment`.

        In `neighbours`, whose own column `rank` is the sender, the writer's is `receiver`. Rows of training that was
        lost, since a later segment went on from before it, are left out.
        """
        writer = "receiver" if name == "neighbours" else "rank"
        frames = []
        for rank in sorted({rank for segment in self.segments for rank in segment.files}):
            for index, segment in enumerate(self.segments):
                if rank not in segment.files:
                    continue
                frame = _open(segment.files[rank], lambda file: _frame(_rows(file, name)))
                # Where a rank did not go on with what was its own, all its rows before stay, and updates count anew.
                own = itertools.takewhile(
                    lambda update: update is not None,
                    (later.went_on(rank) for later in self.segments[index + 1 :]),
                )
                frame = frame[frame["update"] <= min(own, default=math.inf)]
                frame.insert(0, writer, rank)
                frame.insert(1, "segment", segment.number)
                frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def unit(self, table: str, column: str) -> str:
        """The unit of a column, from the file."""
        files = self.segments[0].files
        return str(_open(files[min(files)], lambda file: json.loads(file[table].attrs["units"])[column]))

    def attributes(self, table: str) -> dict[str, Any]:
        """The attributes of a table in the first file."""
        files = self.segments[0].files
        return _open(files[min(files)], lambda file: dict(file[table].attrs))


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises RunError if there is none, or one that cannot be read."""
    if not folder.is_dir():
        raise RunError(f"{folder}: is no folder; expected the folder of a run")
    folders = {int(match[1]): path for path in folder.iterdir() if (match := LATER.fullmatch(path.name))}
    files = {number: found for number, path in {0: folder, **folders}.items() if (found := _ranks_of(path))}
    if not files:
        raise RunError(f"{folder}: no file rank-00000.h5 or the like; expected the folder of a run")
    segments, first = [], None
    for number, of_segment in sorted(files.items()):
        heads = {rank: _open(path, _head) for rank, path in sorted(of_segment.items())}
        head = heads[min(heads)]
        first = first or head
        for rank, other in heads.items():
            if other["run_id"] != first["run_id"]:
                raise RunError(
                    f"{of_segment[rank]}: belongs to run {other['run_id']}, others here to {first['run_id']}; expected "
                    "one run"
                )
        begins = {rank: other["resumed"]["agent_steps"] if other["resumed"] else 0 for rank, other in heads.items()}
        segments.append(Segment(number, head["size"], dict(sorted(of_segment.items())), head["resumed"], begins))
    assert first is not None
    run = Run(folder, first["run_id"], first["env_id"], first["config"], segments)
    if names := list(itertools.islice(run.missing, NAMED + 1)):
        more = " and others" if len(names) > NAMED else ""
        print(f"warning: {folder}: no file {', '.join(names[:NAMED])}{more}", file=sys.stderr)
    return run


def _ranks_of(folder: Path) -> dict[int, Path]:
    """The files of ranks in a segment's folder."""
    if not folder.is_dir():
        return {}
    return {int(match[1]): path for path in folder.iterdir() if (match := FILE_NAME.fullmatch(path.name))}


def _head(file: h5py.File) -> dict[str, Any]:
    """What this module needs of the root's attributes, once the file is known to follow a schema that it reads."""
    version = file.attrs.get("schema")
    if version != SCHEMA_VERSION:
        raise RunError(f"{file.filename}: schema {version} is unknown; expected {SCHEMA_VERSION}")
    for name in TABLES:
        # Only tables of the file itself: a link could point anywhere.
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise RunError(f"{file.filename}: table {name} is missing; expected {', '.join(TABLES)}")
    attributes = file.attrs
    resumed = json.loads(attributes["resumed"]) if "resumed" in attributes else None
    if resumed is not None:
        numbers = [resumed["time_s"], resumed["agent_steps"], *resumed["updates"]]
        if not all(type(number) in (int, float) and 0 <= number < LARGEST_NUMBER for number in numbers):
            raise ValueError("its attribute resumed is not what a run writes")
    size = int(attributes["size"])
    if not 0 < size < 10**6:
        raise ValueError(f"its attribute size is {size}")
    return {
        "run_id": str(attributes["run_id"]),
        "env_id": str(attributes["env_id"]),
        "size": size,
        "config": json.loads(attributes["config"]),
        "resumed": resumed,
    }


def _rows(file: h5py.File, name: str) -> np.ndarray:
    """All rows of a table, which must lie in this file, and be no more than it can hold."""
    table = file[name]
    if not isinstance(table, h5py.Dataset) or table.ndim != 1 or not table.dtype.names or table.dtype.hasobject:
        raise ValueError(f"{name} is no table")
    for column in COLUMNS.get(name, ("update",)):
        if column not in table.dtype.names:
            raise ValueError(f"{name} has no column {column}")
        # A sketch is a vector, all else a number.
        kind = table.dtype[column]
        if kind.base.kind not in "iuf" or kind.ndim != (column == "sketch"):
            raise ValueError(f"{name} has a column {column} of type {kind}")
    if table.external or table.is_virtual:
        raise ValueError(f"{name} takes its rows from other files")
    # Of a file that is being written the length may be known a little before the rows. A chunk is read whole.
    rows = max(len(table), *(table.chunks or (0,))) if len(table) else 0
    if rows * table.dtype.itemsize > Path(file.filename).stat().st_size + 2**20:
        raise ValueError(f"{name} declares {rows:,} rows, more than the file holds")
    return table[:]


def _open(path: Path, read: Callable[[h5py.File], Any]) -> Any:
    """What `read` gives of a file that may still be written."""
    if not path.is_file():
        raise RunError(f"{path}: cannot be read; expected an HDF5 file of a run")
    try:
        if not _left_open(path):
            with h5py.File(path, "r", locking=False) as file:
                return read(file)
        with _deadline(path), h5py.File(path, "r", swmr=True, locking=False) as file:
            return read(file)
    # What h5py raises depends on what is wrong with the file.
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, RecursionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"{path}: cannot be read; expected an HDF5 file of a run ({reason}); without it the others can be"
        ) from error


def _left_open(path: Path) -> bool:
    """Whether a file is being written, or its writer was killed: by the flags of its superblock (of version 3)."""
    with path.open("rb") as file:
        start = file.read(12)
    return start[:8] == b"\x89HDF\r\n\x1a\n" and len(start) == 12 and start[8] >= 3 and start[11] != 0


@contextlib.contextmanager
def _deadline(path: Path) -> Iterator[None]:
    """End the program if the block takes longer than DEADLINE_S.

    Of a file that may be written HDF5 reads a damaged part again and again, in hope of a better moment, without an end,
    and no other thread of Python runs meanwhile: another process must watch it.
    """
    reader, until_s = os.getpid(), time.monotonic() + DEADLINE_S
    watcher = os.fork()
    if watcher == 0:
        # Who has ended meanwhile needs no watcher, and another process has its place.
        while os.getppid() == reader:
            if time.monotonic() > until_s:
                complaint = f"error: {path}: cannot be read within {DEADLINE_S:g} s; expected an undamaged file\n"
                os.write(2, complaint.encode())
                os.kill(reader, signal.SIGKILL)
            time.sleep(0.05)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)


def _frame(rows: np.ndarray) -> pd.DataFrame:
    """A structured array as a data frame; vectors become one object a row."""
    columns = {name: list(rows[name]) if rows[name].ndim > 1 else rows[name] for name in rows.dtype.names or ()}
    return pd.DataFrame(columns)


def given_path(text: str) -> Path:
    """A path from the command line, with the user's home for `~`, which a shell leaves as it is in --out=~/figures."""
    if not text:
        raise argparse.ArgumentTypeError("'' cannot be used; expected the path of a folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used; expected a user that is known ({error})") from error


def names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's, with as many of those above as tell them all apart.

    Raises RunError if a run is given twice.
    """
    folders = [run.folder.resolve() for run in runs]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise RunError(f"{runs[index].folder}: is given twice; expected each run once")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def plain(text: str) -> str:
    """A text as it is, for a drawing, where $ would begin a formula and _ hide a line from the legend."""
    return ("./" if text.startswith("_") else "") + text.replace("$", r"\$")


def output(folder: Path, name: str) -> Path:
    """The path of a result. Raises RunError if something else has its name: a link may lead out of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise RunError(f"{folder}: cannot be written; expected a folder that can: --out names another")
    path = folder / name
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise RunError(f"{path}: is no file of its own; expected one, or none")
    return path


def say(*lines: object) -> None:
    """Print lines, if anybody takes them: the results are in files."""
    stream = sys.stdout
    if stream is None:
        return
    try:
        # Not every encoding has all letters of a folder's name.
        stream.reconfigure(errors="backslashreplace")
        print(*lines, sep="\n", flush=True)
    except OSError:
        # Nor is anything to be flushed at the end.
        sys.stdout = None  # type: ignore[assignment]


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function; a RunError, or an OSError, becomes one line and exit code 2."""
    try:
        main()
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
