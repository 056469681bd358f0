"""The recorder: one HDF5 file per rank, appended in batches, that a reader can follow while it grows.

Serial HDF5, no collective call. Every dataset is made before single-writer multiple-reader mode (SWMR) is
switched on, as none can be made after; from then on a killed run loses at most one flush interval.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gala_mpi.config import RecordConfig
from gala_mpi.schema import SCHEMA_VERSION, TABLES

CHUNK_BYTES = 64 * 1024


def rank_file(folder: Path, rank: int) -> Path:
    """The file of a rank in a run's folder."""
    return folder / f"rank-{rank:05d}.h5"


class Recorder:
    """Writes the tables of `schema` to a new file at `path`. Local.

    `attributes` become the root's attributes, dicts as JSON; `seed` is that of the sketches' hash. Raises
    FileExistsError if the file is there.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any], config: RecordConfig, seed: int) -> None:
        # Readers on shared file systems often cannot take HDF5's locks, and each file has one writer: no locks.
        self._file = h5py.File(path, "x", libver=("v110", "v110"), locking=False)
        self._file.attrs["schema"] = SCHEMA_VERSION
        for name, value in attributes.items():
            self._file.attrs[name] = json.dumps(value) if isinstance(value, dict) else value
        self._datasets: dict[str, Any] = {}
        self._rows: dict[str, list[tuple[Any, ...]]] = {}
        for table in TABLES:
            dtype = table.dtype(config.sketch_dimension)
            chunk = max(CHUNK_BYTES // dtype.itemsize, 1)
            dataset = self._file.create_dataset(table.name, (0,), dtype, maxshape=(None,), chunks=(chunk,))
            dataset.attrs["units"] = table.units()
            dataset.attrs["row"] = table.row_is
            dataset.attrs["meaning"] = json.dumps({column.name: column.meaning for column in table.columns})
            self._datasets[table.name], self._rows[table.name] = dataset, []
        self._datasets["sketches"].attrs.update(
            {"interval_s": config.sketch_every_s, "seed": seed, "dimension": config.sketch_dimension}
        )
        self._file.swmr_mode = True
        self._flush_every_s = config.flush_every_s
        self._flushed_at_s = time.monotonic()

    def append(self, table: str, row: tuple[Any, ...]) -> None:
        """Add a row, in the order of the table's columns; it reaches the file with the next flush."""
        self._rows[table].append(row)

    def flush_if_due(self) -> None:
        """Flush if the flush interval has passed."""
        if time.monotonic() - self._flushed_at_s >= self._flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Write all rows that wait to the file, and let readers see them."""
        for name, rows in self._rows.items():
            if rows:
                dataset = self._datasets[name]
                begin = len(dataset)
                dataset.resize((begin + len(rows),))
                dataset[begin:] = np.array(rows, dataset.dtype)
                dataset.flush()
                rows.clear()
        self._flushed_at_s = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        if self._file:
            self.flush()
            self._file.close()
