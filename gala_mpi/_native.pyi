from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

WIRE_ITEMSIZE: dict[str, int]

def pack(sources: Sequence[npt.NDArray[np.float32]], out: npt.NDArray[Any], wire: str = "float32") -> None: ...
def mix(
    state: npt.NDArray[np.float32],
    self_weight: float,
    messages: Sequence[npt.NDArray[Any]],
    weights: Sequence[float],
    wire: str = "float32",
) -> tuple[list[float], list[bool]]: ...
def exchange(
    state: npt.NDArray[np.float32],
    copies: Sequence[npt.NDArray[Any]],
    self_weight: float,
    messages: Sequence[npt.NDArray[Any]],
    weights: Sequence[float],
) -> tuple[bool, list[float], list[bool]]: ...
def all_finite(buffer: npt.NDArray[Any], wire: str = "float32") -> bool: ...
def average(state: npt.NDArray[np.float32], message: npt.NDArray[Any]) -> None: ...
def checksum(buffer: npt.NDArray[np.uint8]) -> int: ...
def sketch(state: npt.NDArray[np.float32], out: npt.NDArray[np.float32], seed: int) -> float: ...
def scale_frames(frames: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> None: ...
def rmsprop(
    data: npt.NDArray[np.float32],
    grad: npt.NDArray[np.float32],
    square: npt.NDArray[np.float32],
    scale: float,
    learning_rate: float,
    alpha: float,
    epsilon: float,
) -> None: ...
def swap(word: npt.NDArray[Any], value: int) -> int: ...
def load(word: npt.NDArray[Any]) -> int: ...
def watch(seconds: float, message: str) -> None: ...
