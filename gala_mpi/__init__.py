"""Actor-learners that average their policies by asynchronous gossip over one-sided MPI.

`gala_mpi.Gossip` gossips any PyTorch training loop. Importing this package initialises no MPI, seeds nothing and
starts no thread; using `Gossip` imports torch, and `mpi4py.MPI`, which initialises MPI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gala_mpi.collective import DisagreementError
    from gala_mpi.gossip import DivergedError, Gossip

__version__ = "0.1.0"
__all__ = ["DisagreementError", "DivergedError", "Gossip", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gala_mpi import collective, gossip

    return getattr(collective if name == "DisagreementError" else gossip, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
