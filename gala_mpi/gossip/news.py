"""Which ranks pass on what is known of all ranks, to whom, and how often: the rules of the roster, without a message.

See `roster` for what they are for, and `shared_rows` for a row. All is local.
"""

from __future__ import annotations

from collections.abc import Sequence

ROW_WORDS = 8
ROW_BYTES = 8 * ROW_WORDS
HEIRS = 3
SHORTEST_ROUND_S = 0.05
BYTES_PER_S = 2**18


def round_s(size: int, neighbours: int, timeout_s: float) -> float:
    """Seconds between two messages of a node of `size` ranks in all, see `roster`."""
    frugal_s, prompt_s = size * ROW_BYTES / BYTES_PER_S, timeout_s / (4 * max(neighbours, 1))
    return max(SHORTEST_ROUND_S, min(frugal_s, prompt_s))


def heirs_among(ranks_here: int) -> list[int]:
    """The numbers, on their node, of those that may lead it, in this order.

    They are far from each other, as what ends several ranks of a node at once mostly ends neighbours.
    """
    return sorted({number * ranks_here // HEIRS for number in range(HEIRS)})


class Heirs:
    """The graph of messages: heirs send to all heirs of their node's neighbours, and nobody else sends. Local.

    Neighbours are the nodes 1, 2, 4, ... further on, and further back: the survivors of a dead node still meet.
    `leaders` has the lowest rank of each rank's node.
    """

    def __init__(self, leaders: Sequence[int]) -> None:
        nodes: dict[int, list[int]] = {}
        for rank, leader in enumerate(leaders):
            nodes.setdefault(leader, []).append(rank)
        self._nodes, names = list(nodes.values()), list(nodes)
        place = {name: number for number, name in enumerate(names)}
        self._places = [place[leader] for leader in leaders]

    def node_of(self, rank: int) -> list[int]:
        """The ranks of a rank's node, ascending."""
        return self._nodes[self._places[rank]]

    def neighbours_of(self, rank: int) -> list[list[int]]:
        """The heirs of each node that is a neighbour of the rank's own."""
        place, count = self._places[rank], len(self._nodes)
        steps = [1 << bit for bit in range((count - 1).bit_length())]
        places = sorted({(place + sign * step) % count for step in steps for sign in (-1, 1)})
        return [self._heirs_of(other) for other in places]

    def _heirs_of(self, place: int) -> list[int]:
        ranks = self._nodes[place]
        return [ranks[number] for number in heirs_among(len(ranks))]

    def in_neighbours(self, rank: int) -> list[int]:
        """Ranks that send to `rank`, ascending."""
        if rank not in self._heirs_of(self._places[rank]):
            return []
        return sorted(heir for heirs in self.neighbours_of(rank) for heir in heirs)

    # Each sends to those that it hears from.
    out_neighbours = in_neighbours
