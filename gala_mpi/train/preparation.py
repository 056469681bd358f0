"""What a rank needs before its first update: its place on the node, its policy, and whether the run can be at all."""

from __future__ import annotations

import logging
import math
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from gala_mpi.config import ConfigError, TrainConfig, UsageError
from gala_mpi.doctor.findings import FAIL
from gala_mpi.doctor.preflight import ruinous
from gala_mpi.gossip.mixing import effective_neighbours
from gala_mpi.gossip.topology import Topology
from gala_mpi.learning.environments import Simulators, is_atari
from gala_mpi.learning.networks import AtariPolicy, MLPPolicy, Policy
from gala_mpi.mpi.window import library_version
from gala_mpi.storage.checkpoint import CheckpointError, CheckpointFolder
from gala_mpi.train.signals import hear_again
from gala_mpi.user_code import SimulatorError, kind_and_text

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")

REFERENCE_SIMULATORS = 16
log = logging.getLogger(__name__)


def make_checkpoint_folder(run: Path, rank: int, keep: int) -> CheckpointFolder:
    """The folder of a rank's checkpoints. Raises UsageError if it is a link, or cannot be looked at."""
    try:
        return CheckpointFolder(run, rank, keep)
    except (CheckpointError, OSError) as error:
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


def ranks_that_count(config: TrainConfig, comm: Intracomm, topology: Topology | None) -> float:
    """The number of ranks by which the rate goes, where ranks share over `topology` what they learn. Collective."""
    if config.learner.learning_rate_scaling == "effective" and config.exchange.exchange == "none":
        return 1.0
    if config.learner.learning_rate_scaling == "effective" and topology is not None:
        # One rank: it takes the whole graph.
        ranks: float = comm.bcast(effective_neighbours(topology) if comm.rank == 0 else None)
        return ranks
    return float(comm.size)


def learning_rate(config: TrainConfig, ranks: float) -> float:
    """The learning rate of a run in which so many ranks count. Local."""
    if config.learner.learning_rate_scaling == "none":
        return config.learner.learning_rate
    return config.learner.learning_rate * math.sqrt(config.environment.simulators * ranks / REFERENCE_SIMULATORS)


def make_generator(seed: int, device: torch.device | None = None) -> torch.Generator:
    """A stream of random numbers."""
    return torch.Generator(device or "cpu").manual_seed(seed)


def threads_asked_for() -> int:
    """The first number of OMP_NUM_THREADS, or 0 if it is not set, or to something else."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def place(comm: Intracomm, device: str) -> tuple[int, torch.device]:
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


def take_process_back() -> None:
    """Put back what holds for the whole process, where an environment has set it: signals, torch's modes. Local."""
    hear_again()
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
    if torch.get_default_dtype() != torch.float32:
        torch.set_default_dtype(torch.float32)


def within_memory(make: Callable[[], T]) -> T:
    """What `make` gives. Raises UsageError if there is no memory for it."""
    try:
        return make()
    except SimulatorError:
        # Its text may speak of memory too, and is the environment's.
        raise
    except (MemoryError, RuntimeError) as error:
        # torch has no exception of its own for it.
        if isinstance(error, RuntimeError) and not re.search("memory|too large|overflow", str(error)):
            raise
        reason = kind_and_text(error)
        raise UsageError(
            f"a rank's network and rollouts do not fit into the memory ({reason}); what helps: smaller --hidden, "
            "--simulators or --rollout-steps"
        ) from error
