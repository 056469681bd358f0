"""Launching MPI programs from tests: as a subprocess, with a deadline and a clean environment.

The pytest process never imports mpi4py.MPI. Two MPI libraries are used: the one of the environment that runs
the tests, and a second one in an environment that GALA_MPI_SECOND_ENV names (by default .venv-openmpi beside the
tests' folder; `make test` sets both up).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cluster import Cluster, ClusterUnavailable

ROOT = Path(__file__).resolve().parent.parent
# Absolute, as tests change the folder; not resolved, as an environment is where its link to Python lies.
SECOND_ENV = Path(os.environ.get("GALA_MPI_SECOND_ENV", ROOT / ".venv-openmpi")).absolute()
# Who is started in the background of a script, or by nohup, ignores one of these. So would all that the tests start,
# shells for good.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Open MPI's launcher does not start where a killed one that had its process number left a session folder.
SESSIONS = tempfile.TemporaryDirectory(prefix="mpi-", ignore_cleanup_errors=True)
# Tests pass on a machine that does other work too: a load of 12 on 2 cores makes everything some six times as long.
PATIENCE = 4
LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "PRTE_", "OMPI_", "MPIR_CVAR_", "HYDRA_", "SLURM_", "FI_", "UCX_")


@dataclass(frozen=True)
class Mpi:
    """An MPI library: its launcher, and a Python whose mpi4py uses it."""

    name: str
    mpirun: str
    python: str
    environment: tuple[tuple[str, str], ...] = ()
    prefix: tuple[str, ...] = ()  # before the launcher
    options: tuple[str, ...] = ()  # of the launcher
    under: tuple[str, ...] = ()  # before Python

    def command(self, size: int, *args: str) -> list[str]:
        """The command line that runs Python with `args` on `size` ranks."""
        return [*self.prefix, self.mpirun, *self.options, "-n", str(size), *self.under, self.python, *args]

    def surviving(self) -> Mpi:
        """The library with a launcher that lets the survivors of a killed rank go on."""
        if self.name == "openmpi":
            return replace(self, options=("--enable-recovery",))
        return replace(self, options=("-disable-auto-cleanup",), under=("sh", str(ROOT / "jobs" / "outlive.sh")))

    def start(
        self, size: int, *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start Python with `args` on `size` ranks, in a process group of its own."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        return subprocess.Popen(
            self.command(size, *args),
            env={**clean, "TMPDIR": tempfile.mkdtemp(dir=SESSIONS.name), **dict(self.environment), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            start_new_session=True,
        )

    def run(
        self,
        size: int,
        *args: str,
        timeout_s: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with `args` on `size` ranks to its end; `finish` says what `timeout_s` is."""
        return finish(self.start(size, *args, env=env, cwd=cwd), timeout_s)


def finish(process: subprocess.Popen[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Wait for a started job; a hang is a failure, and leaves no process behind.

    `timeout_s` is far more than the job takes on a machine of its own. Beside other work it has PATIENCE times as long.
    """
    timeout_s *= PATIENCE
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # Open MPI's launcher keeps what starts its daemons in process groups of their own, with our pipes open.
        kill(process)
        out, err = process.communicate()
        pytest.fail(f"no end after {timeout_s:g} s: {process.args}\n{out[-2000:]}\n{err[-4000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a started job, launcher and all."""
    for pid in (*_descendants(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank below the launcher, found by the launcher's variables in its environment."""
    names = {f"{name}={rank}".encode() for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK")}
    for pid in _descendants(launcher):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # A shell that starts a rank has its variables too.
            is_shell = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sh\0")
            if not is_shell and names & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                return pid
    pytest.fail(f"no process of rank {rank}")


def _descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and theirs in turn."""
    children: list[int] = []
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            children += map(int, path.read_text().split())
    return children + [below for child in children for below in _descendants(child)]


def _mpis() -> dict[str, Mpi]:
    found = {}
    for python in (Path(sys.executable), SECOND_ENV / "bin" / "python"):
        mpirun = python.parent / "mpirun"
        launcher = str(mpirun) if mpirun.exists() else shutil.which("mpirun")
        if not python.exists() or launcher is None:
            continue
        version = subprocess.run([launcher, "--version"], capture_output=True, text=True, check=False).stdout
        if "Open MPI" in version or "PRRTE" in version:
            environment = {
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            }
            found["openmpi"] = Mpi("openmpi", launcher, str(python), tuple(environment.items()))
        else:
            found["mpich"] = Mpi("mpich", launcher, str(python))
    return found


MPIS = _mpis()
STARTS_RANKS = {"mpi", "mpis", "one_mpi", "mpich", "cluster"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts ranks: `make check` leaves it out, but for one test of each kind. What is slow comes first.

    A long test that comes last would run alone.
    """
    for item in items:
        if STARTS_RANKS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("job")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _get(name: str) -> Mpi:
    if name not in MPIS:
        if os.environ.get("GALA_MPI_REQUIRE_BOTH"):
            pytest.fail(f"{name} is required but was not found")
        pytest.skip(f"no {name} here: `make test` sets it up")
    return MPIS[name]


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: the folder that `make` fills for all tests that read it, whatever worker comes first."""
    # That of a worker lies in the one of the session.
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / "once" / name
        folder.parent.mkdir(exist_ok=True)
        with Path(f"{folder}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                folder.mkdir()
                make(folder)
                Path(f"{folder}.made").touch()
        if not Path(f"{folder}.made").exists():
            pytest.fail(f"{name} could not be made: the test that came first tells why")
        return folder

    return made


@pytest.fixture(params=["mpich", "openmpi"])
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """Each of the two MPI libraries in turn."""
    return _get(request.param)


@pytest.fixture
def mpis() -> dict[str, Mpi]:
    """Both libraries by name."""
    return {name: _get(name) for name in ("mpich", "openmpi")}


def either() -> Mpi:
    """The library that `one_mpi` is."""
    return MPIS.get("mpich") or _get("openmpi")


@pytest.fixture
def one_mpi() -> Mpi:
    """Either MPI library, for what does not depend on it."""
    return either()


@pytest.fixture
def mpich() -> Mpi:
    """MPICH, for what only it can do."""
    return _get("mpich")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Three hosts with links of 1 Gbit/s: `cluster.mpi(mpi).run(3, ...)` runs one rank on each."""
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster())
        except ClusterUnavailable as error:
            if os.environ.get("GALA_MPI_REQUIRE_CLUSTER"):
                pytest.fail(f"a virtual cluster is required: {error}")
            pytest.skip(f"no virtual cluster: {error}")
        yield cluster
