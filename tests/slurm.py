"""A Slurm of two nodes on one machine, for as long as a `with` block: tests/slurm.sh starts it and ends it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

SCRIPT = Path(__file__).with_name("slurm.sh")
NONE: Mapping[str, str] = MappingProxyType({})
BASES = Path("/tmp")  # munge's own user reads a part of it, which it may not in a folder of pytest's
WAIT_S = 400


class SlurmUnavailable(Exception):
    """This machine or this user cannot have a Slurm."""


class Slurm:
    """Slurm, its commands, and the folder that jobs are submitted from. `environment` is that of all commands."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.base = BASES / f"gala-mpi-slurm-{os.getpid()}"
        # Jobs may begin again after some seconds, and a node is down after some more.
        settings = {"PORT": str(_free_ports(3)), "REQUEUE_S": "5", "TIMEOUT_S": "15", "KILL_WAIT_S": "5"}
        self.environment = {
            **environment,
            **settings,
            "BASE": str(self.base),
            "SLURM_CONF": str(self.base / "slurm.conf"),
        }

    def __enter__(self) -> Slurm:
        if os.geteuid() != 0:
            raise SlurmUnavailable("only root can start one")
        remove_leftovers()
        try:
            self.script("start")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise SlurmUnavailable(f"{error.stdout}{error.stderr}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.script("clean")

    def script(self, *args: str) -> None:
        """Do something with the daemons: what tests/slurm.sh can be told."""
        self.run("bash", str(SCRIPT), *args)

    def run(self, *command: str, env: Mapping[str, str] = NONE, cwd: Path | None = None, check: bool = True) -> str:
        """What a command prints. Raises CalledProcessError, if `check`."""
        done = subprocess.run(
            command,
            env={**self.environment, **env},
            cwd=cwd,
            check=check,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.stdout + ("" if check else done.stderr)

    def submit(self, folder: Path, *command: str, env: Mapping[str, str] = NONE) -> int:
        """Submit a job from a folder; its number."""
        return int(self.run("sbatch", "--parsable", *command, env=env, cwd=folder).strip())

    def fact(self, job: int, name: str) -> str:
        """What Slurm says of a job, such as its JobState; of an array, of its first member."""
        said = self.run("scontrol", "show", "job", str(job), check=False)
        found = re.search(rf"\b{name}=(\S+)", said)
        return found[1] if found else ""

    def exit_code(self, job: int) -> int:
        """Wait for the end of a job; its exit code, or minus the signal that ended it."""
        wait_for(lambda: self.fact(job, "JobState") in ENDED, f"the end of job {job}")
        code, _, number = self.fact(job, "ExitCode").partition(":")
        return int(code) or -int(number)

    def warn(self, job: int) -> None:
        """Tell a job of its time limit, as its --signal=B:USR1@300 does."""
        self.run("scancel", "--batch", "--signal=USR1", str(job))


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


def wait_for(happened: Callable[[], object], what: str) -> None:
    """Wait until something has happened."""
    deadline = time.monotonic() + WAIT_S
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.2)


def remove_leftovers() -> None:
    """End the daemons of sessions that are dead."""
    for base in BASES.glob("gala-mpi-slurm-*"):
        pid = base.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            for file in base.rglob("*.pid"):
                with contextlib.suppress(OSError, ValueError):
                    number = int(file.read_text())
                    # Process numbers come again.
                    if str(base).encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                        os.kill(number, signal.SIGKILL)
            shutil.rmtree(base, ignore_errors=True)


def _free_ports(count: int) -> int:
    """The first of some ports in a row that nobody listens at."""
    for first in range(17000 + os.getpid() % 1000 * 4, 30000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return first
    raise SlurmUnavailable("no port is free")
