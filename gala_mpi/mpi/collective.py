"""Agreement among ranks: on what went wrong, on what they were given, and on the end of what they share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, TypeVar

from gala_mpi.config import UsageError
from gala_mpi.user_code import kind_and_text

if TYPE_CHECKING:
    from types import TracebackType

    from mpi4py.MPI import Intracomm

T = TypeVar("T")


class DisagreementError(UsageError, ValueError):
    """What some rank was given cannot be used, or is not what the others were given. Raised on all ranks."""


class RankFailureError(Exception):
    """Some ranks have failed. Raised on all ranks; where it was, what has failed is the cause."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"failed: rank {', '.join(map(str, ranks))}")


def on_all_ranks(comm: Intracomm, make: Callable[[], T]) -> T:
    """What `make` gives on this rank, if it gives something on all. Collective.

    Else all ranks raise alike: RankFailureError if one raised what is no UsageError, which is the cause there; or the
    first UsageError. An error of MPI's is raised at once: nobody may be there to agree with.
    """
    made: list[T] = []
    refusal: tuple[str, int] | None = None
    failure: Exception | None = None
    try:
        made.append(make())
    except UsageError as error:
        refusal = str(error), error.exit_code
    except Exception as error:
        if hasattr(error, "Get_error_class"):
            raise
        failure = error
    found = comm.allgather((refusal, failure is not None))
    if failed := [rank for rank, (_, whether) in enumerate(found) if whether]:
        raise RankFailureError(failed) from failure
    for said, _ in found:
        if said is not None:
            refused = UsageError(said[0])
            refused.exit_code = said[1]
            raise refused
    return made[0]


def alike_on_all_ranks(comm: Intracomm, make: Callable[[], tuple[T, dict[str, object]]]) -> T:
    """What `make` gives on this rank, if the facts that it gives beside it are the same on all ranks. Collective.

    Raises DisagreementError on all ranks if one raised anything but an error of MPI's, or if a fact differs.
    """
    made: list[T] = []
    refusal: str | None = None
    failure: Exception | None = None
    facts: dict[str, object] = {}
    try:
        result, facts = make()
        made.append(result)
    except (ValueError, UsageError) as error:
        refusal = str(error)
    except Exception as error:
        if hasattr(error, "Get_error_class"):
            raise
        refusal, failure = kind_and_text(error), error
    # Of many ranks only digests: facts are told where they differ.
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).digest()
    found = comm.allgather((refusal, digest))
    for rank, (problem, _) in enumerate(found):
        if problem is not None:
            raise DisagreementError(f"rank {rank}: {problem}") from failure
    if any(other != found[0][1] for _, other in found):
        told = comm.allgather(facts)
        for name, value in told[0].items():
            for rank, others in enumerate(told):
                if others[name] != value:
                    raise DisagreementError(
                        f"{name} must be the same on all ranks: {value!r} on rank 0, {others[name]!r} on rank {rank}"
                    )
    return made[0]


class ClosedTogether(ABC):
    """What a `with` block closes at its end, but not after an error: the others may never come to a collective end."""

    @abstractmethod
    def close(self) -> None:
        """End it. Collective."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
