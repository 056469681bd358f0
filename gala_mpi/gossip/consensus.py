"""What all ranks hold together: their mean, and how far they are from it. Every function is collective."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from gala_mpi.mpi.collective import DisagreementError
from gala_mpi.mpi.waiting import wait_until

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

AnyNumber = TypeVar("AnyNumber", np.float32, np.float64, np.int64)


def mean_of_all(values: npt.NDArray[np.float32], comm: Intracomm, timeout_s: float) -> npt.NDArray[np.float32]:
    """The mean of the ranks' vectors (n,), summed in float32 as the library pleases, the same on all ranks.

    Raises TimeoutError if some rank does not come within `timeout_s` seconds; `comm` is of no use then.
    """
    # A copy, as the library may read it for longer than this rank waits.
    return _reduced(values / np.float32(comm.size), comm, timeout_s, "mean")


def distance_to_mean(values: npt.NDArray[np.float32], comm: Intracomm, timeout_s: float) -> float:
    """The root mean square, over all ranks, of the L2 distance of their vectors (n,) to the mean of all.

    Raises as `mean_of_all` does.
    """
    apart = values.astype(float) - mean_of_all(values, comm, timeout_s)
    total = _reduced(np.array([float(apart @ apart)]), comm, timeout_s, "distance")
    return math.sqrt(total[0] / comm.size)


def average_buffers(module: object, comm: Intracomm, timeout_s: float) -> None:
    """Give all ranks the means of the module's floating-point buffers, taken in float64.

    Raises as `mean_of_all` does, and DisagreementError, on all ranks, if those of some rank are not those of rank 0.
    """
    if not hasattr(module, "named_buffers"):
        raise ValueError("buffers are those of a model, and what is averaged here is none")
    named = [(name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point()]
    layout = repr([(name, buffer.shape, buffer.dtype) for name, buffer in named])
    mark = int.from_bytes(hashlib.blake2b(layout.encode(), digest_size=2).digest())
    total, squares = _reduced(np.array([mark, mark * mark]), comm, timeout_s, "mean").tolist()
    # Of numbers that are all alike, and of no others.
    if comm.size * squares != total * total:
        raise DisagreementError("the model's buffers must be the same on all ranks, but for their values")
    if not named:
        return
    values = np.concatenate([buffer.detach().cpu().double().numpy().reshape(-1) for _, buffer in named])
    means, offset = _reduced(values / comm.size, comm, timeout_s, "mean"), 0
    for _, buffer in named:
        part = means[offset : offset + buffer.numel()].reshape(buffer.shape)
        buffer.detach().copy_(buffer.new_tensor(part))
        offset += buffer.numel()


def _reduced(mine: npt.NDArray[AnyNumber], comm: Intracomm, timeout_s: float, what: str) -> npt.NDArray[AnyNumber]:
    """The sum of the ranks' vectors; `mine` is not to be touched any more."""
    total = np.empty_like(mine)
    request = comm.Iallreduce(mine, total)
    if not wait_until(request.Test, timeout_s):
        raise TimeoutError(f"some rank has not come to this {what} within {timeout_s:g} s")
    return total
