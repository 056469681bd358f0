"""Actor-learners that average their policies by asynchronous gossip over one-sided MPI.

`gala_mpi.Gossip` gossips any PyTorch training loop. What is named here is public; all else may change in any version.
Importing this package initialises no MPI, seeds nothing and starts no thread; using `Gossip` imports torch, and
`mpi4py.MPI`, which initialises MPI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gala_mpi.config import ConfigError
    from gala_mpi.gossip.consensus import DivergedError
    from gala_mpi.gossip.gossip import Gossip
    from gala_mpi.gossip.node_gossip import NodeGossip
    from gala_mpi.gossip.topology import Topology, make_changing_topology, make_topology
    from gala_mpi.mpi.collective import DisagreementError
    from gala_mpi.mpi.room import NoRoomError

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DisagreementError",
    "DivergedError",
    "Gossip",
    "NoRoomError",
    "NodeGossip",
    "Topology",
    "__version__",
    "make_changing_topology",
    "make_topology",
]
# Loaded when it is first asked for: a topology needs neither torch nor MPI.
_HOME = {
    "ConfigError": "config",
    "DisagreementError": "mpi.collective",
    "DivergedError": "gossip.consensus",
    "Gossip": "gossip.gossip",
    "NoRoomError": "mpi.room",
    "NodeGossip": "gossip.node_gossip",
    "Topology": "gossip.topology",
    "make_changing_topology": "gossip.topology",
    "make_topology": "gossip.topology",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
