"""What a topology looks like, costs and mixes like, before a run: gala-mpi topology ring --size 8

Prints the measures and a drawing in text, or JSON, and writes an image where asked to. Local, without MPI.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from gala_mpi import arguments
from gala_mpi.config import ConfigError, at_home
from gala_mpi.gossip.mixing import GAMMA, LARGEST_GAMMA
from gala_mpi.gossip.topology import TOPOLOGIES, Topology, make_topology, warning_of
from gala_mpi.graphs.measures import DENSE_LIMIT, GraphMeasures, measure

DESCRIPTION = "Show who sends to whom: gala-mpi topology hierarchical --size 16 --ranks-per-node 4 --draw graph.png"
NAMES = textwrap.fill(f"names: {', '.join(TOPOLOGIES)}", 80, subsequent_indent=" " * 7, break_on_hyphens=False)
MOST_RANKS = 4096
# What fits the width of a terminal; the picture shows a rank's targets in one character each.
PICTURED_RANKS, LISTED_NEIGHBOURS = 40, 8
PICTURE = "in the picture: \\ the rank itself, o a rank it sends to, X one on another node"


@dataclass(frozen=True)
class TopologyOptions:
    """What `gala-mpi topology` can be told."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]]
    """Name of a topology, as `gala-mpi topology --help` lists them, or the path of an edge list: a text file of lines
    `source target [weight]`."""
    size: int
    """Number of ranks, 1 to 4096."""
    ranks_per_node: int | None = None
    """Ranks on each node, in order; by default all ranks are on one node. Places `hierarchical`, decides `auto`, and
    tells the edges between nodes."""
    gamma: float = GAMMA
    """Of the effective neighbours: 1 / (1 - gamma) is the number of updates that a rank's parameters remember."""
    draw: Path | None = None
    """Also draw the graph to this file, .png or .svg."""
    json: bool = False
    """Print JSON instead of text, with every edge: [source, target, weight], and the update of the period behind it if
    that has several."""

    def __post_init__(self) -> None:
        if self.draw is not None:
            object.__setattr__(self, "draw", at_home("draw", self.draw))
        if not 1 <= self.size <= MOST_RANKS:
            raise ConfigError("size", self.size, f"a number of ranks from 1 to {MOST_RANKS}")
        if not 0 <= self.gamma <= LARGEST_GAMMA:
            raise ConfigError("gamma", self.gamma, f"a number from 0 to {LARGEST_GAMMA}")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ConfigError("ranks_per_node", self.ranks_per_node, "a number of at least 1")
        if self.draw is not None and self.draw.suffix not in (".png", ".svg"):
            raise ConfigError("draw", str(self.draw), "a file name that ends in .png or .svg")


def report(args: list[str]) -> str:
    """What `gala-mpi topology` prints; writes the image. Raises UsageError for what cannot be done."""
    options = arguments.parse(TopologyOptions, "topology", DESCRIPTION, args)
    per_node = options.ranks_per_node or options.size
    nodes = [f"node{rank // per_node}" for rank in range(options.size)]
    topology = make_topology(options.name, options.size, nodes)
    if options.draw is not None:
        # Only now: matplotlib takes a second to import, and not everyone has it.
        from gala_mpi.graphs.drawing import draw

        draw(topology, nodes, options.draw)
    measures = measure(topology, nodes, options.gamma)
    text = as_json(topology, measures) if options.json else as_text(options.name, topology, nodes, measures)
    return text if options.json or options.draw is None else f"{text}\ndrawn to {options.draw}"


def help_text(_args: list[str]) -> str:
    """What `gala-mpi topology --help` prints."""
    return arguments.help_text(TopologyOptions, "topology", f"{DESCRIPTION}\n\n{NAMES}")


def as_json(topology: Topology, measures: GraphMeasures) -> str:
    """The measures and all edges with their weights, in one line."""
    edge_list = [
        [source, target, weight, *([turn + 1] if topology.rotating else [])]
        for target in range(topology.size)
        for turn, sources in enumerate(topology.rounds(target))
        for source, weight in sorted(sources.items())
    ]
    return json.dumps({**dataclasses.asdict(measures), "warning": warning_of(topology), "edge_list": edge_list})


