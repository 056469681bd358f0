from collections.abc import Sequence

from typing_extensions import Buffer

WIRE_ITEMSIZE: dict[str, int]

def pack(sources: Sequence[Buffer], out: Buffer, wire: str = "float32") -> None: ...
def mix(
    state: Buffer,
    self_weight: float,
    messages: Sequence[Buffer],
    weights: Sequence[float],
    wire: str = "float32",
) -> tuple[list[float], list[bool]]: ...
def sketch(state: Buffer, out: Buffer, seed: int) -> float: ...
