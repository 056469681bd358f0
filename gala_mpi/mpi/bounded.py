"""Collective operations that are waited for with a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from gala_mpi.mpi.waiting import wait_until

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

AnyNumber = TypeVar("AnyNumber", np.float32, np.float64, np.int64)


class BoundedCollectives:
    """Sums and broadcasts over the ranks of `comm`, on a communicator of their own. Making it is collective.

    What is begun cannot be taken back. So after a TimeoutError the operation stays under way, with the memory that MPI
    may yet read and write, and all further ones raise RuntimeError: ranks would not be in the same one any more.
    while_waiting: called again and again meanwhile; it must not wait itself.
    """

    def __init__(self, comm: Intracomm, while_waiting: Callable[[], object] = lambda: None) -> None:
        self._comm, self._while_waiting = comm.Dup(), while_waiting
        self.rank, self.size = comm.rank, comm.size
        self._left: tuple[object, ...] = ()

    def sum(self, mine: npt.NDArray[AnyNumber], timeout_s: float, what: str) -> npt.NDArray[AnyNumber]:
        """The sum of the ranks' vectors (n,), in the library's order; `mine` is not to be touched any more.

        Collective. Raises TimeoutError if some rank does not come within `timeout_s` seconds.
        """
        self._refuse(what)
        total = np.empty_like(mine)
        self._wait(self._comm.Iallreduce(mine, total), (mine, total), timeout_s, what)
        return total

    def give(self, values: npt.NDArray[Any], timeout_s: float, what: str) -> None:
        """Give all ranks what rank 0 has in `values`, of one shape on all ranks. Collective, raises as `sum` does.

        After a TimeoutError `values` are not to be touched any more.
        """
        self._refuse(what)
        self._wait(self._comm.Ibcast(values, root=0), (values,), timeout_s, what)

    def _refuse(self, what: str) -> None:
        if self._left:
            raise RuntimeError(f"no {what}: some rank has not come to an earlier one in time; ranks are out of step")

    def _wait(self, request: Request, memory: tuple[object, ...], timeout_s: float, what: str) -> None:
        def done() -> bool:
            self._while_waiting()
            return bool(request.Test())

        if not wait_until(done, timeout_s):
            self._left = (request, *memory)
            raise TimeoutError(f"some rank has not come to this {what} within {timeout_s:g} s")

    def free(self) -> None:
        """Free the communicator, but where an operation is under way on it. Collective."""
        if not self._left:
            self._comm.Free()
