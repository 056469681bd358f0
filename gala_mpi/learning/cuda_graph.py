"""Work on a GPU that is the same each time, launched at once instead of kernel by kernel.

The kernels of an actor-learner are many and small: to launch one takes longer than to run it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@functools.cache
def _rehearsal_stream() -> torch.cuda.Stream:
    """One for all: libraries keep memory for each stream that they have worked on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class CudaGraph(Generic[T]):
    """Work over memory that stays where it is, captured once as a CUDA graph of the current device.

    `work` is called twice by the constructor: first it is done, as libraries choose their algorithms and allocate at
    the first call, then it is captured. Work that must not be done twice brings `rehearsal`, which is done instead: the
    same over other memory. What runs on the CPU within `work` is not repeated.
    """

    def __init__(self, work: Callable[[], T], rehearsal: Callable[[], object] | None = None) -> None:
        stream = _rehearsal_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            (rehearsal or work)()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile (an MPI library's, say).
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = work()

    def replay(self) -> T:
        """Do the work, without waiting for it. What it gave the first time: the same tensors, with other values."""
        self._graph.replay()
        return self._result
