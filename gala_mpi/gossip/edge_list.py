"""A graph of the user's own: edges `source target [weight]`, one a line of a text file, or as a function gives them.

Either every edge has a weight or none has. Weights are what the target gives to the source's message; a target's own
parameters keep the rest. Without weights a target gives 1 / (1 + in-degree) to each message and to itself. In a file
blank lines and what follows a `#` are left out. All of this is local; of the ranks of a job one reads the file
(`shared_topology`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from gala_mpi.config import ConfigError
from gala_mpi.files import read_file

InWeights: TypeAlias = tuple[dict[int, float], ...]
"""in_weights[target][source]: the edges of a graph and their weights."""
Edge: TypeAlias = "tuple[int, int] | tuple[int, int, float]"
"""Source, target, and perhaps a weight."""
LARGEST_BYTES = 2**28
FORMAT = "an edge `source target`, or `source target weight`"


def read_edge_list(path: Path, size: int) -> InWeights:
    """The graph over `size` ranks in the file at `path`, sources ascending.

    Raises ConfigError, which names the file and the line, for anything but a strongly connected graph without
    self loops and duplicates, whose weights are above 0 and leave something to each target's own parameters.
    """
    try:
        lines = read_file(path.resolve(), LARGEST_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError("topology", str(path), f"a text file that can be read ({error})") from error
    found = _weighed(_parsed(path, lines), size)
    _check_strongly_connected(str(path), found)
    return found


def edges_by_update(edges: Callable[[int], Iterable[Edge]], size: int, period: int) -> list[InWeights]:
    """The graphs over `size` ranks that `edges(update)` gives at the updates 1 to `period`.

    Raises ConfigError as `read_edge_list` does; it is all of these graphs together that must be strongly connected.
    """

    def placed(update: int) -> Iterator[tuple[str, Sequence[object]]]:
        for edge in edges(update):
            yield f"update {update}: {edge!r}", edge if isinstance(edge, list | tuple) else ()

    rounds = [_weighed(placed(update), size) for update in range(1, period + 1)]
    together = [{source for now in rounds for source in now[target]} for target in range(size)]
    _check_strongly_connected(f"{period} updates", together)
    return rounds


def _parsed(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Sequence[object]]]:
    """The edges of a file's lines, each with the place that it is to be told by."""
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if words:
            yield f"{path}, line {number}: {' '.join(words)}", words


def _weighed(edges: Iterable[tuple[str, Sequence[object]]], size: int) -> InWeights:
    """The graph of these edges, each with its place; sources ascending."""
    found: list[dict[int, float | None]] = [{} for _ in range(size)]
    totals = [0.0] * size
    weighted: bool | None = None
    for place, words in edges:
        source, target, weight = _parse(words, size, place)
        if source in found[target]:
            _refuse(place, "each edge once")
        if weighted is not None and weighted != (weight is not None):
            _refuse(place, "a weight on every edge, or on none")
        weighted = weight is not None
        found[target][source] = weight
        totals[target] += weight or 0.0
        # Ten times 0.1 is a little less than 1 in binary.
        if totals[target] > 1 - 1e-9:
            _refuse(place, f"weights into rank {target} that sum to less than 1, not {totals[target]:g}")
    return tuple(
        {source: 1 / (1 + len(sources)) if weight is None else weight for source, weight in sorted(sources.items())}
        for sources in found
    )


def _parse(words: Sequence[object], size: int, place: str) -> tuple[int, int, float | None]:
    if len(words) not in (2, 3):
        _refuse(place, FORMAT)
    try:
        source, target = int(str(words[0])), int(str(words[1]))
        weight = float(str(words[2])) if len(words) == 3 else None
    except ValueError:
        _refuse(place, f"{FORMAT}, in numbers")
    if not (0 <= source < size and 0 <= target < size):
        _refuse(place, f"ranks from 0 to {size - 1}")
    if source == target:
        _refuse(place, "two different ranks: a rank's own weight is what its messages leave")
    if weight is not None and not 0 < weight < 1:
        _refuse(place, "a weight above 0 and below 1")
    return source, target, weight


def _refuse(place: str, allowed: str) -> NoReturn:
    raise ConfigError("topology", place, allowed)


def _check_strongly_connected(place: str, found: Sequence[Collection[int]]) -> None:
    """Rank 0 must reach every rank, and every rank must reach rank 0."""
    sources = [list(edges) for edges in found]
    targets: list[list[int]] = [[] for _ in found]
    for target, edges in enumerate(found):
        for source in edges:
            targets[source].append(target)
    for edges_of, broken in ((targets, "rank 0 cannot reach rank {}"), (sources, "rank {} cannot reach rank 0")):
        missed = set(range(len(found))) - reachable(edges_of, 0)
        if missed:
            allowed = f"a strongly connected graph over {len(found)} ranks: {broken.format(min(missed))}"
            _refuse(place, allowed)


def reachable(neighbours: list[list[int]], start: int) -> set[int]:
    """The nodes that a walk from `start` along `neighbours` can come to, `start` among them."""
    seen, frontier = {start}, [start]
    while frontier:
        for node in neighbours[frontier.pop()]:
            if node not in seen:
                seen.add(node)
                frontier.append(node)
    return seen
