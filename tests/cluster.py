"""A cluster on one machine: hosts are network namespaces with their own name, TCP stack, link and shared memory.

    with Cluster() as cluster:
        done = cluster.mpi(mpich, ranks_per_host=2).run(6, "program.py")

The hosts node0, node1, ... hang on a bridge, which has a namespace of its own as well, where the MPI launcher
runs: nothing of it appears among the machine's own interfaces, and two clusters may use the same addresses.
Every link is limited to `rate` in each direction. The CPUs and the files are shared, as is the process table.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Mpi

AGENT = Path(__file__).parent / "cluster_agent.sh"
NAMESPACES = Path("/run/netns")
SWITCH = "switch"
SWITCH_NUMBER = 254
NEEDED = ("ip", "tc", "unshare", "mount", "hostname")
RANK_VARIABLES = (b"PMI_RANK=", b"OMPI_COMM_WORLD_RANK=")
_numbers = itertools.count()


class ClusterUnavailable(Exception):
    """This machine or this user cannot have network namespaces."""


class Cluster:
    """Hosts joined by a bridge; a context manager that also ends every process left on them."""

    def __init__(self, size: int = 3, rate: str = "1gbit") -> None:
        self.hosts = tuple(f"node{i}" for i in range(size))
        self._rate = rate
        # By the process's id, so that sessions can run side by side and a dead one's leftovers are known.
        self._prefix = f"gala-{os.getpid()}-{next(_numbers)}"

    def __enter__(self) -> Cluster:
        _check_rights()
        remove_leftovers()
        try:
            self._set_up()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, subprocess.CalledProcessError):
                raise ClusterUnavailable(f"{' '.join(map(str, error.cmd))}: {error.stderr.strip()}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._prefix)

    def mpi(self, mpi: Mpi, ranks_per_host: int = 1) -> Mpi:
        """`mpi` with its ranks on this cluster: the first `ranks_per_host` on node0, the next on node1, and so on."""
        settings = _openmpi if mpi.name == "openmpi" else _mpich
        options, environment = settings(self.hosts, ranks_per_host)
        return replace(
            mpi,
            prefix=("ip", "netns", "exec", self._namespace(SWITCH)),
            options=(*mpi.options, *options),
            environment=(*mpi.environment, *environment.items(), *self._environment().items()),
        )

    def cut(self, host: str) -> None:
        """Pull the host's cable: packets are lost both ways, while its connections stay open and try again."""
        self._ip(SWITCH, f"link set {host} down")

    def heal(self, host: str) -> None:
        """Plug the cable in again. A connection goes on at its next retransmission: after a cut of t s, within
        about t s."""
        self._ip(SWITCH, f"link set {host} up")

    def limit(self, host: str, rate: str) -> None:
        """Limit the host's link to `rate`, as tc writes it (`100mbit`), in each direction."""
        for place, device in ((host, "eth0"), (SWITCH, host)):
            # The burst holds the largest packet that the kernel hands to a device whole (64 KiB).
            _command("tc", "-n", self._namespace(place), *f"qdisc replace dev {device} root tbf".split(),
                     *f"rate {rate} burst 128kb latency 50ms".split())  # fmt: skip

    def sent_bytes(self, host: str) -> int:
        """Bytes that left the host through its link since set-up, headers included."""
        return self._counter(host, "tx")

    def received_bytes(self, host: str) -> int:
        """Bytes that reached the host through its link since set-up, headers included."""
        return self._counter(host, "rx")

    def pids(self, host: str) -> list[int]:
        """All processes on the host, the launcher's among them."""
        return _pids(self._namespace(host))

    def ranks(self, host: str) -> dict[int, int]:
        """Rank -> process id of the MPI processes on the host (of one job; without the processes they started)."""
        ranks: dict[int, int] = {}
        parents: dict[int, int] = {}
        pids = self.pids(host)
        for pid in pids:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                for variable in variables:
                    if variable.startswith(RANK_VARIABLES):
                        ranks[pid] = int(variable.partition(b"=")[2])
        # What a rank started has its variables too, and once that rank is dead, a parent outside.
        return {rank: pid for pid, rank in ranks.items() if parents[pid] in pids and parents[pid] not in ranks}

    def _set_up(self) -> None:
        _command("ip", "netns", "add", self._namespace(SWITCH))
        self._ip(SWITCH, "link set lo up", "link add bridge type bridge forward_delay 0",
                 f"address add {_address(SWITCH_NUMBER)}/24 dev bridge", "link set bridge up")  # fmt: skip
        for number, host in enumerate(self.hosts, 1):
            _command("ip", "netns", "add", self._namespace(host))
            self._ip(SWITCH, f"link add {host} type veth peer name eth0 netns {self._namespace(host)}",
                     f"link set {host} master bridge up")  # fmt: skip
            self._ip(host, "link set lo up", f"address add {_address(number)}/24 dev eth0", "link set eth0 up")
            self.limit(host, self._rate)
        # What the agent does for each host may be forbidden as well.
        subprocess.run(
            [AGENT, self.hosts[0], "true"],
            env={**os.environ, **self._environment()},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def _environment(self) -> dict[str, str]:
        names = [f"{_address(number)} {host}" for number, host in enumerate(self.hosts, 1)]
        return {"GALA_MPI_CLUSTER": self._prefix, "GALA_MPI_CLUSTER_NAMES": ",".join(["127.0.0.1 localhost", *names])}

    def _namespace(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def _ip(self, host: str, *commands: str) -> None:
        for command in commands:
            _command("ip", "-n", self._namespace(host), *command.split())

    def _counter(self, host: str, direction: str) -> int:
        shown = _command("ip", "-n", self._namespace(host), "-json", "-statistics", "link", "show", "eth0")
        return int(json.loads(shown)[0]["stats64"][direction]["bytes"])


def _address(number: int) -> str:
    return f"10.83.0.{number}"


def remove_leftovers() -> None:
    """Remove the clusters of sessions that are dead."""
    for prefix, pid in _clusters():
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(subprocess.CalledProcessError):  # another session removes it as well
                _remove(prefix)


def _clusters() -> Iterator[tuple[str, int]]:
    """Prefix and owning process of all clusters on this machine."""
    names = [path.name for path in NAMESPACES.iterdir()] if NAMESPACES.exists() else []
    matches = [match for name in names if (match := re.match(r"(gala-(\d+)-\d+)-", name))]
    yield from sorted({(match[1], int(match[2])) for match in matches})


def _remove(prefix: str) -> None:
    """End the processes in a cluster's namespaces, then remove these and with them their interfaces."""
    namespaces = [path.name for path in NAMESPACES.glob(f"{prefix}-*")]
    deadline = time.monotonic() + 10
    # Over again, as a process may have started another one meanwhile.
    while (pids := [pid for name in namespaces for pid in _pids(name)]) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for name in namespaces:
        _command("ip", "netns", "delete", name)
    if pids:
        raise TimeoutError(f"processes {pids} of {prefix} do not end")


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _command("ip", "netns", "pids", namespace).split()]


def _command(*args: str) -> str:
    return subprocess.run(args, check=True, capture_output=True, text=True, timeout=120).stdout


def _check_rights() -> None:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        raise ClusterUnavailable(f"no {', '.join(missing)} here (packages iproute2, util-linux, mount, hostname)")
    if os.geteuid() != 0:
        raise ClusterUnavailable("only root may make network namespaces")


def _mpich(hosts: tuple[str, ...], ranks_per_host: int) -> tuple[tuple[str, ...], dict[str, str]]:
    options = ("-launcher", "ssh", "-launcher-exec", str(AGENT), "-localhost", _address(SWITCH_NUMBER))
    where = ("-hosts", ",".join(hosts), "-ppn", str(ranks_per_host))
    # UCX would find shared memory between the hosts, as they have one kernel.
    return (*options, *where), {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}


def _openmpi(hosts: tuple[str, ...], ranks_per_host: int) -> tuple[tuple[str, ...], dict[str, str]]:
    where = ("--host", ",".join(f"{host}:{ranks_per_host}" for host in hosts), "--map-by", "slot:oversubscribe")
    options = ("--prtemca", "plm_ssh_agent", str(AGENT), *where, "--bind-to", "none")
    return options, {
        # As on MPICH, no UCX: these are Open MPI's own, and print nothing about UCX.
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "self,sm,tcp",
        "OMPI_MCA_osc": "^ucx",
        # Each host counts all CPUs as its own. So ranks of different hosts would be bound to the same CPU (hence
        # --bind-to none), and would spin on it: a mailbox across 3 hosts was 5 times slower on 2 CPUs.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
