"""Watching for learning that has stopped, which nothing else would tell: a run goes on to its end, with exit code 0."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable

MOST_ROWS, FEWEST_ROWS, UPDATES = 50, 10, 500
BLIND_BELOW = 1e-4
# A policy of this entropy (nat) takes another action than its first choice once in some 100,000 times.
CERTAIN_BELOW = 1e-4
# Of the squared error: tasks whose returns are so large are beyond what values come to by steps of a usual size.
LARGE_LOSS = 1e8
log = logging.getLogger(__name__)


class StallWatch:
    """Warns, once for each sign, when the last 50 rows have shown it, or as many as fall into 500 updates.

    Blind: values do not vary with what is seen. Then the explained variance is zero to rounding; in a network that
    works it is not, however little it explains, unless the return does not depend on what is seen. It tells of the
    critic alone: an actor with a body of its own may be well. Certain: the policy has no doubt about any of its
    `actions`.
    """

    def __init__(self, record_every: int, actions: int) -> None:
        length = max(min(MOST_ROWS, UPDATES // record_every), FEWEST_ROWS)
        self._blind = _Sign(length, BLIND_BELOW, _why_blind)
        # One action alone leaves no doubt from the start.
        self._certain = _Sign(length, CERTAIN_BELOW if actions > 1 else -1.0, lambda _: CERTAIN)

    def note(self, update: int, *, explained_variance: float, entropy: float, value_loss: float) -> None:
        """Look at what was recorded of an update."""
        self._blind.note(update, abs(explained_variance), value_loss)
        self._certain.note(update, entropy, value_loss)


class _Sign:
    """A value whose median of the last rows has fallen below a bound: told once."""

    def __init__(self, length: int, below: float, why: Callable[[float], str]) -> None:
        self._last: deque[float] = deque(maxlen=length)
        self._below, self._why, self._told = below, why, False

    def note(self, update: int, value: float, value_loss: float) -> None:
        last = self._last
        last.append(value)
        if not self._told and len(last) == last.maxlen and statistics.median(last) < self._below:
            self._told = True
            log.warning("update %d: %s", update, self._why(value_loss))


CERTAIN = (
    "the policy has long been certain of every action (entropy 0): it explores no more, and hardly learns. Unless the "
    "task is solved, start a new run with a higher --entropy-weight, or a lower --learning-rate"
)


def _why_blind(value_loss: float) -> str:
    if value_loss > LARGE_LOSS:
        return (
            f"values explain nothing of the returns, which are far larger (squared error {value_loss:.2g}): rewards "
            "are too large to learn from; scale them in a wrapper"
        )
    return (
        "the value of all observations has long been the same (explained variance 0). If the return does not depend on "
        "what is seen, this is as it should be. Else the critic is dead, and perhaps the policy with it: start a new "
        "run with a lower --learning-rate, or with --learning-rate-scaling none; scale observations that are in the "
        "thousands in a wrapper"
    )
