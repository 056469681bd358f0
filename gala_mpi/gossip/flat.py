"""What gossip averages: one flat vector of float32 values, wherever it lives. Knows nothing of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Flat(Protocol):
    """A vector (n,) of which an exchange reads and writes a copy in host memory, or the vector itself."""

    size: int

    @property
    def layout(self) -> Any:
        """What must be the same on all ranks, beside the size; its `repr` says it."""

    @property
    def given_once(self) -> Sequence[Any]:
        """Tensors that ranks take from rank 0 at the start, to the last bit, beside what is averaged."""

    def host(self) -> npt.NDArray[np.float32]:
        """The values in host memory: themselves, or a fresh copy."""

    def store_host(self, *, alike: bool = False) -> None:
        """Take over what was written into the array that `host` gave.

        alike: to the last digit, so that ranks that have written the same hold the same, of whatever type it is.
        """


class FlatArray:
    """A NumPy array of any shape, as it is: float32, contiguous, writable, not empty. Raises ValueError for another."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        if values.dtype != np.float32 or not values.flags.c_contiguous or not values.flags.writeable or not values.size:
            raise ValueError(
                f"the array is {values.dtype} {values.shape}; expected float32, not empty, contiguous and writable"
            )
        self._values: npt.NDArray[np.float32] = values.reshape(-1)
        self.size, self.layout = int(values.size), ("array", values.shape)
        self.given_once = ()

    def host(self) -> npt.NDArray[np.float32]:
        """The array, (n,)."""
        return self._values

    def store_host(self, *, alike: bool = False) -> None:
        """It is there already."""
