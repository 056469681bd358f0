"""The stopwatch: where the time of an update goes, part by part, without a gap.

On a GPU, which works on by itself, a part is the time until its work is given to the device, and whoever needs a result
waits for it; with --profile each part is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

PARTS = {
    "emulator": "the simulators' steps",
    "transfer": "observations to the device",
    "forward": "the network's forward passes, with the scaling of observations and the choice of actions",
    "sampling": "random numbers for that choice, and taking actions to the simulators",
    "loss": "log-probabilities, returns and loss; on a GPU a part of backward",
    "backward": "the backward pass",
    "optimiser": "norm of the gradient, clip and step",
    "exchange": "posting and averaging parameters, or the all-reduce of gradients; waits included",
    "status": "news of the other ranks, progress",
    "record": "rows, sketches and flushes",
    "checkpoint": "writing checkpoints",
}
ROLLOUT = ("emulator", "transfer", "forward", "sampling")
LEARN = ("loss", "backward", "optimiser")


class Stopwatch:
    """Sums of seconds for each of PARTS. `settle`, if given, is called first, to wait for what a device still does."""

    def __init__(self, settle: Callable[[], object] | None = None) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._settle = settle
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count the time since the lap before as that of `part`."""
        if self._settle is not None:
            self._settle()
        now = time.perf_counter()
        self.seconds[part] += now - self._since
        self._since = now

    def sum(self, *parts: str) -> float:
        """Seconds of some parts together."""
        return sum(self.seconds[part] for part in parts)


def profile_table(seconds: Mapping[str, float], updates: int) -> str:
    """Milliseconds an update, and share, of each part."""
    total = max(sum(seconds.values()), 1e-12)
    rows = [
        f"  {part:<10} {1e3 * spent / max(updates, 1):9.3f} ms  {spent / total:6.1%}  {PARTS[part]}"
        for part, spent in seconds.items()
    ]
    return "\n".join([f"an update of this rank, mean of {updates:,}: {1e3 * total / max(updates, 1):.3f} ms", *rows])
