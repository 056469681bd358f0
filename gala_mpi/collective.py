"""Agreement among ranks: on what went wrong, and on what they were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from gala_mpi.config import UsageError

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

T = TypeVar("T")


class DisagreementError(UsageError, ValueError):
    """What some rank was given cannot be used, or is not what the others were given. Raised on all ranks."""


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


def alike_on_all_ranks(comm: Intracomm, make: Callable[[], tuple[T, dict[str, object]]]) -> T:
    """What `make` gives on this rank, if the facts that it gives beside it are the same on all ranks. Collective.

    Raises DisagreementError on all ranks if one raised ValueError or UsageError, or if a fact differs.
    """
    made: list[T] = []
    refusal: str | None = None
    facts: dict[str, object] = {}
    try:
        result, facts = make()
        made.append(result)
    except (ValueError, UsageError) as error:
        refusal = str(error)
    found = comm.allgather((refusal, facts))
    for rank, (problem, _) in enumerate(found):
        if problem is not None:
            raise DisagreementError(f"rank {rank}: {problem}")
    for name, value in found[0][1].items():
        for rank, (_, others) in enumerate(found):
            if others[name] != value:
                raise DisagreementError(
                    f"{name} must be the same on all ranks: {value!r} on rank 0, {others[name]!r} on rank {rank}"
                )
    return made[0]
