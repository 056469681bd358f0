"""mpirun -n 32 gala-mpi doctor: what this MPI, these nodes and this file system will do to a run, and what to set.

Exit codes: 0 nothing fails; 1 a FAIL, or no end within --deadline-s; 2 an option that cannot be used.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gala_mpi import arguments, output
from gala_mpi.config import ConfigError, UsageError, at_home
from gala_mpi.doctor import libraries
from gala_mpi.doctor.examination import Examination
from gala_mpi.doctor.findings import as_json, as_text, failed, merge
from gala_mpi.doctor.peers import Peers, Watch
from gala_mpi.exit_codes import EXIT_ERROR, EXIT_OK
from gala_mpi.gossip.rules import Weights
from gala_mpi.gossip.topology import TOPOLOGIES, Topology, called, make_topology, with_edges

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

DOCTOR_HELP = "Check MPI, nodes and file system, and say what to set: mpirun -n 4 gala-mpi doctor"
# Beside those of the examination.
VERDICT, EDGES = 7, 8
# When even the thread of the watch cannot run, since a call inside a library holds Python's lock.
LAST_RESORT_S = 5.0


@dataclass(frozen=True)
class DoctorOptions:
    """What the doctor looks at, and for how long."""

    topology: str = "auto"
    """Whose links to measure; any topology that training knows."""
    parameters: int = 1_680_000
    """Parameters of the policy, for the memory that the windows need. The default is the published Atari
    network, twice the size of this one's."""
    out: Path = Path("runs")
    """Folder that runs would be written to."""
    deadline_s: float = 120.0
    """Seconds after which the doctor ends, done or not."""
    json: bool = False
    """Print one JSON list of findings and not text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", at_home("out", self.out))
        if self.parameters < 1:
            raise ConfigError("parameters", self.parameters, "a number of at least 1")
        if not 0 < self.deadline_s < float("inf"):
            raise ConfigError("deadline_s", self.deadline_s, "a number above 0")


def parse(args: list[str]) -> DoctorOptions:
    """The options that `args` describe. Raises UsageError."""
    return arguments.parse(DoctorOptions, "doctor", DOCTOR_HELP, args)


def help_text(args: list[str]) -> str:
    """What `gala-mpi doctor --help` prints."""
    return arguments.help_text(DoctorOptions, "doctor", DOCTOR_HELP)


def start_watch(args: Sequence[str]) -> Watch:
    """Start the deadline, before MPI starts: that may hang or crash too."""
    deadline_s = _deadline_s(args)
    launched = libraries.launch(os.environ)
    rank = launched.rank or 0
    # The traceback is rank 0's word when its watch cannot speak; the others need none.
    where = output.stderr() if rank == 0 else Path(os.devnull).open("w")  # noqa: SIM115 - open to the process's end
    faulthandler.dump_traceback_later(deadline_s + LAST_RESORT_S, exit=True, file=where)
    return Watch("gala-mpi doctor", deadline_s, rank)


def _deadline_s(args: Sequence[str]) -> float:
    """The deadline that `args` ask for; the default if that is none, which is told when they are read."""
    for index, arg in enumerate(args):
        name, joined, value = arg.replace("_", "-").partition("=")
        if name == "--deadline-s":
            text = value if joined else "".join(args[index + 1 : index + 2])
            with contextlib.suppress(ValueError):
                # A thread cannot wait for longer than some centuries.
                if 0 < float(text) < float("inf"):
                    return min(float(text), 1e8)
    return DoctorOptions.deadline_s


def run(args: list[str], comm: Intracomm, watch: Watch) -> int:
    """Examine the job and report on rank 0; returns the exit code, the same on all ranks. All ranks call it."""
    options = parse(args)
    launched = libraries.launch(os.environ)
    if comm.size == 1 and launched.size > 1 and launched.rank:
        # A run of its own, though launched with others: the first of them speaks for all.
        return EXIT_ERROR
    peers = Peers(comm, watch)
    topology = _topology(options, peers)
    examination = Examination(options.parameters, options.out, topology, peers)
    findings = merge(examination.findings())
    code: int = peers.tell_all(EXIT_ERROR if failed(findings) else EXIT_OK, VERDICT)
    if comm.rank == 0:
        name = called(options.topology, topology(examination.nodes or None))
        title = f"gala-mpi doctor: {comm.size} rank(s), topology {name}"
        output.say(as_json(findings, examination.nodes) if options.json else as_text(findings, title))
    if not examination.healthy:
        _end_all(comm, watch)
    watch.doing = "ending MPI"
    return code


def _topology(options: DoctorOptions, peers: Peers) -> Callable[[Sequence[str] | None], Topology]:
    """The topology, given the node of each rank. Raises UsageError, on all ranks, for a bad one. All ranks call it."""
    name, size = options.topology, peers.comm.size
    peers.watch.doing = f"reading --topology {name}"
    edges: list[Weights] = []
    refusal = ""
    # The others may not see a file of the user's.
    if peers.comm.rank == 0 or name in TOPOLOGIES:
        try:
            graph = make_topology(name, size)
            edges = [] if name in TOPOLOGIES else [graph.rule.sources(rank, 0) for rank in range(size)]
        except UsageError as error:
            refusal = str(error)
    if name not in TOPOLOGIES:
        edges, refusal = peers.tell_all((edges, refusal), EDGES)
    if refusal:
        raise UsageError(refusal)
    return lambda nodes: make_topology(name, size, nodes) if name in TOPOLOGIES else with_edges(name, edges)


def _end_all(comm: Intracomm, watch: Watch) -> None:
    """End a job in which MPI_Finalize would wait for ranks that do not answer: rank 0 does, the others wait for it."""
    if comm.rank == 0:
        # Not at once: a launcher may drop what it has not forwarded yet.
        time.sleep(0.5)
        comm.Abort(EXIT_ERROR)
    time.sleep(watch.left_s())
