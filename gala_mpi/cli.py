"""The command line: finds the command, listens to signals, and runs it under MPI."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

from gala_mpi import __version__, output
from gala_mpi.config import UsageError
from gala_mpi.exit_codes import EXIT_CONFIG, EXIT_ERROR, EXIT_OK
from gala_mpi.mpi.collective import RankFailureError
from gala_mpi.train.signals import StopRequest, heard_by
from gala_mpi.user_code import let_go, tell

if TYPE_CHECKING:
    from mpi4py import MPI

HELP_OF_ALL = """usage: gala-mpi [COMMAND] [OPTIONS]

commands, each with a --help of its own:
  train      train a policy; the command may be left out
             mpirun -n 4 gala-mpi train --env ALE/Pong-v5 --out runs/pong
             mpirun -n 4 gala-mpi train --resume runs/pong
  doctor     examine MPI, the nodes and the file system before a run
             mpirun -n 4 gala-mpi doctor
  status     say whether runs go on, or how they have ended
             gala-mpi status runs/pong
  topology   describe and draw who sends to whom
             gala-mpi topology hierarchical --size 16 --ranks-per-node 4 --draw graph.png
  bench      measure what an exchange costs, beside memcpy and all-reduce
             mpirun -n 2 gala-mpi bench

  --version  print the version
  --help     print this; `gala-mpi train --help` lists all settings of a run
"""
# Ranks of a large job come one after another. Whoever dies before MPI has started is missed by nobody else.
START_WITHIN_S = 600.0
START_VARIABLE = "GALA_MPI_START_TIMEOUT_S"
LONGEST_START_S = 1e6
# All ranks have met before; a library that has many connections to close may take some time.
END_WITHIN_S = 30.0
RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def main() -> NoReturn:
    """The command `gala-mpi`."""
    output.guard()
    args = sys.argv[1:]
    if "--version" in args:
        sys.exit(_print_once(f"gala-mpi {__version__}"))
    if args and all(arg in ("--help", "-h") for arg in args):
        sys.exit(_print_once(HELP_OF_ALL))
    # The default command may be left out; others stand first.
    command, rest = (args[0], args[1:]) if args and args[0] in COMMANDS else ("train", args)
    if "--help" in rest or "-h" in rest:
        sys.exit(_help(command, rest))
    if command == "train" and rest and not rest[0].startswith("-"):
        sys.exit(_refuse_once(UsageError(f"{rest[0]!r} is no command; allowed: {', '.join(COMMANDS)}")))
    sys.exit(COMMANDS[command](rest))


def _help(command: str, args: list[str]) -> int:
    try:
        return _print_once(HELP[command](args))
    except UsageError as error:
        return _refuse_once(error)


def train(args: list[str]) -> int:
    """Train; returns the exit code. Collective over all ranks of the job."""
    stop = StopRequest()

    def run(comm: MPI.Intracomm) -> int:
        from gala_mpi.train import command as train_command

        return train_command.run(args, comm, stop)

    # Before all that takes long: a job may be preempted while it loads its libraries, and others wait in MPI's start
    # for a rank that an exception ends there.
    with heard_by(stop):
        return under_mpi("train", run)


def topology(args: list[str]) -> int:
    """Describe and draw a topology; returns the exit code. Local: without MPI."""
    from gala_mpi.graphs import command as topology_report

    try:
        return _print_once(topology_report.report(args))
    except UsageError as error:
        return _refuse_once(error)


def status(args: list[str]) -> int:
    """Say how runs stand; returns the exit code. Local: without MPI."""
    from gala_mpi.status import command as status_report

    try:
        text, code = status_report.report(args)
    except UsageError as error:
        return _refuse_once(error)
    _print_once(text)
    return code


def doctor(args: list[str]) -> int:
    """Examine MPI, the nodes and the file system; returns the exit code. All ranks of the job call it."""
    from gala_mpi.doctor import command as examiner

    watch = examiner.start_watch(args)
    return under_mpi("doctor", lambda comm: examiner.run(args, comm, watch))


def bench(args: list[str]) -> int:
    """Measure the cost of an exchange; returns the exit code. Collective over all ranks of the job."""
    from gala_mpi.bench import command as benchmark

    watch = benchmark.start_watch(args)
    return under_mpi("bench", lambda comm: benchmark.run(args, comm, watch))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "status": status,
    "topology": topology,
    "doctor": doctor,
    "bench": bench,
}


def under_mpi(command: str, run: Callable[[MPI.Intracomm], int]) -> int:
    """The exit code of `run`, a command's work, on all ranks. An exception on any rank ends the job. Collective."""
    _look_ahead(command)
    try:
        # That import starts MPI, with the interpreter's lock held.
        with _start_limit(command):
            from mpi4py import MPI
    except UsageError as error:
        return _refuse_once(error)
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        return _refuse_once(UsageError(f"no MPI library can be loaded ({reason}); {_remedy()}"))
    comm = MPI.COMM_WORLD
    logging.basicConfig(format=f"[{comm.rank}/{comm.size}] %(levelname)s: %(message)s", stream=output.stderr())
    try:
        code = run(comm)
    except UsageError as error:
        # Raised on all ranks alike: one of them speaks.
        # Ranks that the launcher could not join are all rank 0: it knows them apart.
        speaks = comm.rank == 0 and (comm.size > 1 or _speaks_for_launcher())
        code = refuse(error) if speaks else error.exit_code
    except RankFailureError as error:
        # Raised on all ranks alike: they end together.
        if error.__cause__ is not None:
            tell(error.__cause__, comm.rank, comm.size)
        code = EXIT_ERROR
    except BaseException as error:
        let_go()
        tell(error, comm.rank, comm.size)
        # The other ranks may wait for this one in a collective call: end them too.
        # But not at once: a launcher may drop what it has not forwarded yet.
        time.sleep(0.5)
        comm.Abort(EXIT_ERROR)
        code = EXIT_ERROR
    _end(code)
    return code


