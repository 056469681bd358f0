"""What an exchange is given: a model, a topology and options, checked on each rank, and the same on all."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from gala_mpi.gossip.flat import Flat, FlatArray
from gala_mpi.gossip.shared_topology import known_here
from gala_mpi.gossip.topology import TOPOLOGIES, Topology

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm
    from torch import nn

WIRES = ("float32", "bfloat16", "float16")
ALLOWED = {
    "wire": WIRES,
    "delivery": ("auto", "inline", "background"),
    "on_divergence": ("adopt", "stop"),
}


def share_parameters(flat: Flat, comm: Intracomm) -> None:
    """Give every rank the parameters of rank 0, those that are not averaged too. Collective."""
    comm.Bcast(flat.host(), root=0)
    flat.store_host()
    if not flat.given_once:
        return
    import torch

    for parameter in flat.given_once:
        values = parameter.detach().cpu().contiguous()
        comm.Bcast(values.reshape(-1).view(torch.uint8).numpy(), root=0)
        parameter.detach().copy_(values)


def given_to_gossip(
    model: nn.Module | npt.NDArray[np.float32] | Flat,
    topology: str | Topology,
    comm: Intracomm,
    options: dict[str, object],
) -> tuple[tuple[Flat, Topology | None], dict[str, object]]:
    """What is made of the arguments without a message, and the facts that all ranks must share.

    Raises ValueError, and ConfigError for a topology that is none. Local.
    """
    for name, allowed in ALLOWED.items():
        if options[name] not in allowed:
            raise ValueError(f"{name}: {options[name]!r} cannot be used; expected one of {', '.join(allowed)}")
    staleness, timeout_s = options["max_staleness"], options["neighbour_timeout_s"]
    if staleness is not None and not (isinstance(staleness, int) and staleness >= 0):
        raise ValueError(f"max_staleness: {staleness!r} cannot be used; expected None or an integer of at least 0")
    if not (isinstance(timeout_s, int | float) and 0 < timeout_s < math.inf):
        raise ValueError(f"neighbour_timeout_s: {timeout_s!r} cannot be used; expected a number above 0")
    if not isinstance(topology, str | Topology):
        what = "make_changing_topology makes one of a function" if callable(topology) else "or a Topology"
        raise ValueError(f"topology: {topology!r} cannot be used; expected a name, the path of an edge list, {what}")
    graph = known_here(topology, comm) if isinstance(topology, str) else topology
    if graph is not None and graph.size != comm.size:
        raise ValueError(f"topology: {graph.name!r} is one of {graph.size} ranks; expected one of {comm.size}")
    told = isinstance(topology, str) and topology not in TOPOLOGIES
    flat = flat_of(model)
    facts = {
        **layout_facts(flat),
        "topology": topology if isinstance(topology, str) else topology.name,
        "the edges of the topology (digest)": "as rank 0 reads them" if told or graph is None else graph.digest,
    }
    return (flat, graph), facts | options


def layout_facts(flat: Flat) -> dict[str, object]:
    """What ranks must share of what is averaged."""
    return {
        "the number of trained parameters": flat.size,
        "the layout of the model's parameters (digest)": _digest(flat.layout),
    }


def flat_of(model: nn.Module | npt.NDArray[np.float32] | Flat) -> Flat:
    """What is averaged of it. Raises ValueError for what cannot be. Local."""
    if isinstance(model, np.ndarray):
        return FlatArray(model)
    if hasattr(model, "store_host"):
        return cast(Flat, model)
    # Not at the top: NumPy arrays need no torch, of which each rank's import takes more than a second.
    from gala_mpi.gossip.parameters import flatten

    return flatten(cast("nn.Module", model))


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
