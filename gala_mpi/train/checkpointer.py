"""The checkpointer: gathers the state of a rank's parts into checkpoints, and gives it back to them. Local."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from gala_mpi.config import ConfigError
from gala_mpi.files import first_line
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.learning.environments import Episode
from gala_mpi.learning.learner import Learner
from gala_mpi.learning.rollout import Collector
from gala_mpi.stopwatch import Stopwatch
from gala_mpi.storage.checkpoint import (
    LARGEST_COUNT,
    RECENT_EPISODES,
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    Facts,
)
from gala_mpi.storage.resume import Resumption
from gala_mpi.storage.run_folder import run_id_of
from gala_mpi.storage.turns import next_turn_s, turn_s

if TYPE_CHECKING:
    from gala_mpi.gossip.exchange import Exchange
    from gala_mpi.train.board import Board

PARAMETERS, OPTIMISER = "parameters.", "optimiser."
# Fewer episodes do not tell which policy is the best.
ENOUGH_EPISODES = 20
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What has a state in a rank."""

    flat: FlatParameters
    learner: Learner
    collector: Collector
    exchange: Exchange
    board: Board
    stopwatch: Stopwatch


@dataclass(frozen=True)
class Identity:
    """What a rank's checkpoints are of."""

    run_id: str
    segment: int
    rank: int
    size: int
    config: dict[str, Any]


class Checkpointer:
    """Writes this rank's checkpoints every `every_s` seconds; ranks do so one after the other, not all at once."""

    def __init__(self, folder: CheckpointFolder, parts: Parts, identity: Identity, every_s: float) -> None:
        self._folder, self._parts, self._identity, self._every_s = folder, parts, identity, every_s
        self._next_s = -math.inf
        self._best_return = -math.inf
        self._recent: deque[list[float]] = deque(maxlen=RECENT_EPISODES)
        self._episodes = 0
        self.failing = False

    def note_episodes(self, episodes: list[Episode], time_s: float) -> None:
        """Add finished episodes of this rank."""
        self._episodes += len(episodes)
        self._recent.extend([time_s, episode.episode_return] for episode in episodes)

    def due(self, time_s: float) -> bool:
        """Whether the interval has passed."""
        return time_s >= self._next_s

    def turn_s(self, longest_s: float) -> float:
        """Seconds to this rank's turn at the start and at the end of a run, which are the same instant on all ranks."""
        nbytes = sum(values.nbytes for values in flat_tensors(self._parts.flat, self._parts.learner).values())
        return turn_s(self._identity.rank, self._identity.size, nbytes, longest_s)

    def save(self, update: int, agent_steps: int, time_s: float) -> None:
        """Write a checkpoint. What cannot be written is a warning, and tried again after the interval."""
        identity = self._identity
        # Ranks in step would each wait for all the others' checkpoints: there all write at once.
        phase = 0.0 if self._parts.exchange.synchronous else identity.rank / identity.size
        self._next_s = next_turn_s(time_s, self._every_s, phase)
        mean = sum(pair[1] for pair in self._recent) / max(len(self._recent), 1)
        best = len(self._recent) >= ENOUGH_EPISODES and mean > self._best_return
        parts = self._parts
        facts = Facts(
            **vars(identity),
            update=update,
            agent_steps=agent_steps,
            total_steps=max(parts.board.total_steps, agent_steps),
            episodes=self._episodes,
            time_s=time_s,
            best_return=mean if best else self._best_return,
            recent=list(self._recent),
            counters=vars(parts.exchange.counters).copy(),
            seconds=dict(parts.stopwatch.seconds),
            neighbours={str(neighbour.rank): neighbour.update for neighbour in parts.exchange.in_neighbours},
        )
        try:
            self._check_whose_folder()
            self._folder.save(self._tensors(), facts, best=best)
        except OSError as error:
            if not self.failing:
                log.warning(
                    "%s: no checkpoint can be written (%s); tried again every %g s, and at the end: make room, or put "
                    "the folder back",
                    self._folder.path,
                    first_line(error),
                    self._every_s,
                )
            self.failing = True
        else:
            if self.failing:
                log.warning("%s: checkpoints are written again", self._folder.path)
            self.failing, self._best_return = False, facts.best_return

    def _check_whose_folder(self) -> None:
        """Raise FileNotFoundError if another run has the place of this one's folder."""
        with contextlib.suppress(ConfigError):
            if run_id_of(self._folder.run) != self._identity.run_id:
                raise FileNotFoundError(errno.ENOENT, "another run has its place", str(self._folder.run))

    def _tensors(self) -> dict[str, npt.NDArray[Any]]:
        parts = self._parts
        found: dict[str, npt.NDArray[Any]] = {}
        for prefix, values in flat_tensors(parts.flat, parts.learner).items():
            named = parts.flat.by_name(values.cpu())
            found |= {prefix + name: value.numpy() for name, value in named.items()}
        return found | parts.collector.state()

    def restore(self, resumption: Resumption) -> bool:
        """Give the parts the state that they go on from. Only what was this rank's own goes on in full.

        Whether the simulators go on too.
        """
        parts, facts, learner = self._parts, resumption.checkpoint.facts, resumption.learner
        for prefix, values in flat_tensors(parts.flat, parts.learner).items():
            for name, view in parts.flat.by_name(values).items():
                view.copy_(torch.from_numpy(learner.tensors[prefix + name]))
        parts.learner.updates = learner.facts.update
        # Those that are kept are noted below.
        episodes = max(facts.episodes - len(facts.recent), 0) if resumption.own else 0
        parts.board.go_on_from(resumption.agent_steps, learner.facts.update, episodes)
        neighbours = {int(other): update for other, update in facts.neighbours.items()}
        parts.exchange.go_on_from(learner.facts.update, neighbours if resumption.own else {})
        check = partial(expect, parts.flat, parts.learner, self._identity.run_id)
        self._best_return = self._folder.best_return(largest_bytes(parts.flat), check)
        if not resumption.own:
            return False
        counters = parts.exchange.counters
        for field in dataclasses.fields(counters):
            value, kind = facts.counters.get(field.name, 0), type(getattr(counters, field.name))
            # Integers stay integers, and such as metrics can hold.
            if kind is float or 0 <= value <= LARGEST_COUNT:
                setattr(counters, field.name, kind(value))
        parts.stopwatch.seconds.update({p: s for p, s in facts.seconds.items() if p in parts.stopwatch.seconds})
        self._episodes = facts.episodes
        self._recent.extend(facts.recent)
        parts.board.note_episodes([Episode(0, episode_return, 0) for _, episode_return in facts.recent])
        return parts.collector.restore(resumption.checkpoint.tensors)


