"""The assembly of a rank: from the configuration to all of its parts, ready for the first update."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gala_mpi.config import ConfigError, TrainConfig
from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.exchange import Exchange, make_exchange, window_bytes
from gala_mpi.gossip.news import heirs_among
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.gossip.roster import roster_bytes
from gala_mpi.learning.environments import Simulators, is_atari, make_simulators, refused
from gala_mpi.learning.learner import Learner, learner_class
from gala_mpi.learning.networks import Policy
from gala_mpi.learning.rollout import Collector
from gala_mpi.learning.stalls import StallWatch
from gala_mpi.mpi.collective import on_all_ranks
from gala_mpi.mpi.waiting import Watchdog
from gala_mpi.mpi.window import node_leaders
from gala_mpi.stopwatch import Stopwatch
from gala_mpi.storage.checkpoint import LARGEST_COUNT
from gala_mpi.storage.lease import Lease
from gala_mpi.storage.recorder import Recorder
from gala_mpi.storage.resume import Resumption, find_checkpoints
from gala_mpi.storage.run_folder import RunInfo
from gala_mpi.train.board import Board
from gala_mpi.train.checkpointer import Checkpointer, Identity, Parts, expect, largest_bytes
from gala_mpi.train.metrics import Metrics, open_recorder
from gala_mpi.train.preparation import (
    learning_rate,
    look_ahead,
    make_checkpoint_folder,
    make_generator,
    make_policy,
    place,
    ranks_that_count,
    take_process_back,
    threads_asked_for,
    within_memory,
)

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

HOLDERS_OF_A_NODE = 2
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a rank counts from, and what there is to say of it; for a new run, nothing.

    `update` and `agent_steps` are this rank's, `total_steps` those of all, `time_s` seconds of training.
    """

    update: int = 0
    agent_steps: int = 0
    total_steps: int = 0
    time_s: float = 0.0
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rank:
    """The parts of a rank. `zero_s` is the instant of the monotonic clock at which its training time is zero."""

    simulators: Simulators
    courier: Courier
    parts: Parts
    checkpointer: Checkpointer
    recorder: Recorder
    metrics: Metrics
    origin: Origin
    zero_s: float


def assemble(config: TrainConfig, comm: Intracomm, info: RunInfo, lease: Lease, watchdog: Watchdog) -> Rank:
    """Make the parts of this rank. Collective.

    Raises UsageError, on all ranks, if the run cannot be, or a file of it cannot be made; RankFailureError if a user's
    code fails.
    """
    threads, device = on_all_ranks(comm, lambda: place(comm, config.run.device))
    simulators = on_all_ranks(comm, lambda: make_simulators(config.environment, threads))
    try:
        return _around(simulators, config, comm, info, lease, watchdog, threads, device)
    except BaseException:
        # Their threads and windows would outlive a start that is refused.
        simulators.close()
        raise


def _around(
    simulators: Simulators,
    config: TrainConfig,
    comm: Intracomm,
    info: RunInfo,
    lease: Lease,
    watchdog: Watchdog,
    threads: int,
    device: torch.device,
) -> Rank:
    """Make all parts but the simulators. Collective."""
    _set_up_process(config, threads, device)
    policy = _make_network(config, comm, simulators, device)
    flat = FlatParameters(policy)
    courier, board, exchange = _open_windows(config, comm, info, lease, watchdog, flat)
    waits = config.run.profile and device.type == "cuda"
    stopwatch = Stopwatch(torch.cuda.synchronize if waits else None)
    counted = ranks_that_count(config, comm, exchange.topology)
    rate = learning_rate(config, counted)
    learner = learner_class(device)(flat, config.learner, rate, exchange.average_gradient, stopwatch)
    learner.enough = counted / comm.size
    keep = config.record.keep_checkpoints
    folder = on_all_ranks(comm, lambda: make_checkpoint_folder(info.folder, comm.rank, keep))
    resumption = _find_checkpoints(config, comm, info, learner, flat, exchange, rate) if info.segment else None
    stream = [config.run.seed, comm.rank]
    if resumption is not None:
        # What cannot go on begins anew, and not with what it began with before.
        stream += [info.segment, resumption.learner.facts.update]
    collector = on_all_ranks(comm, lambda: _make_collector(config, simulators, policy, stream, device, stopwatch))
    take_process_back()
    parts = Parts(flat, learner, collector, exchange, board, stopwatch)
    identity = Identity(info.run_id, info.segment, comm.rank, comm.size, config.as_dict())
    checkpointer = Checkpointer(folder, parts, identity, config.record.checkpoint_every_s)
    origin = Origin() if resumption is None else _go_on(comm, resumption, checkpointer, board)
    # The same instant on all ranks, from which they count; from then on by a clock that is never set back.
    comm.Barrier()
    zero_s = time.monotonic() - origin.time_s
    about = _about(comm, info, exchange, resumption, origin, comm.bcast(time.time()) - origin.time_s)
    recorder = on_all_ranks(comm, lambda: open_recorder(config, info, about))
    watch = _stall_watch(config, comm, simulators)
    metrics = Metrics(recorder, config, flat, exchange, stopwatch, origin.time_s, watch)
    return Rank(simulators, courier, parts, checkpointer, recorder, metrics, origin, zero_s)


def _make_network(config: TrainConfig, comm: Intracomm, simulators: Simulators, device: torch.device) -> Policy:
    """The policy, the same on all ranks. Collective."""
    # One stream for each use: parameters from the seed alone, simulators and actions by rank.
    shared = make_generator(int(np.random.SeedSequence([config.run.seed]).generate_state(1)[0]))
    return on_all_ranks(comm, lambda: within_memory(lambda: make_policy(config, simulators, shared).to(device)))


