"""mpirun -n 1 python tests/gossip/programs/roster_news.py

Leaders of 16 nodes of 64 ranks, pretended as in benchmarks/roster.py, on a clock of its own. However long updates are,
nobody is lost who lives; a node whose ranks have died is. And of two nodes both may lose their leaders.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from roster import BEAT, PER_NODE, TIMEOUT_S, Cluster, heirs_among, module

NODES, UPDATES, DEAD = 16, 40, 3
logging.disable(logging.WARNING)


def lost_after(update_s: float, spread: float, *, dead_from: int) -> list[tuple[int, set[int]]]:
    """For each look of the leader of node 0 its number, and the nodes of which it has lost somebody."""
    random, clock = np.random.default_rng(1), SimpleNamespace(now_s=1_000.0)
    module.time = SimpleNamespace(monotonic=lambda: clock.now_s, time=lambda: clock.now_s)  # type: ignore[assignment]
    cluster = Cluster(NODES * PER_NODE)
    rosters = [cluster.roster(leader, delivers=True) for leader in cluster.parts]
    due_s = clock.now_s + update_s * random.random(NODES) * (spread > 0)
    looks, seen = 0, []
    while looks < UPDATES:
        place = int(np.argmin(due_s))
        clock.now_s = float(due_s[place])
        due_s[place] += update_s * random.uniform(1 - spread, 1 + spread)
        if place == DEAD and looks >= dead_from:
            continue
        cluster.local_rows(place * PER_NODE)[1:, BEAT] += 1
        rosters[place].come_by()
        if place == 0:
            looks += 1
            seen.append((looks, {int(rank) // PER_NODE for rank in np.flatnonzero(rosters[0].lost)}))
    return seen


def lost_after_leaders(deaths: dict[int, int]) -> set[frozenset[int]]:
    """Whom the heirs of two nodes have lost at the end, if those die at that look."""
    clock = SimpleNamespace(now_s=1_000.0)
    module.time = SimpleNamespace(monotonic=lambda: clock.now_s, time=lambda: clock.now_s)  # type: ignore[assignment]
    cluster = Cluster(2 * PER_NODE)
    heirs = [leader + heir for leader in cluster.parts for heir in heirs_among(PER_NODE)]
    rosters = {rank: cluster.roster(rank, delivers=True) for rank in heirs}
    others = {leader: [r for r in range(PER_NODE) if leader + r not in heirs] for leader in cluster.parts}
    for look in range(400):
        clock.now_s += 1.0
        for leader, ranks in others.items():
            cluster.local_rows(leader)[ranks, BEAT] += 1
        for rank in [rank for rank in heirs if look < deaths.get(rank, look + 1)]:
            rosters[rank].come_by()
    return {frozenset(np.flatnonzero(rosters[rank].lost).tolist()) for rank in heirs if rank not in deaths}


for pause in (0, 40, 150):
    assert lost_after_leaders({0: 20, PER_NODE: 20 + pause}) == {frozenset({0, PER_NODE})}, pause
for update in (0.05, 1.0, 8.0, 20.0, TIMEOUT_S, 10 * TIMEOUT_S):
    for spread in (0.0, 0.2):
        found = lost_after(update, spread, dead_from=UPDATES)
        assert not any(nodes for _, nodes in found), (update, spread, found)
    if update >= 8.0:
        found = lost_after(update, 0.2, dead_from=10)
        assert {frozenset(nodes) for _, nodes in found} <= {frozenset(), frozenset({DEAD})}, (update, found)
        # At the fifth look after its last news, which comes late by some; if updates are short, after the timeout.
        assert found[-1][1] == {DEAD}, found
        assert all(nodes for number, nodes in found if number > 10 + max(9, 80 / update)), found
sys.stdout.write("nobody who lives was lost\n")
