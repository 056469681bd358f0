"""How long each rank has been silent, of the time in which this rank looked. All is local, and without MPI.

What this rank could not have seen is no silence: it may have been stopped (SIGSTOP, a suspended machine), or held up in
a library, and all the others' news may still be under way to it. And where updates are long, news waits at each rank
that passes it on. So a look adds the time since the look before, but a quarter of the timeout at most. Hence, with a
timeout of T seconds:

- after a pause of any length nobody is lost at once who was not silent for three quarters of T before it;
- updates longer than T / 4 still add up: who is dead is lost at the fifth look after its last sign;
- nobody is lost of whom there was a sign within the last T seconds, as no time is counted that has not passed, or at
  one of the last four looks. Ranks that look about equally often, and pass on at each look what they know, see a sign
  at nearly each: with updates that vary by half, over 64 nodes, the longest silence of 550,000 was four looks.

Memory and time of a look: some 17 bytes and 5 ns a rank.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

# The share of the timeout that one look counts for at most.
MOST_AT_ONCE = 0.25
# Sums of such shares are rounded.
ROUNDED = 1 + 1e-6


class Patience:
    """Watches the beats of `size` ranks: numbers that rise as long as their owner lives."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._beats = np.zeros(size, np.int64)
        # Seconds that this rank looked: in all, and until the last sign of each.
        self._clock_s, self._heard_s = 0.0, np.zeros(size)
        # Patience begins with the first look, not while ranks are still being set up.
        self._looked_at_s = math.inf

    def look(self, beats: npt.NDArray[np.int64], now_s: float) -> None:
        """Take note of the beats (size,) as they are now; `now_s` is of a clock that is never set back."""
        self._clock_s += min(max(now_s - self._looked_at_s, 0.0), MOST_AT_ONCE * self.timeout_s)
        self._heard_s[beats != self._beats] = self._clock_s
        self._beats[:] = beats
        self._looked_at_s = now_s

    def silent_s(self, rank: int) -> float:
        """For how long a rank has been silent, in seconds."""
        return float(self._clock_s - self._heard_s[rank])

    def wavers(self, rank: int) -> bool:
        """Whether a rank has been silent for a quarter of the timeout: others do for the time being what it did."""
        return self.silent_s(rank) > self.timeout_s / 4 * ROUNDED

    @property
    def unbroken(self) -> bool:
        """Whether nobody has been silent for longer than the timeout."""
        return bool(self._clock_s - self._heard_s.min() <= self.timeout_s * ROUNDED)

    def exhausted(self) -> npt.NDArray[np.bool_]:
        """For each rank whether it has been silent for longer than the timeout."""
        return self._clock_s - self._heard_s > self.timeout_s * ROUNDED
