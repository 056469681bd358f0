"""Agreement among ranks on what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from gala_mpi.config import UsageError

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")


def on_all_ranks(comm: Intracomm, make: Callable[[], T]) -> T:
    """What `make` gives on this rank, or on all ranks the first UsageError that one of them raised. Collective."""
    made: list[T] = []
    refusal = None
    try:
        made.append(make())
    except UsageError as error:
        refusal = str(error)
    for found in comm.allgather(refusal):
        if found is not None:
            raise UsageError(found)
    return made[0]
