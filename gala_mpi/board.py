"""The notice board of a run, in the window of rank 0: the shared counter of agent steps, requests to stop, and
the latest status of every rank. No call in the training loop is collective.

    word                 written by                            read by
    agent steps          every rank: atomic add                every rank: what the add returns
    stop requests        every rank: atomic add                every rank: what the add returns
    status mailboxes     rank r writes the r-th (mailbox)      rank 0
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gala_mpi.environments import Episode
from gala_mpi.mailbox import Inbox, Outbox, lay_out
from gala_mpi.waiting import wait_until
from gala_mpi.window import WORD_BYTES, Window

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm, Request

RECENT_EPISODES = 100
COUNTER_RANK = 0

STATUS = np.dtype(
    [
        ("agent_steps", "<i8"),
        ("update", "<i8"),
        ("staleness", "<i8"),
        ("episodes", "<i8"),
        ("recent", [("time_s", "<f8"), ("episode_return", "<f8")], RECENT_EPISODES),
    ]
)


@dataclass(frozen=True)
class Overview:
    """What rank 0 knows of the whole run."""

    agent_steps: int
    episodes: int
    mean_return: float
    averaged: int
    staleness: int


class Board:
    """Making it, `finish` and `free` are collective; all else is local and never waits for another rank's update."""

    def __init__(self, comm: Intracomm) -> None:
        self._comm = comm
        statuses = comm.size if comm.rank == COUNTER_RANK else 0
        places, nbytes = lay_out([STATUS.itemsize] * comm.size)
        self._words = nbytes
        self._window = Window(comm, nbytes + 2 * WORD_BYTES if statuses else WORD_BYTES)
        self._inboxes = [Inbox(self._window, place) for place in places[:statuses]]
        self._outbox = Outbox(self._window, COUNTER_RANK, places[comm.rank])
        self._statuses = np.zeros(comm.size, STATUS)
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_EPISODES)
        self._episodes = 0
        self._pending = np.zeros(2, np.int64)
        self._adding = np.zeros(2, np.int64)
        self._before = np.zeros(2, np.int64)
        self._request: Request | None = None
        self._asked_to_stop = False
        self.total_steps = 0
        self.stop_requested = False
        comm.Barrier()

    def add(self, steps: int) -> None:
        """Add agent steps to the shared counter, lazily: at most one addition is under way at any time."""
        self._pending[0] += steps
        self._advance()

    def ask_all_to_stop(self) -> None:
        """Let every rank see, with its next look at the counter, that the run is to end."""
        if not self._asked_to_stop:
            self._asked_to_stop = True
            self._pending[1] += 1
            self.stop_requested = True

    def _advance(self) -> None:
        if self._harvest():
            self._adding[:] = self._pending
            self._pending[:] = 0
            self._request = self._window.start_add(self._adding, self._before, COUNTER_RANK, self._words)

    def _harvest(self) -> bool:
        """Take the result of the addition under way, if it is there; whether none is under way any more."""
        if self._request is not None:
            if not self._request.Test():
                return False
            self._request = None
            self.total_steps = int(self._before[0] + self._adding[0])
            self.stop_requested |= bool(self._before[1] + self._adding[1])
        return True

    def note_episodes(self, episodes: list[Episode], time_s: float) -> None:
        """Remember finished episodes for the next status."""
        self._episodes += len(episodes)
        self._recent.extend((time_s, episode.episode_return) for episode in episodes)

    def post_status(self, agent_steps: int, update: int, staleness: int) -> None:
        """Publish this rank's status."""
        status = np.zeros(1, STATUS)
        recent = status["recent"][0]
        recent["time_s"] = -np.inf
        if self._recent:
            recent[: len(self._recent)] = np.array(self._recent, dtype=[("t", "<f8"), ("r", "<f8")])
        status["agent_steps"], status["update"] = agent_steps, update
        status["staleness"], status["episodes"] = staleness, self._episodes
        self._outbox.post(status, update=update, time_s=time.time(), agent_steps=agent_steps)

    def overview(self) -> Overview:
        """The run as the latest statuses show it. For rank 0 only."""
        for rank, inbox in enumerate(self._inboxes):
            message = inbox.take()
            if message is not None:
                self._statuses[rank] = message.payload.view(STATUS)[0]
        recent = self._statuses["recent"].reshape(-1)
        recent = recent[(recent["time_s"] > 0)]
        newest = recent[np.argsort(recent["time_s"], kind="stable")][-RECENT_EPISODES:]
        return Overview(
            agent_steps=int(self._statuses["agent_steps"].sum()),
            episodes=int(self._statuses["episodes"].sum()),
            mean_return=float(newest["episode_return"].mean()) if len(newest) else float("nan"),
            averaged=len(newest),
            staleness=int(self._statuses["staleness"].max()),
        )

    def finish(self, timeout_s: float) -> None:
        """Wait until every rank has come here; then `total_steps` is exact. Collective.

        Raises TimeoutError if, for `timeout_s` seconds, neither the last rank comes nor the counter moves.
        """
        self._refresh(timeout_s)
        arrival = self._comm.Ibarrier()
        while not wait_until(arrival.Test, timeout_s):
            seen = self.total_steps
            self._refresh(timeout_s)
            if self.total_steps == seen:
                raise TimeoutError(
                    f"some rank neither finished nor took a step for {timeout_s:g} s (--neighbour-timeout-s)"
                )
        self._refresh(timeout_s)

    def _refresh(self, timeout_s: float) -> None:
        """Add what is pending, and see what the counter then says."""
        for _ in range(2):
            if not wait_until(self._harvest, timeout_s):
                raise TimeoutError(f"rank {COUNTER_RANK} did not answer for {timeout_s:g} s (--neighbour-timeout-s)")
            self._advance()
        wait_until(self._harvest, timeout_s)

    def free(self) -> None:
        """Free the window. Collective, after `finish`."""
        self._window.free()
