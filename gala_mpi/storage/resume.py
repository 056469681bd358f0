"""Going on with a run: which checkpoint each rank takes, where counting goes on, and what is no longer as it was.

Ranks write their checkpoints when it suits them, and are killed when it suits nobody: those of a run differ by some
updates. Gossip needs no consistent cut. A rank averages with whatever its neighbours have sent, however old, so a set
of policies of different ages is one that the run could have come to by itself, had messages been late; a policy that
falls back by an interval is no staler than a neighbour's whose rank was stopped for as long. Under all-reduce all ranks
must have the same parameters and optimiser, and take them from one checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gala_mpi.config import ConfigError, TrainConfig, UsageError
from gala_mpi.mpi.collective import on_all_ranks
from gala_mpi.storage.checkpoint import (
    BEST,
    LARGEST_COUNT,
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    ranks_with_checkpoints,
    read,
)
from gala_mpi.storage.run_folder import LEFT_OUT

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

# What would make another run of it: its parameters, streams or metrics would not fit.
FIXED = ("env", "hidden", "seed", "sketch_every_s", "sketch_dimension")
MEANING = {
    "total_steps": "the learning rate's decay goes by the new budget",
    "budget": "how the budget is shared changes for what is left of it",
    "simulators": "rollouts are of another size, and the learning rate may scale with it",
    "rollout_steps": "rollouts are of another size",
    "exchange": "ranks share differently from here on (under allreduce all go on with one rank's policy)",
    "device": "draws of actions begin anew where streams are of another kind",
    "precision": "the network computes in it from here on",
    "progress_every_s": "progress is shown by it from here on",
}
BY_SECTION = {
    "run": "holds from here on",
    "environment": "the task is another from here on: compare no returns across it",
    "learner": "ranks learn with it from here on",
    "exchange": "ranks share with it from here on",
    "record": "metrics and checkpoints are kept by it from here on",
}


@dataclass(frozen=True)
class Resumption:
    """What a rank goes on from.

    `checkpoint` is the one whose streams and counters it takes, `learner` the one of its parameters and optimiser (the
    same but under all-reduce). `own` says that the checkpoint was this rank's: another's streams must not be drawn
    twice. `agent_steps` has where each rank's count begins, `updates` the update that each rank of before counts to.
    """

    checkpoint: Checkpoint
    learner: Checkpoint
    own: bool
    size_before: int
    agent_steps: list[int]
    updates: list[int]
    time_s: float


@dataclass(frozen=True)
class _Found:
    """The newest checkpoint of a rank that can be used, but for its tensors."""

    path: Path
    segment: int
    size: int
    update: int
    agent_steps: int
    total_steps: int
    time_s: float


def find_checkpoints(
    comm: Intracomm,
    run: Path,
    check: Callable[[Checkpoint], None],
    largest_bytes: int,
    warn: Callable[[str], None],
    *,
    synchronous: bool,
) -> Resumption | None:
    """What this rank goes on from, or None if no rank has left a checkpoint. Collective.

    `check` raises CheckpointError for what does not fit. Rank r takes the checkpoint of rank r modulo their number
    then. One that cannot be used is named by `warn`, and the one before it taken; raises UsageError, on all ranks, if
    no rank left any that can.
    """
    before: list[int] = comm.bcast(on_all_ranks(comm, lambda: _ranks_before(run) if comm.rank == 0 else []))

    def examine(path: Path) -> Checkpoint:
        checkpoint = read(path, largest_bytes)
        check(checkpoint)
        return checkpoint

    mine = on_all_ranks(comm, lambda: _examine(run, before[comm.rank :: comm.size], examine, warn))
    found: dict[int, _Found] = {}
    refused = 0
    for part, bad in comm.allgather(mine):
        found |= part
        refused += bad
    if not found and not refused:
        return None
    if not found:
        raise ConfigError(
            "resume", str(run), f"a run with a checkpoint that can be used, but none of its {refused} can"
        )
    last = max(found.values(), key=lambda one: one.segment)
    present = [rank for rank in sorted(found) if rank < last.size]
    source = comm.rank % last.size
    if source not in found:
        source = present[comm.rank % len(present)]
        warn(f"rank {comm.rank % last.size} left no checkpoint: rank {comm.rank} goes on from that of rank {source}")
    leader = max(present, key=lambda rank: (found[rank].segment, found[rank].update)) if synchronous else source

    def load() -> tuple[Checkpoint, Checkpoint]:
        try:
            checkpoint = examine(found[source].path)
            return checkpoint, checkpoint if leader == source else examine(found[leader].path)
        except CheckpointError as error:
            raise UsageError(f"--resume: {error}") from error

    checkpoint, learner = on_all_ranks(comm, load)
    current = {rank: one for rank, one in found.items() if one.segment == last.segment}
    if synchronous and _was_synchronous(learner):
        steps = [learner.facts.agent_steps * last.size // comm.size] * comm.size
        current = dict.fromkeys(range(last.size), found[leader])
    else:
        steps = _shares(current, max(one.total_steps for one in current.values()), last.size, comm.size, synchronous)
    return Resumption(
        checkpoint=checkpoint,
        learner=learner,
        own=source == comm.rank,
        size_before=last.size,
        agent_steps=steps,
        # Of a rank that left none all rows stay: its steps are counted.
        updates=[current[rank].update if rank in current else LARGEST_COUNT for rank in range(last.size)],
        time_s=max(one.time_s for one in current.values()),
    )


def _shares(found: dict[int, _Found], total: int, before: int, size: int, alike: bool) -> list[int]:
    """The steps that each rank counts from: its own, if ranks are as before, else equal shares of those of all.

    `found` has checkpoints of the last segment, of `before` ranks; `total` is the most that any rank knew of.
    """
    own = {rank: one.agent_steps for rank, one in found.items() if rank < before}
    # Steps after a checkpoint are lost with its rank, whoever knew of them. Of a rank that left none they all count.
    total = sum(own.values()) if len(own) == before else max(total, sum(own.values()))
    if size != before or alike:
        return [total // size] * size
    rest = (total - sum(own.values())) // max(size - len(own), 1)
    return [own.get(rank, rest) for rank in range(size)]


def _was_synchronous(checkpoint: Checkpoint) -> bool:
    exchange = checkpoint.facts.config.get("exchange")
    return isinstance(exchange, dict) and exchange.get("exchange") == "allreduce"


def _ranks_before(run: Path) -> list[int]:
    try:
        return ranks_with_checkpoints(run)
    except OSError as error:
        raise ConfigError("resume", str(run), f"a folder that can be read ({error.strerror})") from error


def _examine(
    run: Path, ranks: list[int], examine: Callable[[Path], Checkpoint], warn: Callable[[str], None]
) -> tuple[dict[int, _Found], int]:
    """The newest checkpoint of each of some ranks, and how many could not be used."""
    refused: list[CheckpointError] = []

    def usable(path: Path, rank: int) -> _Found | None:
        try:
            facts = examine(path).facts
            if facts.rank != rank:
                raise CheckpointError(f"{path}: cannot be used: it is one of rank {facts.rank}")
        except CheckpointError as error:
            refused.append(error)
            warn(str(error))
            return None
        about = (facts.segment, facts.size, facts.update, facts.agent_steps, facts.total_steps, facts.time_s)
        return _Found(path, *about)

    found: dict[int, _Found] = {}
    for rank in ranks:
        try:
            folder = CheckpointFolder(run, rank)
            paths, best = folder.newest_first(), list(folder.path.glob(BEST))
        except (CheckpointError, OSError) as error:
            raise UsageError(f"--resume: {error}") from error
        newest = next((one for path in paths if (one := usable(path, rank))), None)
        if newest is None or newest.path != paths[0]:
            # The best one may be newer than what is left of the others.
            left = [one for one in (newest, *(usable(path, rank) for path in best)) if one]
            newest = max(left, key=lambda one: (one.segment, one.update), default=None)
            if newest is not None:
                warn(f"rank {rank} goes on from {newest.path.name}, of update {newest.update}, instead")
        if newest is not None:
            found[rank] = newest
    return found, len(refused)


def check_changes(before: TrainConfig, now: TrainConfig, run: Path) -> list[str]:
    """A line for each setting that is no longer as it was in the run. Raises ConfigError for one that must be."""
    lines = []
    for section, old in before.as_dict().items():
        new: dict[str, Any] = now.as_dict()[section]
        for name, value in old.items():
            if name in LEFT_OUT or new[name] == value:
                continue
            if name in FIXED:
                raise ConfigError(name, new[name], f"{value!r}, as in the run in {run}")
            meaning = MEANING.get(name, BY_SECTION[section])
            lines.append(f"changed: --{name.replace('_', '-')} from {value} to {new[name]}: {meaning}")
    return lines
