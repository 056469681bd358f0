"""What all ranks hold together: their mean, and how far they are from it. Every function is collective.

A rank whose parameters are not finite is left out, as its messages are in gossip. `weight` is what a rank counts for.
All raise as `BoundedCollectives.sum` does, and DivergedError, on all ranks, if those of none are finite.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gala_mpi import _native
from gala_mpi.mpi.collective import DisagreementError

if TYPE_CHECKING:
    from gala_mpi.mpi.bounded import BoundedCollectives


class DivergedError(RuntimeError):
    """This rank's parameters are not finite, and it is not to go on with those of another, or cannot."""


def mean_of_all(
    values: npt.NDArray[np.float32], ranks: BoundedCollectives, timeout_s: float, weight: float = 1.0
) -> npt.NDArray[np.float32]:
    """The mean of the ranks' vectors (n,), summed in float32, the same on all ranks."""
    counts = weight if _native.all_finite(values) else 0.0
    # A copy, as the library may read it for longer than this rank waits. The last element is what this rank counts for.
    mine = np.zeros(len(values) + 1, np.float32)
    if counts:
        np.multiply(values, counts / ranks.size, out=mine[:-1])
    mine[-1] = counts
    total = ranks.sum(mine, timeout_s, "mean")
    if not total[-1] > 0:
        raise DivergedError("no rank has parameters that are finite")
    mean = total[:-1]
    mean *= ranks.size / total[-1]
    return mean


def distance_to_mean(
    values: npt.NDArray[np.float32], ranks: BoundedCollectives, timeout_s: float, weight: float = 1.0
) -> float:
    """The root mean square, over the ranks, of the L2 distance of their vectors (n,) to the mean of all."""
    counts = weight if _native.all_finite(values) else 0.0
    mean = mean_of_all(values, ranks, timeout_s, weight)
    apart = values.astype(float) - mean if counts else np.zeros(0)
    total = ranks.sum(np.array([counts * float(apart @ apart), counts]), timeout_s, "distance")
    return math.sqrt(total[0] / total[1])


def mean_buffers(
    module: object, values: npt.NDArray[np.float32], ranks: BoundedCollectives, timeout_s: float, weight: float = 1.0
) -> list[tuple[object, npt.NDArray[np.float64]]]:
    """The means of the module's floating-point buffers, taken in float64, for `store_buffers`. Changes nothing.

    `values` are the rank's parameters (n,). Of an element those are left out that are not finite; where all are, this
    rank's own stays. Raises DisagreementError, on all ranks, if some rank has other buffers than rank 0.
    """
    if not hasattr(module, "named_buffers"):
        raise ValueError("buffers are those of a model, and what is averaged here is none")
    named = [(name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point()]
    layout = repr([(name, buffer.shape, buffer.dtype) for name, buffer in named])
    mark = int.from_bytes(hashlib.blake2b(layout.encode(), digest_size=2).digest())
    total, squares = ranks.sum(np.array([mark, mark * mark]), timeout_s, "mean").tolist()
    # Of numbers that are all alike, and of no others.
    if ranks.size * squares != total * total:
        raise DisagreementError("the model's buffers must be the same on all ranks, but for their values")
    if not named:
        return []
    own = np.concatenate([buffer.detach().cpu().double().numpy().reshape(-1) for _, buffer in named])
    counts = np.where(np.isfinite(own), weight if _native.all_finite(values) else 0.0, 0.0)
    sums = ranks.sum(np.concatenate([np.where(counts > 0, own, 0.0) * counts, counts]), timeout_s, "mean")
    there = sums[len(own) :]
    means = np.where(there > 0, sums[: len(own)] / np.where(there > 0, there, 1.0), own)
    parts = np.split(means, np.cumsum([buffer.numel() for _, buffer in named])[:-1])
    return [(buffer, part) for (_, buffer), part in zip(named, parts, strict=True)]


def store_buffers(means: list[tuple[object, npt.NDArray[np.float64]]]) -> None:
    """Give buffers what `mean_buffers` found. Local."""
    for buffer, part in means:
        buffer.detach().copy_(buffer.new_tensor(part.reshape(buffer.shape)))  # type: ignore[attr-defined]
