"""The actor-learner: one rank's way through a run. Rollout, learn, exchange, record.

Whatever ends a rank early, but for its death, ends all ranks in the same way: they see it on the board, or in the
all-reduce, finish the update that they are in, write a checkpoint and close their files.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gala_mpi.config import TrainConfig
from gala_mpi.gossip.consensus import DivergedError
from gala_mpi.gossip.exchange import Exchange
from gala_mpi.mpi.waiting import Watchdog, wait_until
from gala_mpi.mpi.window import MpiError
from gala_mpi.storage.lease import Lease
from gala_mpi.storage.run_folder import RunInfo
from gala_mpi.train.assembly import assemble
from gala_mpi.train.board import Overview
from gala_mpi.train.monitor import Monitor
from gala_mpi.train.preparation import take_process_back
from gala_mpi.train.signals import StopRequest
from gala_mpi.user_code import tell

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

STUCK = "the end of the run: the MPI library has not returned"
# A job that is preempted has half a minute, mostly.
LONGEST_TURN_S = 5.0
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

    def __init__(self, config: TrainConfig, comm: Intracomm, info: RunInfo, lease: Lease, watchdog: Watchdog) -> None:
        self._config, self._comm, self._lease, self._watchdog = config, comm, lease, watchdog
        self._timeout_s = config.exchange.neighbour_timeout_s
        rank = assemble(config, comm, info, lease, watchdog)
        self._simulators, self._courier, self._checkpointer = rank.simulators, rank.courier, rank.checkpointer
        self._recorder, self._metrics = rank.recorder, rank.metrics
        parts = rank.parts
        self._collector, self._learner, self._stopwatch = parts.collector, parts.learner, parts.stopwatch
        self._exchange: Exchange = parts.exchange
        self._board = parts.board
        self.topology = parts.exchange.topology
        """The graph that messages go over, if they do."""
        self.origin = rank.origin.lines
        """Lines on what a run that was resumed goes on from; none for a new one."""
        self._update, self._agent_steps = rank.origin.update, rank.origin.agent_steps
        self._begin_s, self._steps_before = rank.origin.time_s, rank.origin.total_steps
        self._zero_s = rank.zero_s
        self._monitor: Monitor | None = None
        self._all_written = True

    def _now_s(self) -> float:
        """Seconds of training since the run's beginning, those of earlier segments included."""
        return time.monotonic() - self._zero_s

    def train(self, stop: StopRequest, on_update: Callable[[int], None] | None = None) -> Summary:
        """Run to the end of the budget, the time limit or a request to stop.

        `on_update`, if given, is called after every update with its number.
        """
        began_s = self._now_s()
        self._stopwatch.start()
        diverged = failed = False
        try:
            self._save_in_turn()
            while self._progress() < 1 and not self._exchange.agree(self._wants_to_stop(stop)):
                self._one_update()
                self._show()
                if on_update is not None:
                    on_update(self._update)
            # What ends this rank ends the others too: they are to see it with their next update.
            with self._limit():
                self._board.tell()
            self._save_in_turn()
        except DivergedError as error:
            diverged = True
            log.warning("this rank ends, without a checkpoint of what diverged: %s", error)
        except MpiError:
            raise
        # An environment that has taken a signal may make any exception of it, anywhere.
        except BaseException as error:
            failed = True
            self._fail(error)
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
            stopped=self._why_stopped(stop),
            overview=self._board.overview(),
            speaker=self._board.speaker,
            lost=lost,
            diverged=self._board.diverged,
            failed=self._board.failed,
            profile=dict(self._stopwatch.seconds),
            unwritten=self._board.unwritten,
        )

    def _why_stopped(self, stop: StopRequest) -> str | None:
        """Why the run ended before its budget was spent; None if it did not, or by its time limit."""
        # Who ends by an error asks all others to stop: the error is the reason, on whichever rank this is said.
        if failed := self._board.failed:
            ranks = ", ".join(map(str, failed))
            return f"{'rank' if len(failed) == 1 else 'ranks'} {ranks} ended by an error, see above"
        return stop.reason or ("another rank asked for it" if self._board.stop_requested else None)

    def _save(self) -> None:
        """Write a checkpoint of the run as it is now."""
        with self._watchdog.limit(4 * self._timeout_s, STUCK_FILES):
            # A run that goes on from a checkpoint then misses no row before it.
            self._recorder.flush()
            self._checkpointer.save(self._update, self._agent_steps, self._now_s())
        self._stopwatch.lap("checkpoint")

    def _save_in_turn(self) -> None:
        """The same where all ranks do so at once: one after the other, as nearly as they can without a message."""
        # Of a silence that short nobody makes a lost rank.
        time.sleep(self._checkpointer.turn_s(min(LONGEST_TURN_S, self._timeout_s / 8)))
        self._save()

    def _fail(self, error: BaseException) -> None:
        """Say what went wrong in this rank, and let all others end with checkpoints and closed files."""
        tell(error, self._comm.rank, self._comm.size)
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
        with self._limit():
            self._courier.free()
            self._exchange.free()
            self._board.free()
        timeout_s = self._config.environment.simulator_timeout_s
        with self._watchdog.limit(timeout_s, f"simulators do not close within {timeout_s:g} s (--simulator-timeout-s)"):
            self._simulators.close()

    def _show(self) -> None:
        """Show the progress of the run, on the rank that speaks for it."""
        run = self._config.run
        if self._board.speaker != self._comm.rank:
            return
        self._lease.hold()
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
        if self._lease.lost:
            stop("another start has the run's folder")
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
        take_process_back()
        self._learner.share = exchange.share
        losses = self._learner.update(rollout, self._progress(), measure=measure)
        self._update += 1
        self._agent_steps += rollout.rewards.numel()
        now_s = self._now_s()
        self._metrics.note_episodes(now_s, self._update, self._agent_steps, rollout.episodes)
        self._checkpointer.note_episodes(rollout.episodes, now_s)
        lap("record")
        self._board.note_episodes(rollout.episodes)
        lap("status")
        # Nothing in here waits longer than this by its own rules; the watchdog is for a library that does.
        with self._watchdog.limit(4 * self._timeout_s, "the exchange: the MPI library has not returned"):
            try:
                if exchange.step(self._agent_steps):
                    self._learner.forget()
            except DivergedError:
                self._metrics.note_update(self._now_s(), self._update, self._agent_steps, losses)
                raise
            lap("exchange")
            self._board.report(self._agent_steps, self._update, counters.staleness)
            lap("status")
        now_s = self._now_s()
        if measure:
            self._metrics.note_update(now_s, self._update, self._agent_steps, losses)
        self._metrics.sketch_if_due(now_s, self._update)
        with self._watchdog.limit(4 * self._timeout_s, STUCK_FILES):
            self._recorder.flush_if_due()
        lap("record")
        if self._checkpointer.due(self._now_s()):
            self._save()
