"""The recorder: one HDF5 file per rank, appended in batches, that a reader can follow while it grows.

Serial HDF5, no collective call. Every dataset is made before single-writer multiple-reader mode (SWMR) is
switched on, as none can be made after; from then on a killed run loses at most one flush interval.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gala_mpi.config import RecordConfig
from gala_mpi.files import first_line, give_back, give_new_name, set_aside
from gala_mpi.storage.schema import SCHEMA_VERSION, TABLES

CHUNK_BYTES = 64 * 1024
# Of each table: what waits while the disk is full.
KEPT_ROWS = 100_000
# For what HDF5 keeps beside the rows.
ROOM_BYTES = 64 * 1024
log = logging.getLogger(__name__)


class Recorder:
    """Writes the tables of `schema` to a new file at `path`. Local.

    `attributes` become the root's attributes, dicts as JSON; `seed` is that of the sketches' hash. `phase` is the share
    of a flush interval by which the first flush comes earlier: many ranks are not to flush at once. Raises
    FileExistsError if the file is there.

    What cannot be written later (a full disk, say) is kept, as far as KEPT_ROWS, and tried again with the next flush;
    the file then is as after the last one that succeeded.
    """

    def __init__(
        self, path: Path, attributes: Mapping[str, Any], config: RecordConfig, seed: int, phase: float = 0.0
    ) -> None:
        # Readers on shared file systems often cannot take HDF5's locks, and each file has one writer: no locks.
        # Until readers may follow it, what a killed rank left could not be opened: it has another name till then.
        scratch = path.with_name(f"{path.name}.tmp")
        scratch.unlink(missing_ok=True)
        self._datasets: dict[str, Any] = {}
        self._rows: dict[str, list[tuple[Any, ...]]] = {}
        self._columns: dict[str, dict[str, None]] = {}
        try:
            self._file = h5py.File(scratch, "x", libver=("v110", "v110"), locking=False)
            self._lay_out(attributes, config, seed)
            self._file.swmr_mode = True
            give_new_name(scratch, path)
        # h5py raises either, for want of space too.
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError, RuntimeError, AttributeError):
                self._file.close()
            scratch.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise
            raise OSError(errno.EIO, first_line(error), str(path)) from error
        self._path, self._place = path, path.stat()
        self._flush_every_s = config.flush_every_s
        self._flushed_at_s = time.monotonic() - phase * config.flush_every_s
        self._failing = False
        self.dropped_rows = 0

    def _lay_out(self, attributes: Mapping[str, Any], config: RecordConfig, seed: int) -> None:
        """Make all attributes and datasets."""
        self._file.attrs["schema"] = SCHEMA_VERSION
        for name, value in attributes.items():
            self._file.attrs[name] = json.dumps(value) if isinstance(value, dict) else value
        for table in TABLES:
            dtype = table.dtype(config.sketch_dimension)
            chunk = max(CHUNK_BYTES // dtype.itemsize, 1)
            dataset = self._file.create_dataset(table.name, (0,), dtype, maxshape=(None,), chunks=(chunk,))
            dataset.attrs["units"] = table.units()
            dataset.attrs["row"] = table.row_is
            dataset.attrs["meaning"] = json.dumps({column.name: column.meaning for column in table.columns})
            self._datasets[table.name], self._rows[table.name] = dataset, []
            self._columns[table.name] = dict.fromkeys(column.name for column in table.columns)
        self._datasets["sketches"].attrs.update(
            {"interval_s": config.sketch_every_s, "seed": seed, "dimension": config.sketch_dimension}
        )

    def append(self, table: str, /, **row: Any) -> None:
        """Add a row, which gives each column of the table its value; it reaches the file with the next flush.

        Raises ValueError for a column that is left out, or that the table does not have.
        """
        names = self._columns[table]
        if row.keys() != names.keys():
            missing, unknown = sorted(names.keys() - row.keys()), sorted(row.keys() - names.keys())
            raise ValueError(f"a row of {table}: columns without values: {missing}; values without columns: {unknown}")
        self._rows[table].append(tuple([row[name] for name in names]))

    def flush_if_due(self) -> None:
        """Flush if the flush interval has passed."""
        if time.monotonic() - self._flushed_at_s >= self._flush_every_s:
            self.flush()

    def flush(self) -> bool:
        """Write all rows that wait to the file, and let readers see them. False, with a warning, if that failed."""
        self._flushed_at_s = time.monotonic()
        try:
            waiting = sum(len(rows) * self._datasets[name].dtype.itemsize for name, rows in self._rows.items())
            # HDF5 does not always get over a write that failed: rather begin none.
            set_aside(self._handle(), waiting + len(TABLES) * CHUNK_BYTES + ROOM_BYTES)
            for name, rows in self._rows.items():
                if rows:
                    self._extend(self._datasets[name], np.array(rows, self._datasets[name].dtype))
                    rows.clear()
            here = self._path.stat()
            if (here.st_ino, here.st_dev) != (self._place.st_ino, self._place.st_dev):
                raise FileNotFoundError("another file has its name")
        # h5py raises either, for want of space too.
        except (OSError, RuntimeError) as error:
            self._keep_waiting(error)
            return False
        if self._failing:
            log.warning("%s: is written again (%d rows were lost meanwhile)", self._path, self.dropped_rows)
            self._failing = False
        return True

    def _handle(self) -> int:
        """The descriptor by which HDF5 writes the file."""
        handle: int = self._file.id.get_vfd_handle()
        return handle

    @staticmethod
    def _extend(dataset: Any, rows: np.ndarray) -> None:
        begin = len(dataset)
        try:
            dataset.resize((begin + len(rows),))
            dataset[begin:] = rows
            dataset.flush()
        except BaseException:
            # What failed may have made room for rows that are not there: no reader is to see those.
            with contextlib.suppress(OSError, RuntimeError):
                dataset.resize((begin,))
                dataset.flush()
            raise

    def _keep_waiting(self, error: Exception) -> None:
        """Note that rows could not be written, and keep the newest of them."""
        for rows in self._rows.values():
            self.dropped_rows += max(len(rows) - KEPT_ROWS, 0)
            del rows[:-KEPT_ROWS]
        if not self._failing:
            self._failing = True
            log.warning(
                "%s: metrics cannot be written (%s); the run goes on, and tries again every %g s: make room, or put "
                "the folder back",
                self._path,
                first_line(error),
                self._flush_every_s,
            )

    def close(self) -> bool:
        """Flush and close the file; whether all rows are in it."""
        if not self._file:
            return not self._failing
        written = self.flush()
        own = os.dup(self._handle())
        # Closing a file on a full disk may fail as well: what was flushed stays readable.
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()
        with contextlib.suppress(OSError):
            give_back(own)
        os.close(own)
        return written and not self.dropped_rows
