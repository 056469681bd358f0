"""When each rank writes its checkpoint: one after the other, not all at once. Local."""

from __future__ import annotations

import math

# What a file system of a cluster takes without its other users' noticing.
TOGETHER_BYTES_PER_S = 2e9


def turn_s(rank: int, size: int, nbytes: int, longest_s: float) -> float:
    """Seconds to the turn of a rank where all begin to write `nbytes` each: as if one wrote after the other.

    At TOGETHER_BYTES_PER_S, which a few ranks do not notice; of many ranks the last one waits `longest_s` at most.
    """
    return min(size * nbytes / TOGETHER_BYTES_PER_S, longest_s) * rank / size


def next_turn_s(time_s: float, every_s: float, phase: float) -> float:
    """When a rank's turn comes next in intervals of `every_s`, of which it has its turn at the share `phase`."""
    return (math.floor(time_s / every_s - phase) + 1 + phase) * every_s
