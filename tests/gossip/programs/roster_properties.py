"""The roster on ranks of pretended nodes: mpirun -n 10 python tests/gossip/programs/roster_properties.py WHAT

With a VARIANT if there is to be one. All ranks are on one host; each five of them are taken for a node, which share
memory, and send messages to others. The first, the second and the fourth of each are heirs.

whole:   ranks write rows of equal words as fast as they can, and all must be whole, and never go back; then they
         finish, and every rank must know every last word. Windows are as large as preflight is told
silent:  the leader of a node does not come by until it is lost, and nobody else may be; then it comes back

Variants: `slow` writers pause in the midst of a row; `two-leaders`: all heirs lead at all times; `two`: the leader and
the next heir are silent; `torn` (wrong): slow, and readers do not look again; `backwards` (wrong): rows are merged
whatever their beat.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from gala_mpi.gossip import roster as module
from gala_mpi.gossip.courier import Courier
from gala_mpi.gossip.news import ROW_BYTES, heirs_among
from gala_mpi.gossip.roster import Roster, roster_bytes
from gala_mpi.gossip.shared_rows import BEAT, Rows, SharedRows
from gala_mpi.mpi.waiting import wait_until

PER_NODE = 5
ENOUGH = 100
DEADLINE_S = 240
world = MPI.COMM_WORLD


class WritesSlowly(SharedRows):
    """As it should be, but with a pause that readers find."""

    def write(self, row: Rows) -> None:
        place, beat = ROW_BYTES * self._window.rank, int(row[BEAT])
        self._window.swap(0, place, -1 - beat)
        self._window.sync()
        self._local[self._window.rank, 1:4] = row[1:4]
        time.sleep(200e-6)
        self._local[self._window.rank, 4:] = row[4:]
        self._window.sync()
        self._window.swap(0, place, beat + 1)
        row[BEAT] = beat + 1


class DoesNotLookAgain(WritesSlowly):
    """Wrong: takes what it reads."""

    def read(self, rows: Rows) -> None:
        found = self._local.copy()
        found[:, BEAT] = np.maximum(found[:, BEAT], -1 - found[:, BEAT])
        newer = found[:, BEAT] > rows[self._here, BEAT]
        rows[self._here[newer]] = found[newer]


def takes_whatever_comes(rows: Rows, found: Rows) -> bool:
    """Wrong: an old row replaces a newer one."""
    others = np.arange(len(rows)) != world.rank
    rows[others] = found[others]
    return True


def all_heirs_lead(roster: Roster) -> bool:
    return roster._is_heir


def make(variant: str, timeout_s: float) -> tuple[Roster, Courier]:
    if variant in ("slow", "torn"):
        module.SharedRows = WritesSlowly if variant == "slow" else DoesNotLookAgain
    elif variant == "backwards":
        module.merge = takes_whatever_comes
    elif variant == "two-leaders":
        Roster._leads = all_heirs_lead
    courier = Courier(world, "inline")
    courier.leaders = [rank - rank % PER_NODE for rank in range(world.size)]
    return Roster(world, courier, timeout_s), courier


def check(rows: Rows, before: Rows) -> None:
    """No row is torn, and none goes back."""
    words = rows[:, 2:]
    assert (words == words[:, :1]).all(), f"torn: {rows.tolist()}"
    assert (rows >= before).all(), f"back: {before.tolist()} then {rows.tolist()}"
    before[:] = rows


def come_by_until(roster: Roster, done: Callable[[], bool]) -> None:
    """Come by again and again."""

    def look() -> bool:
        roster.come_by()
        return done()

    assert wait_until(look, DEADLINE_S), roster.rows.tolist()


def end(roster: Roster, courier: Courier) -> None:
    """Finish, and meet the others."""
    roster.finish()
    come_by_until(roster, lambda: bool(roster.gone.all()))
    roster.meet()
    come_by_until(roster, world.Ibarrier().Test)
    assert not roster.lost.any()
    courier.free()
    roster.free()


def whole(variant: str) -> None:
    roster, courier = make(variant, 60.0)
    windows = [roster._window, *(roster._mailboxes._windows if roster._mailboxes else [])]
    assert sum(len(window._memory) for window in windows) == roster_bytes(world.rank, courier.leaders)
    before, deadline = roster.rows.copy(), time.monotonic() + DEADLINE_S
    count = 0
    while roster.rows[:, 2].min() < ENOUGH or count < 10 * ENOUGH:
        assert time.monotonic() < deadline, roster.rows.tolist()
        count += 1
        roster.mine[2:] = count
        roster.come_by()
        check(roster.rows, before)
    # Until others have come here too they need what this rank passes on.
    come_by_until(roster, world.Ibarrier().Test)
    changes = roster.version
    last = np.array(world.allgather(count))
    end(roster, courier)
    assert (roster.rows[:, 2:] == last[:, None]).all(), (roster.rows.tolist(), last)
    assert changes == 0 < roster.version <= world.size


def silent(variant: str) -> None:
    roster, courier = make(variant, 5.0)
    victims = heirs_among(PER_NODE)[: 2 if variant == "two" else 1]
    come_by_until(roster, lambda: bool((roster.rows[:, BEAT] > 0).all()))
    come_by_until(roster, world.Ibarrier().Test)
    if world.rank in victims:
        assert wait_until(world.Ibarrier().Test, DEADLINE_S)
        # It was not looking itself, so it misses nobody.
        roster.come_by()
        assert not roster.lost.any()
    else:
        come_by_until(roster, lambda: bool(roster.lost[victims].all()))
        assert roster.lost.nonzero()[0].tolist() == victims and roster.gone[victims].all()
        assert 1 <= roster.version <= len(victims)
        come_by_until(roster, world.Ibarrier().Test)
    come_by_until(roster, lambda: not roster.lost.any())
    end(roster, courier)


what, variant = sys.argv[1], (*sys.argv[2:], "")[0]
try:
    {"whole": whole, "silent": silent}[what](variant)
except AssertionError as error:
    print(f"[{world.rank}] {error!r}", file=sys.stderr, flush=True)
    world.Abort(1)
if world.rank == 0:
    print("as promised")
