"""Watching for a network that has died: it gives the same value whatever it sees."""

from __future__ import annotations

import logging
import statistics
from collections import deque

MOST_ROWS, FEWEST_ROWS, UPDATES = 50, 10, 500
BLIND_BELOW = 1e-4
log = logging.getLogger(__name__)


class BlindnessWatch:
    """Warns, once, when the values that the policy gives have not varied with what it sees for a while.

    Then the explained variance is zero to rounding; in a network that works it is not, however little it explains.
    """

    def __init__(self, record_every: int) -> None:
        self._last: deque[float] = deque(maxlen=max(min(MOST_ROWS, UPDATES // record_every), FEWEST_ROWS))

    def note(self, explained_variance: float, update: int) -> None:
        """Look at the explained variance of an update."""
        last = self._last
        last.append(abs(explained_variance))
        if last and len(last) == last.maxlen and statistics.median(last) < BLIND_BELOW:
            log.warning(
                "update %d: the value of all observations has long been the same (explained variance 0): probably most "
                "of the network is dead, and will not learn; what helps: a new run with a lower --learning-rate, or "
                "with --learning-rate-scaling none",
                update,
            )
            self._last = deque(maxlen=0)
