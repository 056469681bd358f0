"""NumPy twins of the C kernels: they define what is correct."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
PRIME_1, PRIME_2 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
WIRE_TYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<f2")}


def encode(values: Floats, wire: str) -> npt.NDArray[np.uint8]:
    """float32 values as bytes of the wire type, rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    if wire == "bfloat16":
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        return np.where(np.isnan(values), quiet, rounded).astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(WIRE_TYPES[wire]).view(np.uint8)


def decode(message: npt.NDArray[np.uint8], wire: str) -> Floats:
    """Bytes of the wire type as float32 values."""
    if wire == "bfloat16":
        return (message.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return message.view(WIRE_TYPES[wire]).astype(np.float32)


def mix(
    state: Floats, self_weight: float, messages: Sequence[npt.NDArray[np.uint8]], weights: Sequence[float], wire: str
) -> tuple[Floats, list[float], list[bool]]:
    """The state after mixing, the squared distances and which messages were accepted."""
    values = [decode(message, wire) for message in messages]
    accepted = [all_finite(message, wire) for message in messages]
    rounded = [np.float32(weight) for weight in weights]
    own = self_weight
    for weight, taken in zip(rounded, accepted, strict=True):
        own += 0.0 if taken else float(weight)
    squared = [
        float(np.square(state.astype(float) - value.astype(float)).sum()) if taken else float("nan")
        for value, taken in zip(values, accepted, strict=True)
    ]
    if not any(accepted):
        return state.copy(), squared, accepted
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        mixed = np.float32(own) * state
        for value, weight, taken in zip(values, rounded, accepted, strict=True):
            if taken:
                mixed = mixed + weight * value
    return mixed, squared, accepted


def tiled_distance(state: Floats, values: Floats) -> float:
    """The squared distance in the order of the kernels, to the bit.

    In each tile of 128 values the second half of the squares is added to the first until one number is left; in
    float32, but in double for the last tile if it is not full, and where the sum is not within 2**-100 and the
    largest float32. The tiles are added, in order, in double."""
    total = 0.0
    for begin in range(0, len(state), 128):
        pair = state[begin : begin + 128], values[begin : begin + 128]
        near = float("inf") if len(pair[0]) < 128 else _tile_distance(*pair)
        exact = not 2.0**-100 < near < float("inf")
        total += _tile_distance(*(side.astype(float) for side in pair)) if exact else near
    return total


def _tile_distance(state: npt.NDArray[np.floating], values: npt.NDArray[np.floating]) -> float:
    squares = np.zeros(128, state.dtype)
    with np.errstate(over="ignore", under="ignore"):
        squares[: len(state)] = np.square(state - values)
        while len(squares) > 1:
            squares = squares[: len(squares) // 2] + squares[len(squares) // 2 :]
    return float(squares[0])


def all_finite(message: npt.NDArray[np.uint8], wire: str) -> bool:
    """Whether every value of a message is finite."""
    return bool(np.isfinite(decode(message, wire)).all())


def average(state: Floats, message: Floats) -> Floats:
    """The state after averaging with a message."""
    with np.errstate(under="ignore"):
        return np.float32(0.5) * state + np.float32(0.5) * message


def sketch(state: Floats, buckets: int, seed: int) -> Floats:
    """The count sketch of the state."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.arange(len(state), dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = _finalise(z)
    signs = np.where(z >> np.uint64(63), -1.0, 1.0)
    where = (z & np.uint64(buckets - 1)).astype(np.int64)
    sums = np.zeros(buckets)
    np.add.at(sums, where, signs * state.astype(float))
    return sums.astype(np.float32)


def checksum(memory: np.ndarray, seed: int = 0) -> int:
    """Eight lanes of 64-bit words, each taken in by two products and a rotation; then the lanes, from the length on."""
    padded = np.zeros(-(-len(memory) // 64) * 64, np.uint8)
    padded[: len(memory)] = memory
    with np.errstate(over="ignore"):
        lanes = np.uint64(seed) + np.arange(8, dtype=np.uint64) * PRIME_1
        for block in padded.view(np.uint64).reshape(-1, 8):
            lanes = _take_in(lanes, block)
        total = _finalise(np.array([len(memory)], np.uint64))
        for lane in lanes:
            total = _take_in(total, lane)
        return int(_finalise(total)[0])


def _take_in(lane: npt.NDArray[np.uint64], word: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    lane = lane + word * PRIME_2
    return ((lane << np.uint64(31)) | (lane >> np.uint64(33))) * PRIME_1


def _finalise(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The last step of SplitMix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
