"""The notice board of a run: what every rank has done, known to all ranks, kept by none.

It is the roster's rows with the words of a run: steps taken, requests to stop and the end itself thus reach every rank
without a server whose death would end the run. See `gossip.roster` for who writes and reads what, how news spreads, and
how all of it grows. No call in the training loop is collective, and none waits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.news import ROW_BYTES
from gala_mpi.gossip.roster import FINISHED, Roster

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from gala_mpi.learning.environments import Episode

# Of all ranks together, or a few more.
RECENT_EPISODES = 100
STOP, DIVERGED, FAILED, UNWRITTEN = 2, 4, 8, 16
assert FINISHED not in (STOP, DIVERGED, FAILED, UNWRITTEN)

ROW = np.dtype(
    [
        ("beat", "<i8"),
        ("flags", "<i8"),
        ("agent_steps", "<i8"),
        ("update", "<i8"),
        ("staleness", "<i8"),
        ("episodes", "<i8"),
        # Sum of the returns of this rank's last episodes, and how many those are.
        ("recent_return", "<f8"),
        ("recent", "<i8"),
    ]
)
assert ROW.itemsize == ROW_BYTES


@dataclass(frozen=True)
class Overview:
    """What a rank knows of the whole run; `mean_return` is over the last episodes of each rank, `averaged` in all."""

    agent_steps: int
    episodes: int
    mean_return: float
    averaged: int
    staleness: int


class Board:
    """This rank's view. Making and freeing it are collective; all else is local.

    A rank is lost when its row has not changed for `timeout_s` seconds, and back when it does. One that is done may
    fall silent, but not before it meets the others.
    """

    def __init__(self, comm: Intracomm, courier: Courier, timeout_s: float) -> None:
        self.roster = Roster(comm, courier, timeout_s)
        """By which this rank comes with each `report` and `come_by`."""
        self._rows = self.roster.rows.view(ROW)[:, 0]
        self._mine = self._rows[comm.rank : comm.rank + 1]
        self._recent: deque[float] = deque(maxlen=math.ceil(RECENT_EPISODES / comm.size))

    @property
    def total_steps(self) -> int:
        """Agent steps of all ranks, as far as this rank knows; exact after `finish`, if no rank is lost."""
        return int(self._rows["agent_steps"].sum())

    @property
    def stop_requested(self) -> bool:
        """Whether some rank asked all to stop."""
        return bool((self._rows["flags"] & STOP).any())

    @property
    def lost(self) -> list[int]:
        """Ranks that count as lost, ascending."""
        return [int(rank) for rank in np.flatnonzero(self.roster.lost)]

    @property
    def diverged(self) -> list[int]:
        """Ranks that ended since their parameters were not finite, ascending."""
        return self._with(DIVERGED)

    @property
    def failed(self) -> list[int]:
        """Ranks that ended by an error, ascending."""
        return self._with(FAILED)

    @property
    def unwritten(self) -> list[int]:
        """Ranks that could not write all their metrics, or their last checkpoint, ascending."""
        return self._with(UNWRITTEN)

    def _with(self, flag: int) -> list[int]:
        return [int(rank) for rank in np.flatnonzero(self._rows["flags"] & flag)]

    @property
    def speaker(self) -> int:
        """The rank that speaks for the run: the lowest that is not lost."""
        return int(np.argmin(self.roster.lost))

    def go_on_from(self, agent_steps: Sequence[int], update: int, episodes: int) -> None:
        """Begin with the steps that each rank had taken, and this rank's updates and episodes."""
        self._rows["agent_steps"] = agent_steps
        self._mine["update"], self._mine["episodes"] = update, episodes

    def ask_all_to_stop(self) -> None:
        """Let every rank see, within a few beats, that the run is to end."""
        self._mine["flags"] |= STOP

    def note_episodes(self, episodes: list[Episode]) -> None:
        """Add finished episodes to this rank's last ones."""
        self._mine["episodes"] += len(episodes)
        self._recent.extend(episode.episode_return for episode in episodes)
        self._mine["recent_return"], self._mine["recent"] = sum(self._recent), len(self._recent)

    def report(self, agent_steps: int, update: int, staleness: int) -> None:
        """Write this rank's row, then come by."""
        self._mine["agent_steps"], self._mine["update"], self._mine["staleness"] = agent_steps, update, staleness
        self.come_by()

    def come_by(self) -> None:
        """Read what others have written, and pass it on if that is due. To be called while waiting too."""
        self.roster.come_by()

    def tell(self) -> None:
        """Pass on what is known, at once."""
        self.roster.tell()

    def overview(self) -> Overview:
        """The run as this rank knows it."""
        heard = self._rows[~self.roster.lost]
        averaged = int(heard["recent"].sum())
        return Overview(
            agent_steps=self.total_steps,
            episodes=int(self._rows["episodes"].sum()),
            mean_return=float(heard["recent_return"].sum() / averaged) if averaged else math.nan,
            averaged=averaged,
            staleness=int(heard["staleness"].max(initial=0)),
        )

    def finish(self, *, diverged: bool = False, failed: bool = False, unwritten: bool = False) -> None:
        """Say that this rank is done, and how."""
        self._mine["flags"] |= diverged * DIVERGED | failed * FAILED | unwritten * UNWRITTEN
        self.roster.finish()

    @property
    def all_done(self) -> bool:
        """Whether every rank is done, or lost. Ends: whoever is not heard is lost."""
        return bool(self.roster.gone.all())

    def meet(self) -> None:
        """From now on ranks that are done must be heard too: they come by until all have met."""
        self.roster.meet()

    def free(self) -> None:
        """Free the windows. Collective, once all have met."""
        self.roster.free()
