"""Waiting for other ranks: always with a deadline, making progress, and backing off."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

YIELD_FOR_S = 0.002
LONGEST_SLEEP_S = 0.001


def wait_until(done: Callable[[], bool], timeout_s: float) -> bool:
    """Call `done` until it returns True; False if it has not within `timeout_s` seconds.

    The first 2 ms only yield the core, since what is waited for is mostly near; then sleeps grow to 1 ms, so
    that ranks that share a core with the one waited for do not hold it up.
    """
    begin = time.monotonic()
    sleep_s = 20e-6
    while not done():
        waited_s = time.monotonic() - begin
        if waited_s > timeout_s:
            return False
        if waited_s < YIELD_FOR_S:
            os.sched_yield()
        else:
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, LONGEST_SLEEP_S)
    return True
