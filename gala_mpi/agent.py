"""The actor-learner: one rank's way through a run. Rollout, learn, exchange, record.

Whatever ends a rank early, but for its death, ends all ranks in the same way: they see it on the board, or in the
all-reduce, finish the update that they are in, write a checkpoint and close their files.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gala_mpi import __version__, _native
from gala_mpi.board import Board, Overview, board_bytes
from gala_mpi.checkpoint import CheckpointError, CheckpointFolder
from gala_mpi.checkpointer import Checkpointer, Identity, Parts, expect, largest_bytes
from gala_mpi.collective import on_all_ranks
from gala_mpi.config import ConfigError, TrainConfig, UsageError
from gala_mpi.courier import Courier
from gala_mpi.doctor.findings import FAIL
from gala_mpi.doctor.preflight import ruinous
from gala_mpi.environments import Simulators, is_atari, make_simulators
from gala_mpi.exchange import Exchange, make_exchange, window_bytes
from gala_mpi.gossip import DivergedError
from gala_mpi.learner import Learner, Losses
from gala_mpi.monitor import Monitor
from gala_mpi.networks import AtariPolicy, MLPPolicy, Policy
from gala_mpi.parameters import FlatParameters
from gala_mpi.recorder import Recorder, rank_file
from gala_mpi.resume import Resumption, find_checkpoints
from gala_mpi.rollout import Collector
from gala_mpi.run_folder import RunInfo
from gala_mpi.stopwatch import LEARN, ROLLOUT, Stopwatch
from gala_mpi.waiting import StopRequest, Watchdog, wait_until
from gala_mpi.window import MpiError, library_version

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

REFERENCE_SIMULATORS = 16
STUCK = "the end of the run: the MPI library has not returned"
STUCK_FILES = "writing metrics or a checkpoint: the file system has not answered"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """How a rank's training ended. `speaker` is the rank that tells it; `lost`, `diverged` and the like list ranks.

    `agent_steps` and `updates` are those of this rank, `total_steps` those of all; `new_steps` are without what a run
    that was resumed had before. `profile` has the seconds that the parts of its updates took (see `stopwatch`).
    `unwritten` lists ranks that could not write all metrics, or their last checkpoint.
    """

    agent_steps: int
    updates: int
    total_steps: int
    new_steps: int
    seconds: float
    stopped: str | None
    overview: Overview
    speaker: int
    lost: list[int]
    diverged: list[int]
    failed: list[int]
    unwritten: list[int]
    profile: dict[str, float]


class Agent:
    """One rank's simulators, policy, learner, exchange and recorder. Making it and `train` are collective.

    Raises UsageError, on all ranks, if the run cannot be, or a file of it cannot be made.
    """

    def __init__(self, config: TrainConfig, comm: Intracomm, info: RunInfo, watchdog: Watchdog) -> None:
        self._config, self._comm, self._watchdog = config, comm, watchdog
        threads, device = on_all_ranks(comm, lambda: _place(comm, config.run.device))
        if device.type == "cuda":
            # Streams and graphs are those of the current device.
            torch.cuda.set_device(device)
        # The threads of a network for flat observations wait for each other longer than they compute.
        torch.set_num_threads(_threads_asked_for() or (threads if is_atari(config.environment.env) else 1))
        # One stream for each use: parameters from the seed alone, simulators and actions by rank.
        shared = np.random.SeedSequence([config.run.seed])
        self._simulators = on_all_ranks(comm, lambda: make_simulators(config.environment, threads))
        self._policy = make_policy(config, self._simulators, _generator(int(shared.generate_state(1)[0]))).to(device)
        self._flat = FlatParameters(self._policy)
        look_ahead(comm, window_bytes(config.exchange, self._flat, comm) + board_bytes(comm.size), info.folder)
        self._timeout_s = config.exchange.neighbour_timeout_s
        self._courier = Courier(comm, config.exchange.delivery)
        self._board = Board(comm, self._courier, self._timeout_s)
        self._exchange: Exchange = make_exchange(config.exchange, self._flat, comm, self._courier, self._board.come_by)
        waits = config.run.profile and device.type == "cuda"
        self._stopwatch = Stopwatch(torch.cuda.synchronize if waits else None)
        rate = learning_rate(config, comm.size)
        average = self._exchange.average_gradient
        self._learner = Learner(self._flat, config.learner, rate, average, self._stopwatch)
        folder = on_all_ranks(comm, lambda: _checkpoint_folder(info.folder, comm.rank, config.record.keep_checkpoints))
        resumption = self._find_checkpoints(info) if info.segment else None
        stream = [config.run.seed, comm.rank]
        if resumption is not None:
            # What cannot go on begins anew, and not with what it began with before.
            stream += [info.segment, resumption.learner.facts.update]
        simulator_seed, action_seed = np.random.SeedSequence(stream).generate_state(2)
        generator = _generator(int(action_seed), device)
        steps = config.learner.rollout_steps
        # Simulator seeds are int32 in ALE, and consecutive for the simulators of a rank.
        seed, dtype = int(simulator_seed) >> 2, getattr(torch, config.learner.precision)
        self._collector = Collector(self._simulators, self._policy, steps, seed, generator, self._stopwatch, dtype)
        parts = Parts(self._flat, self._learner, self._collector, self._exchange, self._board, self._stopwatch)
        identity = Identity(info.run_id, info.segment, comm.rank, comm.size, config.as_dict())
        self._checkpointer = Checkpointer(folder, parts, identity, config.record.checkpoint_every_s)
        self._agent_steps = self._update = 0
        self._begin_s: float = 0.0
        if resumption is not None:
            self._agent_steps, self._update = resumption.agent_steps[comm.rank], resumption.learner.facts.update
            self._begin_s = resumption.time_s
            self._checkpointer.restore(resumption)
        self._steps_before = self._board.total_steps
        # The same instant on all ranks, from which they count; from then on by a clock that is never set back.
        comm.Barrier()
        self._zero_s = time.monotonic() - self._begin_s
        self._t0 = comm.bcast(time.time()) - self._begin_s
        self._recorder = on_all_ranks(comm, lambda: self._make_recorder(info, resumption))
        self._monitor: Monitor | None = None
        self._next_sketch = int(self._begin_s // config.record.sketch_every_s) + (resumption is not None)
        self._all_written = True

    def _find_checkpoints(self, info: RunInfo) -> Resumption | None:
        """What this rank goes on from. Collective."""
        flat, comm = self._flat, self._comm
        resumption = find_checkpoints(
            comm,
            info.folder,
            lambda checkpoint: expect(flat, info.run_id, checkpoint),
            largest_bytes(flat),
            log.warning,
            synchronous=self._exchange.synchronous,
        )
        if comm.rank == 0:
            if resumption is None:
                log.warning("%s holds no checkpoint yet: the run begins anew", info.folder)
            elif resumption.size_before != comm.size:
                log.warning(
                    "changed: ranks from %d to %d: rank r goes on from rank r modulo %d; the learning rate is %g now",
                    resumption.size_before,
                    comm.size,
                    resumption.size_before,
                    learning_rate(self._config, comm.size),
                )
        return resumption

    def _now_s(self) -> float:
        """Seconds of training since the run's beginning, those of earlier segments included."""
        return time.monotonic() - self._zero_s

    def _make_recorder(self, info: RunInfo, resumption: Resumption | None) -> Recorder:
        config, comm = self._config, self._comm
        packages = ("torch", "mpi4py", "gymnasium", "ale-py", "numpy", "h5py")
        attributes = {
            "run_id": info.run_id,
            "rank": comm.rank,
            "size": comm.size,
            "node": platform.node(),
            "env_id": config.environment.env,
            "config": config.as_dict(),
            "mpi_library": library_version(),
            "segment": info.segment,
            "versions": {
                "gala-mpi": __version__,
                "python": platform.python_version(),
                **{name: version(name) for name in packages},
            },
            "delivery": {str(target): way for target, way in self._exchange.ways.items()},
            "started": info.started,
            "t0": self._t0,
        }
        if info.segment:
            # Rows of earlier segments after these updates are of training that was lost.
            attributes["resumed"] = {
                "time_s": self._begin_s,
                "update": self._update,
                "agent_steps": self._agent_steps,
                "size": resumption.size_before if resumption else comm.size,
                "updates": resumption.updates if resumption else [0] * comm.size,
            }
        try:
            path = rank_file(info.folder, comm.rank, info.segment)
            return Recorder(path, attributes, config.record, config.run.seed)
        except OSError as error:
            allowed = f"a folder that {platform.node()} can write ({error})"
            raise ConfigError("out", str(info.folder), allowed) from error

    def train(self, stop: StopRequest, on_update: Callable[[int], None] | None = None) -> Summary:
        """Run to the end of the budget, the time limit or a request to stop.

        `on_update`, if given, is called after every update with its number.
        """
        began_s = self._now_s()
        self._stopwatch.start()
        diverged = failed = False
        try:
            self._save()
            while self._progress() < 1 and not self._exchange.agree(self._wants_to_stop(stop)):
                self._one_update()
                self._show()
                if on_update is not None:
                    on_update(self._update)
            # What ends this rank ends the others too: they are to see it with their next update.
            with self._limit():
                self._board.tell()
            self._save()
        except DivergedError as error:
            diverged = True
            log.warning("this rank ends, without a checkpoint of what diverged: %s", error)
        except MpiError:
            raise
        except Exception:
            failed = True
            self._fail()
        finally:
            with self._watchdog.limit(4 * self._timeout_s, STUCK_FILES):
                self._all_written &= self._recorder.close()
            if self._monitor is not None:
                self._monitor.close()
        # The file is closed before the others are told: from then on they may end the job.
        lost = self._end(diverged=diverged, failed=failed)
        return Summary(
            agent_steps=self._agent_steps,
            updates=self._update,
            total_steps=self._board.total_steps,
            new_steps=self._board.total_steps - self._steps_before,
            seconds=self._now_s() - began_s,
            stopped=stop.reason or ("another rank stopped" if self._board.stop_requested else None),
            overview=self._board.overview(),
            speaker=self._board.speaker,
            lost=lost,
            diverged=self._board.diverged,
            failed=self._board.failed,
            profile=dict(self._stopwatch.seconds),
            unwritten=self._board.unwritten,
        )

    def _save(self) -> None:
        """Write a checkpoint of the run as it is now."""
        with self._watchdog.limit(4 * self._timeout_s, STUCK_FILES):
            # A run that goes on from a checkpoint then misses no row before it.
            self._recorder.flush()
            self._checkpointer.save(self._update, self._agent_steps, self._now_s())
        self._stopwatch.lap("checkpoint")

    def _fail(self) -> None:
        """Say what went wrong in this rank, and let all others end with checkpoints and closed files."""
        for line in traceback.format_exc().splitlines():
            print(f"[{self._comm.rank}/{self._comm.size}] {line}", file=sys.stderr)
        log.error("this rank ends by the error above, and all others with it; then --resume goes on from checkpoints")
        with self._limit():
            self._board.ask_all_to_stop()
            self._board.tell()
            if self._progress() < 1 and not self._exchange.agree(True):
                self._exchange.give_up()

    def _end(self, *, diverged: bool, failed: bool) -> list[int]:
        """Wait until all ranks are done and have met; those that are lost instead. Collective if there are none."""
        board = self._board
        met: list[Request] = []

        def all_done() -> bool:
            with self._limit():
                board.come_by()
                return board.all_done

        def all_met() -> bool:
            with self._limit():
                board.come_by()
                if board.lost:
                    # Even to start a barrier with a dead rank may take for ever.
                    return True
                # The last parameters of this rank have arrived before any rank may free its windows.
                if not met and self._exchange.arrived():
                    met.append(self._comm.Ibarrier())
                return bool(met) and bool(met[0].Test())

        with self._limit():
            self._exchange.finish()
            unwritten = not self._all_written or self._checkpointer.failing
            board.finish(diverged=diverged, failed=failed, unwritten=unwritten)
        # As long as others work and are heard: each of them ends, or falls silent and is lost.
        wait_until(all_done, math.inf)
        with self._limit():
            board.meet()
        if not wait_until(all_met, 4 * self._timeout_s):
            # All are heard, but one does not come: leave as if it were lost.
            return [rank for rank in range(self._comm.size) if rank != self._comm.rank]
        return board.lost

    def _limit(self) -> AbstractContextManager[None]:
        """The deadline of what calls MPI at the end, and waits for nobody by its own rules."""
        return self._watchdog.limit(4 * self._timeout_s, STUCK)

    def free(self) -> None:
        """Free windows and simulators. Collective; not to be called if a rank is lost."""
        with self._watchdog.limit(self._timeout_s, STUCK):
            self._courier.free()
            self._exchange.free()
            self._board.free()
        self._simulators.close()

    def _show(self) -> None:
        """Show the progress of the run, on the rank that speaks for it."""
        run = self._config.run
        if self._board.speaker != self._comm.rank:
            return
        if self._monitor is None:
            every_s = self._config.record.progress_every_s
            # A rank may take over from one that is lost, in the middle of the run.
            self._monitor = Monitor(run, every_s, self._zero_s + self._begin_s, self._board.total_steps)
        if self._monitor.due():
            self._monitor.show(self._board.overview())

    def _wants_to_stop(self, stop: StopRequest) -> bool:
        """Whether this rank is to end before its budget is spent."""
        run = self._config.run
        limit_s = math.inf if run.time_limit_s is None else run.time_limit_s
        if stop.reason:
            self._board.ask_all_to_stop()
        return bool(stop.reason) or self._board.stop_requested or self._now_s() - self._begin_s >= limit_s

    def _progress(self) -> float:
        """Share of the budget that is spent."""
        run, size = self._config.run, self._comm.size
        # Ranks in step, and a rank alone, count for themselves: no step more than needed, the same in every run.
        if run.budget == "per-rank" or self._exchange.synchronous or size == 1:
            return self._agent_steps * size / run.total_steps
        return self._board.total_steps / run.total_steps

    def _one_update(self) -> None:
        exchange, counters, lap = self._exchange, self._exchange.counters, self._stopwatch.lap
        measure = (self._update + 1) % self._config.record.record_every == 0
        lap("status")
        timeout_s = self._config.environment.simulator_timeout_s
        with self._watchdog.limit(timeout_s, f"a rollout takes longer than {timeout_s:g} s (--simulator-timeout-s)"):
            rollout = self._collector.collect()
        losses = self._learner.update(rollout, self._progress(), measure=measure)
        self._update += 1
        self._agent_steps += rollout.rewards.numel()
        now_s = self._now_s()
        for episode in rollout.episodes:
            row = (now_s, self._update, self._agent_steps, episode.env_index, episode.episode_return, episode.length)
            self._recorder.append("episodes", row)
        self._checkpointer.note_episodes(rollout.episodes, now_s)
        lap("record")
        self._board.note_episodes(rollout.episodes, now_s)
        lap("status")
        # Nothing in here waits longer than this by its own rules; the watchdog is for a library that does.
        with self._watchdog.limit(4 * self._timeout_s, "the exchange: the MPI library has not returned"):
            try:
                if exchange.step(self._agent_steps):
                    self._learner.forget()
            except DivergedError:
                self._record(self._now_s(), losses)
                raise
            lap("exchange")
            self._board.report(self._agent_steps, self._update, counters.staleness)
            lap("status")
        now_s = self._now_s()
        if measure:
            self._record(now_s, losses)
        self._record_sketch(now_s)
        with self._watchdog.limit(4 * self._timeout_s, STUCK_FILES):
            self._recorder.flush_if_due()
        lap("record")
        if self._checkpointer.due(self._now_s()):
            self._save()

    def _record(self, now_s: float, losses: Losses) -> None:
        counters, when = self._exchange.counters, (now_s, self._update)
        self._recorder.append(
            "updates",
            (
                *when,
                self._agent_steps,
                float(losses.policy_loss),
                float(losses.value_loss),
                float(losses.entropy),
                float(losses.grad_norm),
                float(losses.update_norm),
                float(losses.explained_variance),
                self._stopwatch.sum(*ROLLOUT),
                self._stopwatch.sum(*LEARN),
                counters.exchange_s,
                counters.wait_s,
                counters.messages_sent,
                counters.messages_mixed,
                counters.messages_dropped,
                counters.messages_rejected,
                counters.divergences,
                counters.staleness,
                counters.message_age_s,
                counters.neighbour_distance,
            ),
        )
        self._recorder.append("profile", (*when, *self._stopwatch.seconds.values()))
        for n in self._exchange.in_neighbours:
            self._recorder.append("neighbours", (*when, n.rank, n.staleness, n.message_age_s, n.distance, n.lost))

    def _record_sketch(self, now_s: float) -> None:
        """Sketch the parameters at the first update after each instant t0 + k * interval, on all ranks alike."""
        record = self._config.record
        instant = int(now_s // record.sketch_every_s)
        if instant >= self._next_sketch:
            self._next_sketch = instant + 1
            sketch = np.zeros(record.sketch_dimension, np.float32)
            squared = _native.sketch(self._flat.host(), sketch, self._config.run.seed)
            self._recorder.append("sketches", (now_s, self._update, math.sqrt(squared), sketch))


def _checkpoint_folder(run: Path, rank: int, keep: int) -> CheckpointFolder:
    try:
        return CheckpointFolder(run, rank, keep)
    except CheckpointError as error:
        raise UsageError(str(error)) from error


def make_policy(config: TrainConfig, simulators: Simulators, generator: torch.Generator) -> Policy:
    """The network for the task."""
    if is_atari(config.environment.env):
        return AtariPolicy(simulators.actions, generator)
    inputs = math.prod(simulators.observation_shape)
    return MLPPolicy(inputs, config.learner.hidden, simulators.actions, generator)


def look_ahead(comm: Intracomm, nbytes: int, folder: Path) -> None:
    """Refuse what would ruin the run, and warn of what may. Collective."""
    for finding in ruinous(comm, nbytes, folder, library_version()):
        # More ranks than cores are slow, but may be meant.
        if finding.status == FAIL and not finding.check.startswith("cores."):
            raise UsageError(f"{finding.message}; what helps: {finding.fix} (gala-mpi doctor tells more)")
        if comm.rank == 0:
            log.warning("%s; what helps: %s", finding.message, finding.fix)


def learning_rate(config: TrainConfig, size: int) -> float:
    """The learning rate of a run of `size` ranks."""
    if config.learner.learning_rate_scaling == "none":
        return config.learner.learning_rate
    return config.learner.learning_rate * math.sqrt(config.environment.simulators * size / REFERENCE_SIMULATORS)


def _generator(seed: int, device: torch.device | None = None) -> torch.Generator:
    return torch.Generator(device or "cpu").manual_seed(seed)


def _threads_asked_for() -> int:
    """The first number of OMP_NUM_THREADS, or 0 if it is not set, or to something else."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _place(comm: Intracomm, device: str) -> tuple[int, torch.device]:
    """Threads and device of this rank, shared fairly with the ranks of its node. Collective."""
    node, mine = platform.node(), frozenset(os.sched_getaffinity(0))
    placed = comm.allgather((node, mine))
    sharing = sum(1 for other, cpus in placed if other == node and cpus & mine)
    local_rank = sum(1 for other, _ in placed[: comm.rank] if other == node)
    threads = max(len(mine) // sharing, 1)
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return threads, torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device", device, f"a GPU that torch can use, but there is none on {node}")
    return threads, torch.device("cuda", local_rank % torch.cuda.device_count())
