"""The folder of a run: made, gone on in, or given back.

    run.json                what the run is: its id
    config.toml             the effective configuration; config.1.toml and so on of each later start, a segment
    lease.json              whether it goes on (see `lease`)
    rank-00000.h5           metrics of rank 0; segment-1/rank-00000.h5 and so on of each later segment
    checkpoints/rank-00000  checkpoints

A segment's number is taken by making its configuration, which fails if it is there: no file is ever written twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from gala_mpi.config import CONFIG_BYTES, ConfigError, TrainConfig, reaching, read_config
from gala_mpi.exit_codes import EXIT_HELD
from gala_mpi.files import first_line, read_file, write_new_file
from gala_mpi.mpi.collective import on_all_ranks
from gala_mpi.storage.lease import LEASE_FILE, End, HeldError, LeaseError, check_free, write_lease

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

RUN_FILE = "run.json"
OF_A_RUN = (RUN_FILE, "config.toml", "checkpoints")
# Belongs to one start of a run alone.
LEFT_OUT = ("preset", "out", "resume", "time_limit_s")
# Of files and folders, those of checkpoints too.
SEGMENT_OF = re.compile(
    r"config(?:\.(?P<later>\d{1,9}))?\.toml|rank-\d{5,9}\.h5|"
    r"segment-(?P<folder>\d{1,9})(?:-update-\d{1,18}\.safetensors)?"
)
LAST_SEGMENT = 10**9 - 1
SCRATCH = re.compile(r"(?:(?:config(?:\.\d{1,9})?\.toml|lease\.json|run\.json)\.[0-9a-f]{12}|rank-\d{5,9}\.h5)\.tmp")
A_RUN = "the folder of a run"


@dataclass(frozen=True)
class RunInfo:
    """What all ranks share about a run: made by rank 0, the same everywhere."""

    folder: Path
    made: list[Path]
    """The folder and those above it, as far as they are this start's making; deepest first."""
    run_id: str
    started: str
    segment: int
    before: End
    """How the segment before, if any, has ended."""


def config_file(folder: Path, segment: int) -> Path:
    """The configuration of a segment."""
    return folder / (f"config.{segment}.toml" if segment else "config.toml")


def rank_file(folder: Path, rank: int, segment: int = 0) -> Path:
    """The metrics of a rank and segment. A folder has no more files than ranks: later segments have their own."""
    return _metrics_folder(folder, segment) / f"rank-{rank:05d}.h5"


def _metrics_folder(folder: Path, segment: int) -> Path:
    return folder / f"segment-{segment}" if segment else folder


def holds_a_run(folder: Path) -> bool:
    """Whether there is something of a run."""
    return any(folder.glob("rank-*.h5")) or any((folder / name).exists() for name in OF_A_RUN)


def segments(folder: Path) -> list[int]:
    """The numbers of the segments that left something, ascending."""
    return _segments_of([*folder.iterdir(), *folder.glob("checkpoints/rank-*/segment-*")])


def _segments_of(paths: Iterable[Path]) -> list[int]:
    return sorted({int(m["later"] or m["folder"] or 0) for path in paths if (m := SEGMENT_OF.fullmatch(path.name))})


def create_run(config: TrainConfig, comm: Intracomm) -> RunInfo:
    """Make the run's folder, with the configuration in it, and give all ranks what they share. Collective."""
    return _shared(comm, lambda: _create(config))


def reopen_run(config: TrainConfig, comm: Intracomm) -> RunInfo:
    """Begin the next segment of the run that `config` resumes. Collective."""
    return _shared(comm, lambda: _reopen(config))


def _shared(comm: Intracomm, make: object) -> RunInfo:
    info = on_all_ranks(comm, lambda: make() if comm.rank == 0 else None)  # type: ignore[operator]
    shared: RunInfo = comm.bcast(info)
    return shared


def discard_run(info: RunInfo) -> None:
    """Take away what this start made, and the files without a row; what is not of it stays. Local."""
    metrics = _metrics_folder(info.folder, info.segment)
    for path in (config_file(info.folder, info.segment), *metrics.glob("rank-*.h5")):
        if SEGMENT_OF.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()
    if info.segment:
        _remove([metrics])
    else:
        for name in (RUN_FILE, LEASE_FILE):
            with contextlib.suppress(OSError):
                (info.folder / name).unlink()
    _remove(info.made)


