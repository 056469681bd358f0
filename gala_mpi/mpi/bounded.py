"""Collective operations that are waited for with a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from gala_mpi.mpi.waiting import wait_until

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

# What nobody waits for any more. MPI may write there as long as it runs.
_UNDER_WAY: list[tuple[object, ...]] = []
AnyNumber = TypeVar("AnyNumber", np.float32, np.float64, np.int64)


class BoundedCollectives:
    """Sums and broadcasts over the ranks of `comm`, on a communicator of their own. Making it is collective.

    What is begun cannot be taken back. So after a TimeoutError the operation stays under way, with the memory that MPI
    may yet read and write, and all further ones raise RuntimeError: ranks would not be in the same one any more.
    while_waiting: called again and again meanwhile; it must not wait itself.
    """

    def __init__(self, comm: Intracomm, while_waiting: Callable[[], object] = lambda: None) -> None:
        self._around, self._comm, self._while_waiting = comm, comm.Dup(), while_waiting
        self.rank, self.size = comm.rank, comm.size
        self._out_of_step = False

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
        if self._out_of_step:
            raise RuntimeError(f"no {what}: some rank has not come to an earlier one in time; ranks are out of step")

    def _wait(self, request: Request, memory: tuple[object, ...], timeout_s: float, what: str) -> None:
        def done() -> bool:
            self._while_waiting()
            return bool(request.Test())

        if not wait_until(done, timeout_s):
            self._out_of_step = True
            _UNDER_WAY.append((request, *memory))
            raise TimeoutError(f"some rank has not come to this {what} within {timeout_s:g} s")

    def free(self) -> None:
        """Free the communicator, unless an operation is under way on it somewhere. Collective."""
        if not self._around.allreduce(int(self._out_of_step)):
            self._comm.Free()