def flat_tensors(flat: FlatParameters, learner: Learner) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of each parameter: tensors (n,), by what their names begin with."""
    return {PARAMETERS: flat.data} | {f"{OPTIMISER}{name}.": values for name, values in learner.state.items()}


def expect(flat: FlatParameters, learner: Learner, run_id: str, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a checkpoint is not of this run, or its parameters are not these."""
    if checkpoint.facts.run_id != run_id:
        raise CheckpointError(
            f"{checkpoint.path}: cannot be used: it is of another run, {checkpoint.facts.run_id[:40]}"
        )
    for prefix in flat_tensors(flat, learner):
        for name, view in flat.by_name(flat.data).items():
            tensor = checkpoint.tensors.get(prefix + name)
            if tensor is None or tensor.shape != tuple(view.shape) or tensor.dtype != "float32":
                found = "is missing" if tensor is None else f"is {tensor.dtype} {tensor.shape}"
                raise CheckpointError(
                    f"{checkpoint.path}: cannot be used: {prefix + name} {found}, not float32 {tuple(view.shape)}"
                )
            if not np.isfinite(tensor).all():
                raise CheckpointError(f"{checkpoint.path}: cannot be used: {prefix + name} is not finite")


def largest_bytes(flat: FlatParameters) -> int:
    """What a checkpoint takes at most: parameters and the optimiser's state, and more than that again for the rest."""
    return 64 * 2**20 + 16 * flat.size
