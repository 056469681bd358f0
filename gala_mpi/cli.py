"""The command line: reads the configuration, checks it on all ranks at once, and runs the agent.

Exit codes: 0 the budget or the time limit is reached; 1 an error, with its traceback; 2 a setting that cannot be used;
3 as 0, but ranks were lost on the way; 4 as 0, but ranks ended as their parameters were not finite; 5 as 0 or 75, but
not all could be written; 75 stopped by a signal before that: --resume goes on.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gala_mpi import __version__, arguments
from gala_mpi.collective import on_all_ranks
from gala_mpi.config import ConfigError, RunConfig, TrainConfig, UsageError, load_preset
from gala_mpi.environments import check_environment
from gala_mpi.lease import LEASE_FILE, Lease
from gala_mpi.resume import check_changes
from gala_mpi.run_folder import RunInfo, create_run, discard_run, holds_a_run, reopen_run, run_id_of, saved_config
from gala_mpi.signals import StopRequest, heard_by
from gala_mpi.stopwatch import profile_table
from gala_mpi.topology import TOPOLOGIES, make_topology
from gala_mpi.waiting import Watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

    from gala_mpi.agent import Summary

EXIT_ERROR, EXIT_CONFIG, EXIT_LOST, EXIT_DIVERGED, EXIT_UNWRITTEN, EXIT_STOPPED = 1, 2, 3, 4, 5, 75
GRACE_S = 1.0
# Between the first rank that starts and the last: loading torch from a busy network file system takes minutes.
START_WITHIN_S = 900.0
OTHERS = """
Other commands, each with a --help of its own:
  gala-mpi topology   degrees, mixing weights and spectral gap of a topology, and a drawing
  gala-mpi doctor     examine MPI, the nodes and the file system (under mpirun or srun)
  gala-mpi bench      measure the cost of an exchange (under mpirun or srun)
"""
TRAIN_HELP = "Train a policy: mpirun -n 4 gala-mpi train --env ALE/Pong-v5 --out runs/pong"
RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def main() -> NoReturn:
    """The command `gala-mpi`."""
    args = sys.argv[1:]
    if "--version" in args:
        sys.exit(_print_once(f"gala-mpi {__version__}"))
    # The default command may be left out; others stand first.
    command, rest = (args[0], args[1:]) if args and args[0] in COMMANDS else ("train", args)
    if "--help" in rest or "-h" in rest:
        sys.exit(_print_once(HELP[command](rest) + (OTHERS if command == "train" else "")))
    if command == "train" and rest and not rest[0].startswith("-"):
        sys.exit(_refuse_once(UsageError(f"{rest[0]!r} is no command; allowed: {', '.join(COMMANDS)}")))
    sys.exit(COMMANDS[command](rest))


def train(args: list[str]) -> int:
    """Train; returns the exit code. Collective over all ranks of the job."""
    stop = StopRequest()
    # From the start on: a job may be preempted before its first update, and others wait in MPI's start for a rank that
    # an exception ends there.
    with heard_by(stop):
        return under_mpi(lambda comm: _train(args, comm, stop))


def topology(args: list[str]) -> int:
    """Describe and draw a topology; returns the exit code. Local: without MPI."""
    from gala_mpi.graphs import command as topology_report

    try:
        return _print_once(topology_report.report(args))
    except UsageError as error:
        return _refuse_once(error)


def doctor(args: list[str]) -> int:
    """Examine MPI, the nodes and the file system; returns the exit code. All ranks of the job call it."""
    from gala_mpi.doctor import command as examiner

    watch = examiner.start_watch(args)
    return under_mpi(lambda comm: examiner.run(args, comm, watch))


def bench(args: list[str]) -> int:
    """Measure the cost of an exchange; returns the exit code. Collective over all ranks of the job."""
    from gala_mpi.bench import command as benchmark

    watch = benchmark.start_watch(args)
    return under_mpi(lambda comm: benchmark.run(args, comm, watch))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "topology": topology,
    "doctor": doctor,
    "bench": bench,
}


def under_mpi(run: Callable[[MPI.Intracomm], int]) -> int:
    """The exit code of `run` on all ranks of the job. An exception on any rank ends the job. Collective."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        print(
            f"gala-mpi: error: no MPI library can be loaded ({reason}); load your site's MPI, or install one with "
            "pip install 'gala-mpi[mpich]'",
            file=sys.stderr,
        )
        return EXIT_CONFIG
    comm = MPI.COMM_WORLD
    logging.basicConfig(format=f"[{comm.rank}/{comm.size}] %(levelname)s: %(message)s", stream=sys.stderr)
    try:
        return run(comm)
    except UsageError as error:
        # Raised on all ranks alike: one of them speaks.
        # Ranks that the launcher could not join are all rank 0: it knows them apart.
        return refuse(error) if comm.rank == 0 and (comm.size > 1 or _speaks_for_launcher()) else EXIT_CONFIG
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        for line in traceback.format_exc().splitlines():
            print(f"[{comm.rank}/{comm.size}] {line}", file=sys.stderr)
        sys.stderr.flush()
        # The other ranks may wait for this one in a collective call: end them too.
        # But not at once: a launcher may drop what it has not forwarded yet.
        time.sleep(0.5)
        comm.Abort(EXIT_ERROR)
        return EXIT_ERROR


