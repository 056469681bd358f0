"""Reading a run's folder: the tables of all ranks and segments as one data frame each.

Reads files that are still being written, and files whose writer was killed. Needs h5py, NumPy and pandas only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import pandas as pd

SCHEMA_VERSION = 1
TABLES = ("updates", "episodes", "sketches", "neighbours")
FILE_NAME = re.compile(r"rank-(\d{5})(?:\.(\d+))?\.h5")


class RunError(Exception):
    """A folder that cannot be read as a run; the text is the one line that says why."""


@dataclass(frozen=True)
class Run:
    """A run: what its files share, and where they are. `files[rank]` are the rank's segments in order."""

    folder: Path
    run_id: str
    env_id: str
    size: int
    config: dict[str, Any]
    files: dict[int, list[Path]]

    @property
    def missing(self) -> list[int]:
        """Ranks of the run that left no file here."""
        return [rank for rank in range(self.size) if rank not in self.files]

    def table(self, name: str) -> pd.DataFrame:
        """All rows of a table, rank by rank and segment by segment, with the column `rank` of the writer.

        In `neighbours`, whose own column `rank` is the sender, the writer's is `receiver`.
        """
        writer = "receiver" if name == "neighbours" else "rank"
        frames = []
        for rank, segments in sorted(self.files.items()):
            for path in segments:
                frame = _frame(_open(path, lambda file: file[name][:]))
                frame.insert(0, writer, rank)
                frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def units(self, table: str) -> dict[str, str]:
        """Column -> unit, from the file."""
        first = self.files[min(self.files)][0]
        units: dict[str, str] = json.loads(_open(first, lambda file: file[table].attrs["units"]))
        return units

    def attributes(self, table: str) -> dict[str, Any]:
        """The attributes of a table in the first file."""
        first = self.files[min(self.files)][0]
        return _open(first, lambda file: dict(file[table].attrs))


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises RunError if there is none, or one that cannot be read."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; expected the folder of a run")
    files: dict[int, list[tuple[int, Path]]] = {}
    for path in folder.iterdir():
        match = FILE_NAME.fullmatch(path.name)
        if match:
            files.setdefault(int(match[1]), []).append((int(match[2] or 0), path))
    if not files:
        raise RunError(f"{folder}: no file rank-00000.h5 or the like; expected the folder of a run")
    ordered = {rank: [path for _, path in sorted(segments)] for rank, segments in sorted(files.items())}
    heads = {path: _open(path, _head) for segments in ordered.values() for path in segments}
    first = next(iter(heads.values()))
    for path, head in heads.items():
        if head["run_id"] != first["run_id"]:
            raise RunError(
                f"{path}: belongs to run {head['run_id']}, others here to {first['run_id']}; expected one run"
            )
    run = Run(folder, first["run_id"], first["env_id"], int(first["size"]), json.loads(first["config"]), ordered)
    if run.missing:
        print(f"warning: {folder}: no file of rank {', '.join(map(str, run.missing))}", file=sys.stderr)
    return run


def _head(file: h5py.File) -> dict[str, Any]:
    """The root's attributes, once the file is known to follow a schema that this module reads."""
    version = file.attrs.get("schema")
    if version != SCHEMA_VERSION:
        raise RunError(f"{file.filename}: schema {version} is unknown; expected {SCHEMA_VERSION}")
    for name in TABLES:
        # Only tables of the file itself: a link could point anywhere.
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise RunError(f"{file.filename}: table {name} is missing; expected {', '.join(TABLES)}")
    return dict(file.attrs)


def _open(path: Path, read: Callable[[h5py.File], Any]) -> Any:
    """What `read` gives of a file that may still be written."""
    try:
        with h5py.File(path, "r", swmr=True, locking=False) as file:
            return read(file)
    except (OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"{path}: cannot be read; expected an HDF5 file of a run ({reason})") from error


def _frame(rows: np.ndarray) -> pd.DataFrame:
    """A structured array as a data frame; vectors become one object a row."""
    columns = {name: list(rows[name]) if rows[name].ndim > 1 else rows[name] for name in rows.dtype.names or ()}
    return pd.DataFrame(columns)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function; a RunError becomes one line and exit code 2."""
    try:
        main()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
