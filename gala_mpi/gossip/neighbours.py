"""The ranks that a rank mixes with: who is heard, who is lost, and who is waited for. All is local.

A neighbour is heard when it leaves a message. One that leaves none for the timeout is lost: it is left out of mixing
and of waiting, until it is heard again. One that has said that it has finished, or pauses, leaves none, and is not
waited for.

Patience runs only while this rank looks. Between two looks it may have been stopped, for longer than the timeout, and
those who wait for it meanwhile send nothing: of that time but a part of the timeout counts. Where updates are long, the
parts add up. In a topology of several rounds, in which a neighbour may send in one of them alone, the part is so many
times smaller.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from gala_mpi.gossip.patience import MOST_AT_ONCE, ROUNDED
from gala_mpi.gossip.rules import Weights
from gala_mpi.gossip.topology import mixing_weights

if TYPE_CHECKING:
    from gala_mpi.gossip.background import BackgroundInbox
    from gala_mpi.gossip.mailbox import Inbox, Message

log = logging.getLogger(__name__)


@dataclass(eq=False)
class InNeighbour:
    """What this rank knows of one rank that sends to it."""

    rank: int
    inbox: Inbox | BackgroundInbox
    silent_s: float = 0.0
    update: int = 0
    number: int = 0
    dropped: int = 0
    staleness: int = 0
    message_age_s: float = math.nan
    distance: float = math.nan
    lost: bool = False
    finished: bool = False
    held: Message | None = None

    def take(self) -> Message | None:
        """The newest message, if there is one; it is held, and what was held is given up for it."""
        if not self.inbox.fresh():
            return None
        # What was taken before is valid no longer.
        self.held = None
        message = self.inbox.take()
        if message is not None:
            self.dropped += max(message.number - self.number - 1, 0)
            self.number, self.update, self.finished = message.number, message.update, message.last
            if len(message.payload):
                self.held = message
        return message


Taken: TypeAlias = "tuple[InNeighbour, Message]"


class InNeighbours:
    """All in-neighbours of a rank, of which those are lost that are silent for `timeout_s` seconds.

    `rounds` has the weights of messages in each round of the topology (`Topology.rounds`). `max_staleness` is the
    number of updates without a message of a neighbour after which that one is waited for; None: nobody ever is.
    """

    def __init__(
        self,
        neighbours: Sequence[InNeighbour],
        timeout_s: float,
        rounds: Sequence[Weights],
        max_staleness: int | None = None,
    ) -> None:
        self._all, self._timeout_s, self._rounds = neighbours, timeout_s, rounds
        self._max_staleness = max_staleness
        self._looked_at_s: float | None = None
        self._stand_in: InNeighbour | None = None

    def stand_in(self, neighbour: InNeighbour | None) -> None:
        """From now on hear this rank beside the topology's, since some of those are gone; None: no longer."""
        self._stand_in = neighbour

    def _everyone(self) -> Sequence[InNeighbour]:
        return self._all if self._stand_in is None else [*self._all, self._stand_in]

    def look(self) -> tuple[bool, bool]:
        """Whether there is a message to mix, and whether to wait for more: some neighbour is too stale.

        One that is lost or has finished is not waited for, nor is the one that stands in. In a topology of several
        rounds a neighbour is silent in most of them, so there the newest message of all counts; and a rank that may
        never hear from some neighbour again waits for none.
        """
        passed_s = self._since_last_look()
        found = self._stand_in is not None and self._stand_in.inbox.fresh()
        missing = []
        for neighbour in self._all:
            # Who has only paused goes on with a message.
            if neighbour.finished and not neighbour.inbox.fresh():
                continue
            neighbour.silent_s += passed_s
            if neighbour.inbox.fresh():
                found = True
                neighbour.silent_s = 0.0
                if neighbour.lost:
                    neighbour.lost = False
                    log.warning("rank %d is heard again and takes part in mixing", neighbour.rank)
            elif neighbour.silent_s <= self._timeout_s * ROUNDED:
                missing.append(neighbour.staleness)
            elif not neighbour.lost:
                neighbour.lost = True
                log.warning(
                    "nothing heard from rank %d for %g s: it counts as lost and is left out of mixing",
                    neighbour.rank,
                    self._timeout_s,
                )
        if self._max_staleness is None or not missing:
            return found, False
        if len(self._rounds) > 1:
            silent = not found and len(missing) == len(self._all)
            return found, silent and min(missing) >= self._max_staleness
        return found, max(missing) >= self._max_staleness

    @property
    def all_silent(self) -> bool:
        """Whether nobody is left who could send: all are lost, or have finished."""
        return all(neighbour.finished or neighbour.lost for neighbour in self._all)

    def _since_last_look(self) -> float:
        """Seconds that count; none at the first look, before which ranks are still being set up."""
        now = time.monotonic()
        before, self._looked_at_s = self._looked_at_s, now
        return 0.0 if before is None else min(now - before, MOST_AT_ONCE * self._timeout_s / len(self._rounds))

    def take(self) -> tuple[list[Taken], int]:
        """The newest message of each that has sent one with parameters, and how many messages those replaced."""
        taken, dropped = [], 0
        for neighbour in self._everyone():
            before = neighbour.dropped
            message = neighbour.take()
            dropped += neighbour.dropped - before
            if message is not None and len(message.payload):
                taken.append((neighbour, message))
        return taken, dropped

    def weights(self, taken: Sequence[Taken]) -> list[float]:
        """Of messages; what is left out stays with this rank's own parameters.

        The one that stands in has half of what all that are neither lost nor done would leave: over a graph of equal
        weights that is the weight of one that is gone. In a topology of several rounds, of what the messages leave.
        """
        stands_in = bool(taken) and taken[-1][0] is self._stand_in
        usual = taken[:-1] if stands_in else taken
        weights = mixing_weights(self._rounds, [(neighbour.rank, message.update) for neighbour, message in usual])
        if not stands_in:
            return weights
        left = 1 - sum(weights)
        if len(self._rounds) == 1:
            there = [neighbour.rank for neighbour in self._all if not (neighbour.lost or neighbour.finished)]
            left = min(left, 1 - sum(self._rounds[0][rank] for rank in there))
        # It is the last of all.
        return [*weights, left / 2]

    def settle(self, taken: Sequence[Taken]) -> list[InNeighbour]:
        """Count on the staleness after an update; those whose message was mixed, and not rejected."""
        mixed = [neighbour for neighbour, _ in taken if neighbour.held]
        for neighbour in self._everyone():
            neighbour.staleness = 0 if neighbour in mixed else neighbour.staleness + 1
        return mixed

    def held(self) -> list[Taken]:
        """The messages that are held, the newest first."""
        held = [(neighbour, neighbour.held) for neighbour in self._everyone() if neighbour.held]
        return sorted(held, key=lambda pair: pair[1].time_s, reverse=True)

    def let_go(self) -> None:
        """Give up all messages: they are views of the window's memory."""
        for neighbour in self._everyone():
            neighbour.held = None