def refuse(error: UsageError) -> int:
    """Say what cannot be done; returns the exit code for it."""
    print(f"gala-mpi: error: {error}", file=sys.stderr, flush=True)
    return EXIT_CONFIG


def _train(args: list[str], comm: MPI.Intracomm, stop: StopRequest) -> int:
    watchdog = Watchdog(f"[{comm.rank}/{comm.size}]")
    complaint = f"the start of the run: some rank has not come within {START_WITHIN_S:g} s"
    with watchdog.limit(START_WITHIN_S, complaint):
        # One rank reads: a file system may show others an older configuration of the run for a while.
        found = on_all_ranks(comm, lambda: _read(args, comm.size) if comm.rank == 0 else None)
        config, changes = comm.bcast(found)
        # Only now: torch takes seconds to import, and a bad setting should be told at once.
        from gala_mpi.agent import Agent

        info = reopen_run(config, comm) if config.run.resume else create_run(config, comm)
        lease = Lease(info.folder, info.segment)
        if comm.rank == 0:
            lease.hold()
        try:
            agent = Agent(config, comm, info, lease, watchdog)
        except UsageError:
            lease.end(begun=False)
            if comm.rank == 0:
                discard_run(info)
            raise
    if comm.rank == 0:
        print("\n".join([_banner(config, comm, info), *agent.origin, *changes]), flush=True)
    summary = agent.train(stop)
    if comm.rank == summary.speaker:
        if config.run.profile:
            print(profile_table(summary.profile, summary.updates))
        print(_farewell(summary, info, config, taken_over=lease.lost), flush=True)
        with watchdog.limit(4 * config.exchange.neighbour_timeout_s, f"writing {LEASE_FILE}"):
            lease.end()
    code = _exit_code(summary)
    if summary.lost:
        _leave(comm, code, speaks=comm.rank == summary.speaker)
    agent.free()
    return code


def _exit_code(summary: Summary) -> int:
    if summary.failed:
        return EXIT_ERROR
    if summary.stopped:
        # Whoever goes on by itself with what was stopped would lose the same again and again.
        return EXIT_UNWRITTEN if summary.unwritten else EXIT_STOPPED
    if summary.lost:
        return EXIT_LOST
    if summary.diverged:
        return EXIT_DIVERGED
    return EXIT_UNWRITTEN if summary.unwritten else 0


def _leave(comm: MPI.Intracomm, code: int, *, speaks: bool) -> NoReturn:
    """End the job without the ranks that are lost: no collective call, MPI_Finalize included, would return."""
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are closed. One rank ends the job, lost processes that still exist too; a launcher may drop what it
    # has not forwarded yet.
    time.sleep(GRACE_S if speaks else 10 * GRACE_S)
    # Should the library not return, for what a dead rank left locked, the process still ends.
    ending = threading.Timer(10 * GRACE_S, os._exit, (code,))
    ending.daemon = True
    ending.start()
    comm.Abort(code)
    os._exit(code)


def _read(args: list[str], size: int) -> tuple[TrainConfig, list[str]]:
    """The configuration, checked, and what has changed in it since the run that it resumes."""
    config = check(parse(args), size)
    folder = config.run.resume
    before = None if folder is None else saved_config(folder)
    if folder is None:
        return config, []
    if before is None:
        return config, [f"{folder} holds no configuration: all settings are those given here, or the preset's"]
    return config, check_changes(before, config, folder)


def parse(args: list[str]) -> TrainConfig:
    """The configuration that the arguments describe, on top of the preset that they name, or the run they resume."""
    preset, resume = _option(args, "--preset"), _option(args, "--resume")
    before = None
    if resume is not None and not Path(resume).is_dir():
        raise ConfigError("resume", resume, "the folder of a run, which is there")
    if resume is not None and preset is None:
        before = saved_config(Path(resume))
        env = before.environment.env if before else ""
        # Gymnasium imports the module before the colon: no run's folder may choose what code runs.
        if ":" in env and _option(args, "--env") != env:
            raise ConfigError("resume", resume, f"a run whose environment needs no import, or --env {env} to allow it")
    if before is None:
        before = load_preset(RunConfig.preset if preset is None else preset)
    return arguments.parse(TrainConfig, "train", TRAIN_HELP, args, before)


