"""A topology that knows of nodes: one-peer exponential inside each, where a message is a copy in memory, and over them.

In a round each rank sends one message inside its node, as over a one-peer exponential graph of the node's ranks. Each
node sends one message to another, as over a one-peer exponential graph of the nodes: whatever the number of ranks and
of nodes. Turn by turn another rank of the node carries it, both ends: each holds few mailboxes, and news enters a node
in several places.

W = (I + Q) / 2 + b (P - I), where Q moves parameters inside the nodes, and P those of the round's carriers from node to
node. A carrier's own weight, 1/2, is shared with the message from elsewhere, and no other rank's changes. Rows and
columns sum to 1, even if the nodes differ in size.
"""

from __future__ import annotations

from collections.abc import Sequence

from gala_mpi.gossip.rules import Rule, Weights, one_peer_exponential, rounds_to_double

# The weight of the message from elsewhere. Of 1/4, 1/3, 0.4 and 0.45 the larger mix better, by ever less (32 nodes of 8
# ranks: effective neighbours 38, 44, 48, 50); 0.4 leaves a carrier a tenth of its own.
BETWEEN_NODES = 0.4


def hierarchical(nodes: Sequence[str]) -> Rule:
    """The rule for ranks r on `nodes[r]`; with one node, or one rank on each, one-peer exponential over all ranks."""
    members: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    groups = list(members.values())
    largest = max(map(len, groups))
    if len(groups) == 1 or largest == 1:
        return one_peer_exponential(len(nodes))
    number = {node: place for place, node in enumerate(members)}
    over_nodes = rounds_to_double(len(groups))

    def moved(rank: int, turn: int, direction: int) -> tuple[int | None, int | None]:
        """The rank one step on (1) or back (-1): inside the node, and on another one; None where there is none."""
        here = number[nodes[rank]]
        group = groups[here]
        place, inside = group.index(rank), rounds_to_double(len(group))
        mate = group[(place + direction * (1 << turn % inside)) % len(group)] if inside else None
        if place != turn % len(group):
            return mate, None
        other = groups[(here + direction * (1 << turn % over_nodes)) % len(groups)]
        return mate, other[turn % len(other)]

    def sources(rank: int, turn: int) -> Weights:
        mate, far = moved(rank, turn, -1)
        found = {} if mate is None else {mate: 0.5}
        return found if far is None else {**found, far: BETWEEN_NODES}

    def targets(rank: int, turn: int) -> list[int]:
        return [other for other in moved(rank, turn, 1) if other is not None]

    return Rule(sources, targets, max(rounds_to_double(largest), over_nodes))
