"""Checkpoints: what a rank needs to go on, in one safetensors file, and the folder that a rank keeps them in.

A name stands for a whole file, whenever a rank is killed. Tensors go by name. Facts are JSON in the file's metadata,
and a digest there covers both. Nothing that is read is ever executed: no pickle, and a file that is not what it should
be raises CheckpointError. All is local.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gala_mpi.files import first_line, read_file, regular_file, sync_folder, write_file

FOLDER = "checkpoints"
FORMAT = 1
BEST = "best.safetensors"
RANK = re.compile(r"rank-(\d{5,9})")
NAME = re.compile(r"segment-(\d{1,9})-update-(\d{1,18})\.safetensors")
LARGEST_HEADER_BYTES = 16 * 2**20
NO_CHECKPOINT = "it is truncated, or no safetensors file"
# Sums of all ranks stay below the greatest integer of the metrics.
LARGEST_COUNT, MOST_RANKS = 2**43, 2**20
# Distances between parameters in float32 stay far below it.
LARGEST_SUM = 1e100
RECENT_EPISODES = 100

Tensors = Mapping[str, npt.NDArray[Any]]


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the text says which, and why."""


@dataclass(frozen=True)
class Facts:
    """All of a checkpoint that is no tensor. `time_s` is training time, sums are those of `schema`."""

    run_id: str
    segment: int
    rank: int
    size: int
    update: int
    agent_steps: int
    total_steps: int
    """Of all ranks together, as far as this one knew."""
    episodes: int
    time_s: float
    best_return: float
    recent: list[list[float]]
    """Seconds and return of this rank's last episodes, as far as RECENT_EPISODES."""
    counters: dict[str, float]
    seconds: dict[str, float]
    neighbours: dict[str, int]
    """The update of the last message of each in-neighbour."""
    config: dict[str, Any]

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """Raises ValueError if a fact is missing, of another type, or out of range."""
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("facts are nested too deeply") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f"the format is not {FORMAT}")
        expected = [field.name for field in dataclasses.fields(cls)]
        if sorted(values) != sorted(expected):
            raise ValueError(f"the facts are not {', '.join(expected)}")
        _check(values, str, "run_id")
        _check(values, dict, "counters", "seconds", "neighbours", "config")
        for name in ("segment", "rank", "size", "update", "agent_steps", "total_steps", "episodes"):
            _check_number(name, values[name], int)
        for name in ("time_s", "best_return"):
            values[name] = _check_number(name, values[name], float)
        if not 0 <= values["rank"] < values["size"] <= MOST_RANKS or not 0 <= values["time_s"] < LARGEST_COUNT:
            raise ValueError("rank, size or time_s is out of range")
        recent = values["recent"]
        if not isinstance(recent, list) or len(recent) > RECENT_EPISODES:
            raise ValueError(f"recent is no list of {RECENT_EPISODES} at most")
        for pair in recent:
            if (
                not isinstance(pair, list)
                or len(pair) != 2
                or not all(math.isfinite(_check_number("recent", value, float)) for value in pair)
            ):
                raise ValueError("recent is no list of pairs of numbers")
        for name in ("counters", "seconds"):
            for value in values[name].values():
                if LARGEST_SUM < abs(_check_number(name, value, float)) < math.inf:
                    raise ValueError(f"{name}: {value} is out of range")
        for key, value in values["neighbours"].items():
            _check_number("neighbours", value, int)
            if not re.fullmatch(r"[0-9]{1,7}", key):
                raise ValueError(f"neighbours: {key!r} is no rank")
        return cls(**values)

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})


def _check(values: dict[str, Any], kind: type, *names: str) -> None:
    for name in names:
        if not isinstance(values[name], kind):
            raise ValueError(f"{name} is no {kind.__name__}")