def as_text(asked: str, topology: Topology, nodes: list[str], measures: GraphMeasures) -> str:
    """The measures, and a table of the ranks with a picture of the adjacency matrix; `asked` is the name given."""
    said = io.StringIO()
    console = Console(file=said, width=max(80, shutil.get_terminal_size().columns))
    console.print(_title(measures) + (f" ({asked})" if asked != topology.name else ""), highlight=False, markup=False)
    warning = warning_of(topology)
    if warning is not None:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    console.print(_summary(measures))
    console.print(_ranks(topology, nodes, measures))
    if topology.size > PICTURED_RANKS:
        console.print(f"... and {topology.size - PICTURED_RANKS} ranks more: --json lists all", highlight=False)
    else:
        console.print(PICTURE, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in said.getvalue().rstrip().splitlines())


def _title(measures: GraphMeasures) -> str:
    return f"{measures.name}: {_count(measures.size, 'rank')} on {_count(measures.nodes, 'node')}"


def _summary(measures: GraphMeasures) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("in-degree", _span(measures.in_degrees))
    table.add_row("out-degree", _span(measures.out_degrees))
    table.add_row("edges", f"{measures.edges}, of them {measures.edges_between_nodes} between nodes")
    messages = f"{measures.messages_per_update:g}, of them {measures.messages_between_nodes:g} between nodes"
    if measures.rotating:
        messages += f" (mean over a period of {_count(measures.period, 'update')})"
    table.add_row("messages per update", messages)
    table.add_row("diameter", str(measures.diameter))
    table.add_row(
        "doubly stochastic",
        "yes: in lockstep, mixing keeps the mean of all ranks"
        if measures.doubly_stochastic
        else "no: even in lockstep, mixing tends to a weighted mean of the ranks",
    )
    gap = f"not computed for this kind above {DENSE_LIMIT} ranks"
    if measures.spectral_gap is not None:
        gap = f"{measures.spectral_gap:.4g}"
        if measures.rotating:
            gap += (
                " per update"
                if measures.spectral_gap < 1
                else f": in lockstep, consensus after {measures.period} updates"
            )
    table.add_row("spectral gap", gap)
    table.add_row(
        "effective neighbours",
        f"{measures.effective_neighbours:.4g} of {measures.size}, at gamma {measures.gamma:g}",
    )
    return table


def _ranks(topology: Topology, nodes: list[str], measures: GraphMeasures) -> Table:
    pictured = topology.size <= PICTURED_RANKS
    uneven = len({*measures.in_degrees}) > 1 or len({*measures.out_degrees}) > 1
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("rank", justify="right")
    columns = (
        ("node", measures.nodes > 1),
        ("".join(str(rank % 10) for rank in range(topology.size)), pictured),
        ("in", uneven),
        ("out", uneven),
    )
    shown = [title for title, wanted in columns if wanted]
    for title in shown:
        table.add_column(title, no_wrap=True)
    for title in ("sends to", "own weight", "weight of a message"):
        table.add_column(title)
    for rank in range(min(topology.size, PICTURED_RANKS)):
        rounds = topology.rounds(rank)
        cells = (
            nodes[rank],
            _picture(topology, nodes, rank) if pictured else "",
            str(measures.in_degrees[rank]),
            str(measures.out_degrees[rank]),
        )
        table.add_row(
            str(rank),
            *(cell for cell, (_, wanted) in zip(cells, columns, strict=True) if wanted),
            _listed(topology.out_neighbours(rank)),
            _weights(1 - math.fsum(sources.values()) for sources in rounds),
            _weights(weight for sources in rounds for weight in sources.values()),
        )
    return table


def _picture(topology: Topology, nodes: list[str], rank: int) -> str:
    row = ["."] * topology.size
    row[rank] = "\\"
    for target in topology.out_neighbours(rank):
        row[target] = "o" if nodes[target] == nodes[rank] else "X"
    return "".join(row)


def _listed(ranks: tuple[int, ...]) -> str:
    text = " ".join(map(str, ranks[:LISTED_NEIGHBOURS]))
    return text if len(ranks) <= LISTED_NEIGHBOURS else f"{text} ... ({len(ranks)})"


def _weights(weights: Iterable[float]) -> str:
    values = sorted({f"{weight:.3g}" for weight in weights}, key=float) or [""]
    return " or ".join(values) if len(values) <= 2 else f"{values[0]} to {values[-1]}"


def _span(degrees: tuple[int, ...]) -> str:
    low, high = min(degrees), max(degrees)
    return str(low) if low == high else f"{low} to {high}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