def _option(args: list[str], name: str) -> str | None:
    """The last value that the arguments give an option, before they are parsed."""
    value = None
    for index, arg in enumerate(args):
        if arg == name and index + 1 < len(args):
            value = args[index + 1]
        elif arg.startswith(f"{name}="):
            value = arg.partition("=")[2]
    return value


def check(config: TrainConfig, size: int) -> TrainConfig:
    """The configuration, if `size` ranks can run it as far as can be told before anything is made.

    It names an edge list wherever the run may go on from.
    """
    name = config.exchange.topology
    make_topology(name, size)
    if name not in TOPOLOGIES:
        config = replace(config, exchange=replace(config.exchange, topology=str(Path(name).absolute())))
    check_environment(config.environment.env)
    out, resume = config.record.out, config.run.resume
    if out is not None and resume is not None:
        raise ConfigError("out", str(out), "nothing with --resume: the run stays in its folder")
    if resume is not None:
        run_id_of(resume)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError("out", str(out), "a folder, not a file")
    if out is not None and out.is_dir() and holds_a_run(out):
        raise ConfigError("out", str(out), "a folder that holds no run yet (--resume goes on with one)")
    return config


def help_text(args: list[str]) -> str:
    """What `gala-mpi train --help` prints, with the defaults of the preset that `args` name."""
    preset = args[args.index("--preset") + 1] if "--preset" in args[:-1] else RunConfig.preset
    return arguments.help_text(TrainConfig, "train", TRAIN_HELP, load_preset(preset))


def topology_help(args: list[str]) -> str:
    """What `gala-mpi topology --help` prints."""
    from gala_mpi.graphs import command as topology_report

    return topology_report.help_text(args)


def doctor_help(args: list[str]) -> str:
    """What `gala-mpi doctor --help` prints."""
    from gala_mpi.doctor import command as examiner

    return examiner.help_text(args)


def bench_help(args: list[str]) -> str:
    """What `gala-mpi bench --help` prints."""
    from gala_mpi.bench import command as benchmark

    return benchmark.help_text(args)


HELP: dict[str, Callable[[list[str]], str]] = {
    "train": help_text,
    "topology": topology_help,
    "doctor": doctor_help,
    "bench": bench_help,
}


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
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # Who reads has seen enough; nothing is to be flushed at the end either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _banner(config: TrainConfig, comm: MPI.Intracomm, info: RunInfo) -> str:
    from gala_mpi.window import library_version

    exchange = config.exchange.exchange
    topology = config.exchange.topology
    graph = f"a {topology}" if topology in TOPOLOGIES else f"the edge list {topology}"
    how = f"{exchange} over {graph}" if exchange == "gossip" else f"exchange {exchange}"
    ranks = "1 rank" if comm.size == 1 else f"{comm.size} ranks"
    return (
        f"gala-mpi {__version__}: {config.environment.env}, {ranks} x {config.environment.simulators} "
        f"simulators, {how}, {library_version()}\nmetrics in {info.folder}"
    )


def _farewell(summary: Summary, info: RunInfo, config: TrainConfig, *, taken_over: bool) -> str:
    from gala_mpi.monitor import returns_line

    returns = returns_line(summary.overview)
    ended = f"stopped ({summary.stopped})" if summary.stopped else "finished"
    speed = summary.new_steps / max(summary.seconds, 1e-9)
    missed = f"lost ranks: {', '.join(map(str, summary.lost))}\n" if summary.lost else ""
    missed += f"ranks that ended by an error: {', '.join(map(str, summary.failed))}\n" if summary.failed else ""
    if summary.unwritten:
        ranks = ", ".join(map(str, summary.unwritten))
        missed += f"ranks that could not write all metrics, or their last checkpoint: {ranks} (make room there)\n"
    missed += f"ranks that diverged: {', '.join(map(str, summary.diverged))}\n" if summary.diverged else ""
    left = config.run.total_steps - summary.total_steps
    if taken_over:
        onward = ""
    elif summary.stopped or left > 0:
        onward = f"; go on with --resume {info.folder}"
    else:
        onward = "" if summary.new_steps else f"; all {config.run.total_steps:,} steps were taken before: --total-steps"
    steps = f"{summary.total_steps:,} steps" + (f", {summary.new_steps:,} of them" if info.segment else "")
    return missed + (
        f"{ended}: {steps} in {summary.seconds:,.1f} s ({speed:,.0f} steps/s), {returns}\n"
        f"metrics in {info.folder}{onward}"
    )