def _check_number(name: str, value: Any, kind: type) -> Any:
    """The value: an integer from 0 on as `int`, any number (infinite ones and NaN too) as `float`."""
    if type(value) is int and 0 <= value <= LARGEST_COUNT:
        return value
    if kind is float and (type(value) is float or (type(value) is int and abs(value) <= LARGEST_COUNT)):
        return value
    raise ValueError(f"{name}: {str(value)[:40]} is out of range")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read."""

    facts: Facts
    tensors: Tensors
    path: Path


def encode(tensors: Tensors, facts: Facts) -> bytes:
    """The bytes of a checkpoint."""
    text = facts.to_json()
    # The library stores memory as it lies: in the order of the shape, please.
    ordered = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    made: bytes = save(ordered, {"facts": text, "digest": _digest(text, ordered)})
    return made


def decode(data: bytes) -> tuple[Facts, Tensors]:
    """What `encode` was given. Raises ValueError for any bytes that it did not make."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(LARGEST_HEADER_BYTES, len(data) - 8):
        raise ValueError(NO_CHECKPOINT)
    try:
        tensors = load(data)
        metadata = _metadata(data[8 : 8 + length])
        text, digest = metadata["facts"], metadata["digest"]
        found = _digest(text, tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no checkpoint of gala-mpi ({first_line(error)})") from error
    if found != digest:
        raise ValueError("its content is not what was written (the digest differs)")
    return Facts.from_json(text), tensors


def _metadata(header: bytes) -> dict[str, Any]:
    """What a safetensors header says beside the tensors. Raises KeyError, TypeError, ValueError or RecursionError."""
    found: dict[str, Any] = json.loads(header)["__metadata__"]
    return found


def _digest(text: str, tensors: Tensors) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype.str}\0{tensor.shape}\0".encode())
        digest.update(tensor.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def read(path: Path, largest_bytes: int) -> Checkpoint:
    """Raises CheckpointError if it cannot be read, is larger than `largest_bytes`, or is no checkpoint."""
    try:
        facts, tensors = decode(read_file(path, largest_bytes))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be used: {first_line(error)}") from error
    return Checkpoint(facts, tensors, path)


def read_facts(path: Path) -> Facts:
    """The facts of a checkpoint alone, whose digest is not looked at. Raises CheckpointError."""
    try:
        # However large: no more than the header is read.
        with regular_file(path, LARGEST_COUNT) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER_BYTES:
                raise ValueError(NO_CHECKPOINT)
            return Facts.from_json(_metadata(file.read(length))["facts"])
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be used: {first_line(error)}") from error


class CheckpointFolder:
    """The checkpoints of one rank: the last `keep` of them, and the best.

    Raises CheckpointError if its folder, or the one above, is a link: what is written here stays in the run's folder.
    """

    def __init__(self, run: Path, rank: int, keep: int = 1) -> None:
        self.run, self.path = run, run / FOLDER / f"rank-{rank:05d}"
        self._keep = keep
        for folder in (self.path.parent, self.path):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise CheckpointError(f"{folder}: is a link or a file; expected a folder of the run itself")

    def newest_first(self) -> list[Path]:
        """The files by their names: of the last segment, the last update, first. Empty if there is no folder."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self.path.iterdir():
                if match := NAME.fullmatch(path.name):
                    found.append((int(match[1]), int(match[2]), path))
        return [path for _, _, path in sorted(found, reverse=True)]

    def save(self, tensors: Tensors, facts: Facts, *, best: bool) -> None:
        """Write a checkpoint, as the best one too if it is, and remove what is too old. Raises OSError."""
        data = encode(tensors, facts)
        # Not the run's own folder: if that is gone, so is all that a checkpoint belongs to.
        for folder in (self.path.parent, self.path):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                sync_folder(folder.parent)
        # A start that was taken for dead leaves alone what belongs to the one that went on.
        here = list(self.path.iterdir())
        superseded = any(int(match[1]) > facts.segment for path in here if (match := NAME.match(path.name)))
        if not superseded:
            # What killed writers left may be what fills the disk.
            self._remove(path for path in here if path.suffix == ".tmp")
        mine = self.path / f"segment-{facts.segment}-update-{facts.update:012d}.safetensors"
        write_file(mine, data)
        self._remove(path for path in self.newest_first()[self._keep :] if path != mine)
        if best and not superseded:
            write_file(self.path / BEST, data)

    @staticmethod
    def _remove(paths: Iterable[Path]) -> None:
        """What cannot be removed is in nobody's way."""
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()

    def best_return(self, largest_bytes: int, check: Callable[[Checkpoint], None]) -> float:
        """That of the best one; minus infinity if there is none that can be used. `check` raises CheckpointError."""
        try:
            checkpoint = read(self.path / BEST, largest_bytes)
            check(checkpoint)
        except CheckpointError:
            return -math.inf
        found = checkpoint.facts.best_return
        return found if math.isfinite(found) else -math.inf


def ranks_with_checkpoints(run: Path) -> list[int]:
    """Ranks that have a folder for checkpoints in a run, ascending."""
    folder, found = run / FOLDER, []
    if folder.is_dir() and not folder.is_symlink():
        found = [int(match[1]) for path in folder.iterdir() if (match := RANK.fullmatch(path.name))]
    return sorted(found)