def _open_windows(
    config: TrainConfig, comm: Intracomm, info: RunInfo, lease: Lease, watchdog: Watchdog, flat: FlatParameters
) -> tuple[Courier, Board, Exchange]:
    """Make all that sends and receives. Collective."""
    nbytes = window_bytes(config.exchange, flat, comm) + roster_bytes(comm.rank, node_leaders(comm))
    look_ahead(comm, nbytes, info.folder)
    courier = Courier(comm, config.exchange.delivery)
    here = courier.leaders.count(courier.leaders[comm.rank])
    if courier.node_rank(comm.rank) in heirs_among(here)[:HOLDERS_OF_A_NODE]:
        lease.hold()
    board = Board(comm, courier, config.exchange.neighbour_timeout_s)
    return courier, board, make_exchange(config.exchange, flat, comm, courier, board.come_by, watchdog, board.roster)


def _stall_watch(config: TrainConfig, comm: Intracomm, simulators: Simulators) -> StallWatch | None:
    """What watches this rank's learning, if it is this one that speaks of it: ranks that exchange stall together."""
    watched = comm.rank == 0 or config.exchange.exchange == "none"
    return StallWatch(config.record.record_every, simulators.actions) if watched else None


def _set_up_process(config: TrainConfig, threads: int, device: torch.device) -> None:
    """Set what holds for the whole process, and take back what environments have set."""
    take_process_back()
    if device.type == "cuda":
        # Streams and graphs are those of the current device.
        torch.cuda.set_device(device)
        # Of the ways to a gradient those that add in a fixed order: the same to the bit each time.
        torch.backends.cudnn.deterministic = True
        # What is left for a CPU are copies, and threads that wait for work take it from the simulators'.
        torch.set_num_threads(1)
    else:
        # The threads of a network for flat observations wait for each other longer than they compute.
        torch.set_num_threads(threads_asked_for() or (threads if is_atari(config.environment.env) else 1))


def _make_collector(
    config: TrainConfig,
    simulators: Simulators,
    policy: Policy,
    stream: list[int],
    device: torch.device,
    stopwatch: Stopwatch,
) -> Collector:
    """The collector, with a game begun in every simulator. Raises ConfigError if one cannot begin."""
    simulator_seed, action_seed = np.random.SeedSequence(stream).generate_state(2)
    generator, dtype = make_generator(int(action_seed), device), getattr(torch, config.learner.precision)
    # Simulator seeds are int32 in ALE, and consecutive for the simulators of a rank.
    seed, steps = int(simulator_seed) >> 2, config.learner.rollout_steps
    with refused(config.environment.env):
        return within_memory(lambda: Collector(simulators, policy, steps, seed, generator, stopwatch, dtype))


def _find_checkpoints(
    config: TrainConfig,
    comm: Intracomm,
    info: RunInfo,
    learner: Learner,
    flat: FlatParameters,
    exchange: Exchange,
    rate: float,
) -> Resumption | None:
    """What this rank goes on from. Collective."""
    resumption = find_checkpoints(
        comm,
        info.folder,
        lambda checkpoint: expect(flat, learner, info.run_id, checkpoint),
        largest_bytes(flat),
        log.warning,
        synchronous=exchange.synchronous,
    )
    if resumption is None and info.before.ended:
        # Each start writes one before its first update, and none is said to have ended in order if it could not.
        raise ConfigError("resume", str(info.folder), "a run whose checkpoints are still there, as it ended in order")
    if comm.rank == 0:
        if resumption is None:
            log.warning("%s holds no checkpoint: the run begins anew", info.folder)
        elif resumption.size_before != comm.size:
            log.warning(
                "changed: ranks from %d to %d: rank r goes on from rank r modulo %d; "
                "learning rate %g (after the warm-up, before decay)",
                resumption.size_before,
                comm.size,
                resumption.size_before,
                rate,
            )
    return resumption


def _go_on(comm: Intracomm, resumption: Resumption, checkpointer: Checkpointer, board: Board) -> Origin:
    """Give the parts their states back; where the rank counts from. Collective."""
    go_on = comm.allgather(checkpointer.restore(resumption))
    updates = [update for update in resumption.updates if update < LARGEST_COUNT]
    between = f"updates {min(updates):,} to {max(updates):,}"
    lines = [f"goes on from {board.total_steps:,} steps (checkpoints of {between})"]
    if anew := [rank for rank, whether in enumerate(go_on) if not whether]:
        which = "all ranks" if len(anew) == comm.size else f"rank {', '.join(map(str, anew))}"
        lines += [f"simulators, and what their wrappers have learned, begin anew on {which}"]
    return Origin(
        update=resumption.learner.facts.update,
        agent_steps=resumption.agent_steps[comm.rank],
        total_steps=board.total_steps,
        time_s=resumption.time_s,
        lines=lines,
    )


def _about(
    comm: Intracomm, info: RunInfo, exchange: Exchange, resumption: Resumption | None, origin: Origin, t0: float
) -> dict[str, Any]:
    """What this rank's file says of it, and of what it went on from."""
    about: dict[str, Any] = {"rank": comm.rank, "size": comm.size, "t0": t0}
    about["delivery"] = {str(target): way for target, way in exchange.ways.items()}
    if exchange.topology is not None:
        about["topology"] = exchange.topology.name
    if info.segment:
        # Rows of earlier segments after these updates are of training that was lost.
        about["resumed"] = {
            "time_s": origin.time_s,
            "update": origin.update,
            "agent_steps": origin.agent_steps,
            "size": resumption.size_before if resumption else comm.size,
            "updates": resumption.updates if resumption else [0] * comm.size,
        }
    return about
