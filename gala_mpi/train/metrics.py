"""A rank's metrics: which values of its parts go into which row, and what its file says of the run. Local."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from gala_mpi import __version__, _native
from gala_mpi.config import ConfigError, TrainConfig
from gala_mpi.gossip.exchange import Exchange
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.learning.environments import Episode
from gala_mpi.learning.learner import Losses
from gala_mpi.learning.stalls import StallWatch
from gala_mpi.mpi.window import library_version
from gala_mpi.stopwatch import LEARN, ROLLOUT, Stopwatch
from gala_mpi.storage.recorder import Recorder
from gala_mpi.storage.run_folder import RunInfo, rank_file

PACKAGES = ("torch", "mpi4py", "gymnasium", "ale-py", "numpy", "h5py")


def open_recorder(config: TrainConfig, info: RunInfo, about: Mapping[str, Any]) -> Recorder:
    """The recorder of a new file of `about["rank"]`, with `about` among its attributes.

    Raises ConfigError if the file cannot be made.
    """
    attributes = {
        **about,
        "run_id": info.run_id,
        "segment": info.segment,
        "started": info.started,
        "node": platform.node(),
        "env_id": config.environment.env,
        "config": config.as_dict(),
        "mpi_library": library_version(),
        "versions": {
            "gala-mpi": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }
    try:
        path = rank_file(info.folder, about["rank"], info.segment)
        if info.segment:
            path.parent.mkdir(exist_ok=True)
        return Recorder(path, attributes, config.record, config.run.seed, about["rank"] / about["size"])
    except OSError as error:
        allowed = f"a folder that {platform.node()} can write ({error})"
        raise ConfigError("out", str(info.folder), allowed) from error


class Metrics:
    """Gives a recorder its rows. Sketches are drawn at the instants after `begin_s` seconds of training."""

    def __init__(
        self,
        recorder: Recorder,
        config: TrainConfig,
        flat: FlatParameters,
        exchange: Exchange,
        stopwatch: Stopwatch,
        begin_s: float,
        watch: StallWatch | None,
    ) -> None:
        self._watch = watch
        self._recorder, self._flat, self._exchange, self._stopwatch = recorder, flat, exchange, stopwatch
        self._record, self._seed = config.record, config.run.seed
        self._next_sketch = math.ceil(begin_s / self._record.sketch_every_s)

    def note_episodes(self, time_s: float, update: int, agent_steps: int, episodes: list[Episode]) -> None:
        """A row for each finished episode."""
        for episode in episodes:
            self._recorder.append("episodes", time_s=time_s, update=update, agent_steps=agent_steps, **vars(episode))

    def note_update(self, time_s: float, update: int, agent_steps: int, losses: Losses) -> None:
        """A row of the update, of the profile and of each in-neighbour.

        The fields of `Losses` and of `ExchangeCounters` are columns of `updates`, by the same names.
        """
        when: dict[str, Any] = {"time_s": time_s, "update": update}
        learned = {name: float(term) for name, term in vars(losses).items()}
        if self._watch is not None:
            watched = {name: learned[name] for name in ("explained_variance", "entropy", "value_loss")}
            self._watch.note(update, **watched)
        self._recorder.append(
            "updates",
            **when,
            agent_steps=agent_steps,
            rollout_s=self._stopwatch.sum(*ROLLOUT),
            learn_s=self._stopwatch.sum(*LEARN),
            **learned,
            **vars(self._exchange.counters),
        )
        self._recorder.append("profile", **when, **{f"{part}_s": s for part, s in self._stopwatch.seconds.items()})
        for n in self._exchange.in_neighbours:
            self._recorder.append(
                "neighbours",
                **when,
                rank=n.rank,
                staleness=n.staleness,
                message_age_s=n.message_age_s,
                distance=n.distance,
                lost=n.lost,
            )

    def sketch_if_due(self, time_s: float, update: int) -> None:
        """Sketch the parameters at the first update after each instant t0 + k * interval, on all ranks alike."""
        instant = int(time_s // self._record.sketch_every_s)
        if instant >= self._next_sketch:
            self._next_sketch = instant + 1
            sketch = np.zeros(self._record.sketch_dimension, np.float32)
            squared = _native.sketch(self._flat.host(), sketch, self._seed)
            self._recorder.append("sketches", time_s=time_s, update=update, norm=math.sqrt(squared), sketch=sketch)
