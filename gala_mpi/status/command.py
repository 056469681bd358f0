"""Whether runs go on, or how they have ended, by what they wrote: gala-mpi status runs/pong

The exit code is the run's own, which launchers do not always pass on; of several runs the greatest. Local, without MPI.
"""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from gala_mpi import arguments
from gala_mpi.config import ConfigError, UsageError, at_home, reaching
from gala_mpi.exit_codes import (
    EXIT_DIVERGED,
    EXIT_ERROR,
    EXIT_HELD,
    EXIT_LOST,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_UNWRITTEN,
)
from gala_mpi.storage.checkpoint import CheckpointError, CheckpointFolder, ranks_with_checkpoints, read_facts
from gala_mpi.storage.lease import End, HeldError, LeaseError, how_it_ended
from gala_mpi.storage.run_folder import run_id_of, saved_config, segments

DESCRIPTION = """Say whether runs go on, or how they have ended: gala-mpi status runs/pong

Exit code: that of the run, as `gala-mpi train` gave it; 75 also for a run that was killed, 6 for one that goes on,
2 for a folder without a run. Of several runs: the greatest."""
RUN = "RUN"
KILLED, ENDED = "killed", "ended, by a version that did not note how"
MEANING = {
    EXIT_OK: "finished",
    EXIT_ERROR: "ended by an error",
    EXIT_LOST: "finished, but ranks were lost on the way",
    EXIT_DIVERGED: "finished, but ranks diverged",
    EXIT_UNWRITTEN: "ended, and could not write all",
    EXIT_STOPPED: "stopped by a signal",
    EXIT_HELD: "goes on",
}
# Of runs that have noted no end, so many are watched at once.
AT_ONCE = 64


@dataclass(frozen=True)
class StatusOptions:
    """What `gala-mpi status` can be told."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    json: bool = False
    """Print a line of JSON for each run instead of text."""
    only: tuple[Literal["code", "segment", "steps", "total_steps", "state"], ...] = ()
    """Print these alone, in this order, for scripts: `code` is the exit code, `segment` the number of the last start,
    from 0 on, and `state` has several words."""

    def __post_init__(self) -> None:
        if not self.run:
            raise UsageError("RUN: not given; usage: gala-mpi status RUN ... [OPTIONS]")
        object.__setattr__(self, "run", tuple(at_home(RUN, run) for run in self.run))


@dataclass(frozen=True)
class Status:
    """How a run stands. `steps` are agent steps of all ranks: at its end, or else at the last checkpoint."""

    run: str
    state: str
    code: int
    segment: int
    steps: int
    total_steps: int


def report(args: list[str]) -> tuple[str, int]:
    """What `gala-mpi status` prints, and its exit code. Raises UsageError for what is no run."""
    options = arguments.parse(StatusOptions, "status", DESCRIPTION, args)
    if len(options.run) == 1:
        found: list[Status | UsageError] = [status_of(options.run[0])]
    else:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(_status_or_why_not, options.run))
    lines = [_line(one, options) for one in found]
    return "\n".join(lines), max(one.exit_code if isinstance(one, UsageError) else one.code for one in found)


def help_text(_args: list[str]) -> str:
    """What `gala-mpi status --help` prints."""
    return arguments.help_text(StatusOptions, "status", DESCRIPTION)


def status_of(folder: Path) -> Status:
    """How the run in a folder stands. Takes some seconds if it has noted no end. Raises UsageError."""
    with reaching(RUN, folder):
        run_id_of(folder, RUN)
        last = max(segments(folder), default=0)
    config = saved_config(folder, RUN)
    total_steps = 0 if config is None else config.run.total_steps
    try:
        end = how_it_ended(folder, last)
    except HeldError:
        end = End(code=EXIT_HELD)
    except LeaseError as error:
        raise ConfigError(RUN, str(folder), f"the folder of a run ({error})") from error
    code = EXIT_STOPPED if end.code is None else end.code
    if end.code is None:
        state = ENDED if end.ended else KILLED
    else:
        state = MEANING.get(code, f"ended with exit code {code}")
    steps = _steps_of_checkpoints(folder) if end.steps is None else end.steps
    return Status(str(folder), state, code, last, steps, total_steps)


def _steps_of_checkpoints(folder: Path) -> int:
    """Steps of all ranks at the last checkpoint of the first rank that has one; 0 without any."""
    for rank in ranks_with_checkpoints(folder):
        try:
            for path in CheckpointFolder(folder, rank).newest_first():
                return read_facts(path).total_steps
        except (CheckpointError, OSError):
            continue
    return 0


def _status_or_why_not(folder: Path) -> Status | UsageError:
    """Among several there may be what is no run: a picture of them, say."""
    try:
        return status_of(folder)
    except UsageError as error:
        return error


def _line(one: Status | UsageError, options: StatusOptions) -> str:
    if isinstance(one, UsageError):
        return json.dumps({"error": str(one)}) if options.json else str(one)
    if options.only:
        return " ".join(str(getattr(one, name)) for name in options.only)
    if options.json:
        return json.dumps(dataclasses.asdict(one))
    starts = "1 start" if one.segment == 0 else f"{one.segment + 1:,} starts"
    onward = f"; goes on with --resume {one.run}" if one.code == EXIT_STOPPED else ""
    return (
        f"{one.run}: {one.state}, {one.steps:,} of {one.total_steps:,} steps, {starts} (exit code {one.code}){onward}"
    )