def _remove(folders: list[Path]) -> None:
    """Remove folders, deepest first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _create(config: TrainConfig) -> RunInfo:
    out = config.record.out
    if out is None:
        task = re.sub(r"[^A-Za-z0-9]+", "-", config.environment.env).strip("-").lower()
        out = Path("runs") / f"{task}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    with reaching("out", out):
        out = out.absolute()
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
    info = RunInfo(out, made, uuid.uuid4().hex, _now(), segment=0, before=End())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # Of a link that leads nowhere, too.
        _remove(made)
        raise _not_written(config.record.out or out, error) from error
    try:
        # First, and only if it is not there: with it the folder is this run's.
        write_new_file(out / RUN_FILE, json.dumps({"run_id": info.run_id, "started": info.started}).encode())
    except FileExistsError as error:
        given = str(config.record.out or out)
        raise ConfigError("out", given, "a folder in which no other run begins just now") from error
    except OSError as error:
        _remove(made)
        raise _not_written(config.record.out or out, error) from error
    try:
        write_lease(out, info.run_id, 0)
        write_new_file(config_file(out, 0), as_toml(config).encode())
    except OSError as error:
        discard_run(info)
        raise _not_written(config.record.out or out, error) from error
    return replace(info, folder=out.resolve())


def _not_written(out: Path, error: OSError) -> ConfigError:
    return ConfigError("out", str(out), f"a folder that can be written ({error.strerror})")


def _reopen(config: TrainConfig) -> RunInfo:
    folder = config.run.resume
    assert folder is not None
    run_id = run_id_of(folder)
    with reaching("resume", folder):
        last = max(segments(folder), default=0)
    segment = last + 1
    if last >= LAST_SEGMENT:
        raise ConfigError("resume", str(folder), f"a run whose files have segments below {LAST_SEGMENT}")
    try:
        before = check_free(folder, last)
        write_new_file(config_file(folder, segment), as_toml(config).encode())
        try:
            write_lease(folder, run_id, segment)
        except OSError:
            config_file(folder, segment).unlink()
            raise
    except HeldError as error:
        raise _held(folder, f"a run that has ended; {error}") from error
    except LeaseError as error:
        raise ConfigError("resume", str(folder), f"a run that has ended; {error}") from error
    except FileExistsError as error:
        raise _held(folder, "a run that nobody else goes on with just now") from error
    except OSError as error:
        raise ConfigError("resume", str(folder), f"a folder that can be written ({error.strerror})") from error
    _tidy_up(folder, last)
    return RunInfo(folder.resolve(), [], run_id, _now(), segment, before)


def _held(folder: Path, allowed: str) -> ConfigError:
    """The refusal of a run that another start goes on with: a job may try again later."""
    error = ConfigError("resume", str(folder), allowed)
    error.exit_code = EXIT_HELD
    return error


def _tidy_up(folder: Path, last: int) -> None:
    """Remove what starts that were killed had not written whole; of metrics the last one's alone can be left."""
    for path in {*folder.glob("*.tmp"), *_metrics_folder(folder, last).glob("*.tmp")}:
        if SCRATCH.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def run_id_of(folder: Path, setting: str = "resume") -> str:
    """The run's id. Raises ConfigError, of the setting that gave it, if this is no run's folder."""
    try:
        about = json.loads(read_file(folder / RUN_FILE, CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(setting, str(folder), f"{A_RUN} ({RUN_FILE}: {first_line(error)})") from error
    run_id = about.get("run_id") if isinstance(about, dict) else None
    if not isinstance(run_id, str) or not re.fullmatch(r"[0-9a-f]{32}", run_id):
        raise ConfigError(setting, str(folder), f"{A_RUN} ({RUN_FILE} has no run_id)")
    return run_id


def saved_config(folder: Path, setting: str = "resume") -> TrainConfig | None:
    """The configuration of the run's last segment; None if the first start was killed before it had written any.

    Raises ConfigError, of the setting that gave the folder, if it cannot be read.
    """
    path = config_file(folder, 0)
    try:
        # Without the checkpoints: there may be many, of many ranks.
        begun = _segments_of(folder.iterdir())
        if not begun and not (folder / "checkpoints").exists():
            return None
        numbers = [number for number in begun if os.path.lexists(config_file(folder, number))]
        path = config_file(folder, max(numbers, default=0))
        text = read_file(path, CONFIG_BYTES).decode()
        if absent := [name for name in vars(TrainConfig()) if f"\n[{name}]\n" not in f"\n{text}"]:
            raise ValueError(f"it is not whole: it has no section [{absent[0]}]")
    except (OSError, ValueError) as error:
        raise ConfigError(setting, str(folder), f"{A_RUN} ({path.name}: {first_line(error)})") from error
    return read_config(text, setting, str(folder))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def as_toml(config: TrainConfig) -> str:
    """The effective configuration as a preset of its own; what belongs to this start alone is left out."""
    lines = ["# The effective configuration of this run; `--preset` reads it."]
    for section, values in config.as_dict().items():
        lines.append(f"\n[{section}]")
        for name, value in values.items():
            if value is not None and name not in LEFT_OUT:
                # JSON's numbers, strings, booleans and flat lists are TOML's too.
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"
