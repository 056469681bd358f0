"""The command `gala-mpi train`: reads the configuration, checks it on all ranks at once, and runs the agent."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gala_mpi import __version__, arguments, output
from gala_mpi.config import ConfigError, RunConfig, TrainConfig, UsageError, at_home, load_preset, reaching
from gala_mpi.doctor.libraries import launch, singletons
from gala_mpi.exit_codes import EXIT_DIVERGED, EXIT_ERROR, EXIT_LOST, EXIT_OK, EXIT_STOPPED, EXIT_UNWRITTEN
from gala_mpi.gossip.topology import TOPOLOGIES, Topology, called, make_topology
from gala_mpi.learning.environments import check_environment
from gala_mpi.mpi.collective import RankFailureError, on_all_ranks
from gala_mpi.mpi.waiting import Watchdog
from gala_mpi.stopwatch import profile_table
from gala_mpi.storage.lease import LEASE_FILE, End, Lease
from gala_mpi.storage.resume import check_changes
from gala_mpi.storage.run_folder import (
    RunInfo,
    create_run,
    discard_run,
    holds_a_run,
    reopen_run,
    run_id_of,
    saved_config,
)
from gala_mpi.train.signals import StopRequest, settle
from gala_mpi.user_code import END_OF_PROCESS, let_go

if TYPE_CHECKING:
    from mpi4py import MPI

    from gala_mpi.train.agent import Summary

GRACE_S = 1.0
# Of the 4,096 that a path may have; the rest is for the files of a run.
LONGEST_FOLDER = 3900
# Between the first rank that starts and the last: loading torch from a busy network file system takes minutes.
START_WITHIN_S = 900.0
log = logging.getLogger(__name__)
HELP = "Train a policy: mpirun -n 4 gala-mpi train --env ALE/Pong-v5 --out runs/pong"


def help_text(args: list[str]) -> str:
    """What `gala-mpi train --help` prints, with the defaults of the preset that `args` name."""
    return arguments.help_text(TrainConfig, "train", HELP, load_preset(_option(args, "--preset") or RunConfig.preset))


def run(args: list[str], comm: MPI.Intracomm, stop: StopRequest) -> int:
    """Train; returns the exit code. Collective."""
    settle()
    watchdog = Watchdog(f"[{comm.rank}/{comm.size}]")
    complaint = f"the start of the run: some rank has not come within {START_WITHIN_S:g} s"
    with watchdog.limit(START_WITHIN_S, complaint):
        # One rank reads: a file system may show others an older configuration of the run for a while.
        found = on_all_ranks(comm, lambda: _read(args, comm.size) if comm.rank == 0 else None)
        config, changes = comm.bcast(found)
        _refuse_singletons(comm)
        # Only now: torch takes seconds to import, and a bad setting should be told at once.
        from gala_mpi.train.agent import Agent

        info = reopen_run(config, comm) if config.run.resume else create_run(config, comm)
        lease = Lease(info.folder, info.run_id, info.segment)
        if comm.rank == 0:
            lease.hold()
        try:
            agent = Agent(config, comm, info, lease, watchdog)
        except (UsageError, RankFailureError):
            lease.let_go()
            # Raised on all ranks: none writes the lease any more.
            comm.Barrier()
            _undo(info, lease, comm)
            raise
        except Exception:
            _undo(info, lease, comm)
            raise
    if comm.rank == 0:
        output.say("\n".join([_banner(config, comm, info, agent.topology), *agent.origin, *changes]))
    summary = agent.train(stop)
    code = _exit_code(summary)
    if comm.rank == summary.speaker:
        if config.run.profile:
            output.say(profile_table(summary.profile, summary.updates))
        output.say(_farewell(summary, info, config, taken_over=lease.lost))
        with watchdog.limit(4 * config.exchange.neighbour_timeout_s, f"writing {LEASE_FILE}"):
            # Where checkpoints could not be written, the next start is not to count on them.
            lease.end(End(ended=not summary.unwritten, code=code, steps=summary.total_steps))
    if summary.lost:
        let_go()
        _leave(comm, code, speaks=comm.rank == summary.speaker)
    agent.free()
    return code


def _refuse_singletons(comm: MPI.Intracomm) -> None:
    """Raise UsageError on ranks that the launcher started together, and MPI did not join: all would be rank 0."""
    from gala_mpi.mpi.window import library_version

    for finding in singletons(launch(os.environ), comm.size, library_version()):
        raise UsageError(f"{finding.message}; what helps: {finding.fix} (gala-mpi doctor tells more)")


def _undo(info: RunInfo, lease: Lease, comm: MPI.Intracomm) -> None:
    """Leave the folder as it was before this start, on the rank that made it: the same command may begin again."""
    if comm.rank == 0:
        lease.give_back(info.before)
        discard_run(info)


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
    return EXIT_UNWRITTEN if summary.unwritten else EXIT_OK


def _leave(comm: MPI.Intracomm, code: int, *, speaks: bool) -> NoReturn:
    """End the job without the ranks that are lost: no collective call, MPI_Finalize included, would return."""
    sys.stdout.flush()
    sys.stderr.flush()
    # All files are closed. One rank ends the job, lost processes that still exist too; a launcher may drop what it
    # has not forwarded yet.
    time.sleep(GRACE_S if speaks else 10 * GRACE_S)
    # Should the library not return, for what a dead rank left locked, the process still ends.
    ending = threading.Timer(10 * GRACE_S, END_OF_PROCESS, (code,))
    ending.daemon = True
    ending.start()
    comm.Abort(code)
    END_OF_PROCESS(code)


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
    if resume is not None:
        folder = at_home("resume", Path(resume))
        with reaching("resume", resume):
            if not folder.is_dir():
                what = (
                    "the folder of a run, not a file" if folder.exists() else "the folder of a run; there is none here"
                )
                raise ConfigError("resume", resume, what)
        if preset is None:
            before = saved_config(folder)
    if before is None:
        before = load_preset(RunConfig.preset if preset is None else preset)
    env = before.environment.env
    # The module before the colon is imported: no file may choose what code runs.
    if ":" in env and _option(args, "--env") != env:
        name, value = ("preset", preset) if preset is not None else ("resume", resume)
        raise ConfigError(name, value, f"one whose environment needs no import, or --env {env} beside it to allow it")
    return arguments.parse(TrainConfig, "train", HELP, args, before)


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
        path = str(Path(name).absolute())
        if path != path.encode(errors="replace").decode():
            raise ConfigError("topology", name, "an edge list whose path is UTF-8: it is kept in the configuration")
        config = replace(config, exchange=replace(config.exchange, topology=path))
    check_environment(config.environment.env)
    out, resume = config.record.out, config.run.resume
    if out is not None and resume is not None:
        raise ConfigError("out", str(out), "nothing with --resume: the run stays in its folder")
    if resume is not None:
        run_id_of(resume)
    if out is not None:
        with reaching("out", out):
            if len(os.fsencode(out.absolute())) > LONGEST_FOLDER:
                raise ConfigError("out", str(out), f"a path of at most {LONGEST_FOLDER} bytes: names come below it")
            if out.exists() and not out.is_dir():
                raise ConfigError("out", str(out), "a folder, not a file")
            if out.is_dir() and holds_a_run(out):
                raise ConfigError("out", str(out), "a folder that holds no run yet (--resume goes on with one)")
    return config


def _banner(config: TrainConfig, comm: MPI.Intracomm, info: RunInfo, topology: Topology | None) -> str:
    from gala_mpi.mpi.window import library_version

    exchange = config.exchange.exchange
    how = f"{exchange} over {_graph(config, topology)}" if topology is not None else f"exchange {exchange}"
    ranks = "1 rank" if comm.size == 1 else f"{comm.size} ranks"
    return (
        f"gala-mpi {__version__}: {config.environment.env}, {ranks} x {config.environment.simulators} "
        f"simulators, {how}, {library_version()}\nmetrics in {info.folder}"
    )


def _graph(config: TrainConfig, topology: Topology) -> str:
    """What it is, and that `auto` has chosen it, if so."""
    if topology.name not in TOPOLOGIES:
        return f"the edge list {topology.name}"
    return f"topology {called(config.exchange.topology, topology)}"


def _farewell(summary: Summary, info: RunInfo, config: TrainConfig, *, taken_over: bool) -> str:
    from gala_mpi.train.monitor import returns_line

    returns = returns_line(summary.overview)
    ended = f"stopped ({summary.stopped})" if summary.stopped else "finished"
    speed = summary.new_steps / max(summary.seconds, 1e-9)
    missed = f"lost ranks: {', '.join(map(str, summary.lost))}\n" if summary.lost else ""
    missed += f"ranks that ended by an error: {', '.join(map(str, summary.failed))}\n" if summary.failed else ""
    if summary.unwritten:
        ranks = ", ".join(map(str, summary.unwritten))
        missed += (
            f"ranks that could not write all metrics, or their last checkpoint: {ranks} (make room there, or put the "
            "folder back)\n"
        )
    missed += f"ranks that diverged: {', '.join(map(str, summary.diverged))}\n" if summary.diverged else ""
    left = config.run.total_steps - summary.total_steps
    if taken_over or not info.folder.is_dir():
        onward = ""
    elif summary.stopped or left > 0:
        # A module is imported only if the command line names it.
        env = config.environment.env
        onward = f"; go on with --resume {info.folder}" + (f" --env {env}" if ":" in env else "")
    else:
        onward = "" if summary.new_steps else f"; all {config.run.total_steps:,} steps were taken before: --total-steps"
    steps = f"{summary.total_steps:,} steps" + (f", {summary.new_steps:,} of them" if info.segment else "")
    return missed + (
        f"{ended}: {steps} in {summary.seconds:,.1f} s ({speed:,.0f} steps/s), {returns}\n"
        f"metrics in {info.folder}{onward}"
    )
