"""Progress of the whole run, shown by one rank: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gala_mpi import output
from gala_mpi.config import RunConfig
from gala_mpi.train.board import Overview

LIVE_EVERY_S = 0.5
SPEED_OVER_S = 30.0


class Monitor:
    """Shows an Overview every `every_s` seconds. The run began at `begin_s`, and has taken `agent_steps` until now.

    `begin_s` and the like are seconds of the monotonic clock.
    """

    def __init__(self, run: RunConfig, every_s: float, begin_s: float, agent_steps: int) -> None:
        self._console = Console(file=output.stdout(), highlight=False)
        self._live = Live(console=self._console, auto_refresh=False) if _on_a_screen() else None
        self._every_s = LIVE_EVERY_S if self._live else every_s
        self._total_steps, self._time_limit_s = run.total_steps, run.time_limit_s
        self._begin_s, now = begin_s, time.monotonic()
        self._next_s = now + self._every_s
        self._history = [(now, agent_steps)]
        if self._live:
            self._live.start()

    def due(self) -> bool:
        """Whether the next line is to be shown."""
        return time.monotonic() >= self._next_s

    def show(self, overview: Overview) -> None:
        """Show a line."""
        now = time.monotonic()
        self._next_s = now + self._every_s
        self._history.append((now, overview.agent_steps))
        while len(self._history) > 2 and now - self._history[0][0] > SPEED_OVER_S:
            del self._history[0]
        line = self.line(overview, now)
        if self._live:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            output.say(line)

    def line(self, overview: Overview, now: float) -> str:
        """The line of progress."""
        (then, before), steps = self._history[0], overview.agent_steps
        speed = (steps - before) / max(now - then, 1e-9)
        parts = [
            f"{timedelta(seconds=round(now - self._begin_s))}",
            f"{steps:,} of {self._total_steps:,} steps",
            f"{speed:,.0f} steps/s",
            returns_line(overview),
            f"staleness {overview.staleness}",
            f"{self._left(steps, speed, now)} left",
        ]
        return "  |  ".join(parts)

    def _left(self, steps: int, speed: float, now: float) -> str:
        seconds = max(self._total_steps - steps, 0) / speed if speed > 0 else float("inf")
        if self._time_limit_s is not None:
            seconds = min(seconds, max(self._time_limit_s - (now - self._begin_s), 0))
        return str(timedelta(seconds=round(seconds))) if seconds < 1e8 else "unknown time"

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()


def _on_a_screen() -> bool:
    """Whether the output is a terminal that someone sees: launchers hand out pseudo-terminals without a size."""
    stream = output.stdout()
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False  # it was closed meanwhile


def returns_line(overview: Overview) -> str:
    """The mean return in words."""
    if not overview.averaged:
        return "no episode yet"
    return f"mean return {overview.mean_return:.2f} over {overview.averaged} episodes"
