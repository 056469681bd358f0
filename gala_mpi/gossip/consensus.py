"""What all ranks hold together: their mean, and how far they are from it. Every function is collective."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gala_mpi.mpi.waiting import wait_until

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def mean_of_all(values: npt.NDArray[np.float32], comm: Intracomm, timeout_s: float) -> npt.NDArray[np.float32]:
    """The mean of the ranks' vectors (n,), summed in float32 as the library pleases, the same on all ranks.

    Raises TimeoutError if some rank does not come within `timeout_s` seconds; `comm` is of no use then.
    """
    total = np.empty_like(values)
    # A copy, as the library may read it for longer than this rank waits.
    request = comm.Iallreduce(values / np.float32(comm.size), total)
    if not wait_until(request.Test, timeout_s):
        raise TimeoutError(f"some rank has not come to this mean within {timeout_s:g} s")
    return total


def distance_to_mean(values: npt.NDArray[np.float32], comm: Intracomm, timeout_s: float) -> float:
    """The root mean square, over all ranks, of the L2 distance of their vectors (n,) to the mean of all.

    Raises as `mean_of_all` does.
    """
    apart = values.astype(float) - mean_of_all(values, comm, timeout_s)
    squared = np.array([float(apart @ apart)])
    total = np.empty(1)
    request = comm.Iallreduce(squared, total)
    if not wait_until(request.Test, timeout_s):
        raise TimeoutError(f"some rank has not come to this sum within {timeout_s:g} s")
    return math.sqrt(total[0] / comm.size)
