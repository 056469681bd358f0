"""torch.distributed's gloo backend, started among the ranks of an MPI job, to be compared with MPI."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

LOOPBACK = "127.0.0.1"


class Gloo:
    """A process group of all ranks of `comm`, or the reason, in one line, why there is none: `failure`.

    Making and freeing it are collective. `start_s` limits the start, `call_s` each call.
    """

    def __init__(self, comm: Intracomm, *, one_node: bool, start_s: float, call_s: float) -> None:
        self._store: Any = None
        failure = self._try(lambda: self._meet(comm, one_node, start_s))
        # All ranks have the store, or none goes on: the ones with it would wait for the others.
        self.failure = _first(comm.allgather(failure))
        if not self.failure:
            self.failure = _first(comm.allgather(self._try(lambda: self._join(comm, start_s, call_s))))
        if self.failure:
            self.free()

    def all_reduce(self, data: torch.Tensor) -> None:
        """Replace `data` by the sum over all ranks. Collective."""
        distributed.all_reduce(data)

    def free(self) -> None:
        """Leave the process group, if there is one."""
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        self._store = None

    def _try(self, act: Callable[[], None]) -> str:
        try:
            act()
        except (RuntimeError, OSError, ValueError) as error:
            return f"gloo does not start: {' '.join(str(error).split())[:120] or type(error).__name__}"
        return ""

    def _meet(self, comm: Intracomm, one_node: bool, start_s: float) -> None:
        """Start a store on a free port of rank 0, and connect the others to it."""
        limit = timedelta(seconds=start_s)
        host, port = "", 0
        if comm.rank == 0:
            try:
                if not (distributed.is_available() and distributed.is_gloo_available()):
                    raise RuntimeError("this torch has no torch.distributed with gloo")
                host = LOOPBACK if one_node else socket.gethostname()
                self._store = _store(host, 0, comm.size, True, limit)
                port = self._store.port
            finally:
                comm.bcast((host, port))
            return
        host, port = comm.bcast(None)
        if port:
            self._store = _store(host, port, comm.size, False, limit)

    def _join(self, comm: Intracomm, start_s: float, call_s: float) -> None:
        assert self._store is not None
        self._store.set_timeout(timedelta(seconds=start_s))
        distributed.init_process_group(
            "gloo", store=self._store, rank=comm.rank, world_size=comm.size, timeout=timedelta(seconds=call_s)
        )


def _store(host: str, port: int, size: int, master: bool, limit: timedelta) -> Any:
    # Not at the top: a torch built without torch.distributed has no such name.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, port, size, master, limit, wait_for_workers=False)


def _first(failures: list[str]) -> str:
    return next((failure for failure in failures if failure), "")