def _remedy() -> str:
    """What helps where mpi4py finds no MPI library; of the one that is there, if its compiler is."""
    compiler = shutil.which("mpicc")
    if compiler is None:
        return "load your site's MPI, or install one: pip install mpich"
    # Without its cache pip would take what it has built for another library.
    build = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary mpi4py mpi4py"
    return f"build mpi4py for the MPI of this machine: MPICC={shlex.quote(compiler)} {build}"


def _end(code: int) -> None:
    """End MPI, and see that the process ends. What the run came to is known by now."""
    from mpi4py import MPI

    from gala_mpi import _native

    let_go()
    # MPI's end holds the interpreter's lock: a thread without Python watches it.
    complaint = (
        f"gala-mpi: warning: the end of MPI has not returned within {END_WITHIN_S:g} s; this process ends without it"
    )
    with contextlib.suppress(MPI.Exception):
        if not MPI.Is_finalized():
            _native.watch(END_WITHIN_S, f"{complaint}\n", code)
            MPI.Finalize()
    # A user's code may have left threads that Python would wait for.
    _native.watch(END_WITHIN_S, "", code)


def refuse(error: UsageError) -> int:
    """Say what cannot be done; returns the exit code for it."""
    output.complain(f"gala-mpi: error: {error}")
    return error.exit_code


def train_help(args: list[str]) -> str:
    """What `gala-mpi train --help` prints, with the defaults of the preset that `args` name."""
    from gala_mpi.train import command as train_command

    return train_command.help_text(args)


def topology_help(args: list[str]) -> str:
    """What `gala-mpi topology --help` prints."""
    from gala_mpi.graphs import command as topology_report

    return topology_report.help_text(args)


def status_help(args: list[str]) -> str:
    """What `gala-mpi status --help` prints."""
    from gala_mpi.status import command as status_report

    return status_report.help_text(args)


def doctor_help(args: list[str]) -> str:
    """What `gala-mpi doctor --help` prints."""
    from gala_mpi.doctor import command as examiner

    return examiner.help_text(args)


def bench_help(args: list[str]) -> str:
    """What `gala-mpi bench --help` prints."""
    from gala_mpi.bench import command as benchmark

    return benchmark.help_text(args)


HELP: dict[str, Callable[[list[str]], str]] = {
    "train": train_help,
    "status": status_help,
    "topology": topology_help,
    "doctor": doctor_help,
    "bench": bench_help,
}


def _look_ahead(command: str) -> None:
    """Say what MPI will not get over as it starts: it would end without a word of the reason, or never."""
    # Not at the top: help and version need none of it.
    from gala_mpi.doctor import libraries, storage
    from gala_mpi.mpi.room import SHARED_MEMORY, room

    launched = libraries.launch(os.environ)
    here = libraries.ranks_here(launched, os.environ)
    small = storage.too_small_to_start(room(SHARED_MEMORY), here)
    barred = "" if launched.launcher else storage.way_barred(os.getpid())
    for warning in filter(None, (small, barred)):
        if libraries.speaks_for_node(launched, os.environ):
            output.complain(f"gala-mpi {command}: warning: {warning}")


@contextlib.contextmanager
def _start_limit(command: str) -> Iterator[None]:
    """End the process if the block takes too long: some rank has died before it came there, and is waited for.

    A thread without Python does that, since no signal is heard either. Raises UsageError.
    """
    from gala_mpi import _native
    from gala_mpi.doctor import libraries

    given = os.environ.get(START_VARIABLE, "") or str(START_WITHIN_S)
    try:
        within_s = float(given)
    except ValueError:
        within_s = math.nan
    if not 0 < within_s <= LONGEST_START_S:
        allowed = f"a number of seconds above 0, up to {LONGEST_START_S:,.0f}"
        raise UsageError(f"{START_VARIABLE}: {given!r} cannot be used; expected {allowed}")
    complaint = (
        f"gala-mpi {command}: error: MPI has not started within {within_s:g} s ({START_VARIABLE}); some rank has not "
        "come so far: it may have died, or its node is slow\n"
    )
    speaks = libraries.speaks_for_node(libraries.launch(os.environ), os.environ)
    _native.watch(within_s, complaint if speaks else "")
    try:
        yield
    finally:
        _native.watch(0, "")


def _speaks_for_launcher() -> bool:
    """Whether this is the first process that the launcher started, or the only one; without starting MPI."""
    ranks = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
    return not ranks or ranks[0] == "0"


def _refuse_once(error: UsageError) -> int:
    """Say what cannot be done, on one rank, without starting MPI."""
    return refuse(error) if _speaks_for_launcher() else EXIT_CONFIG


def _print_once(text: str) -> int:
    """Print on one rank, without starting MPI: help works on a login node too."""
    if _speaks_for_launcher():
        output.say(text)
    return EXIT_OK
