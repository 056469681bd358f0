"""An image of a topology: ranks on a circle, or gathered by node, with an arrow for every edge.

Needs matplotlib and networkx, which training does not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gala_mpi.config import ConfigError, UsageError
from gala_mpi.gossip.topology import HIERARCHICAL, Topology

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes

# Beyond this, arrows take minutes and show one black disc.
MOST_EDGES = 5000
LABELLED_EDGES = 20
LABELLED_RANKS = 100
INSIDE, BETWEEN = "0.45", "#c0392b"


def draw(topology: Topology, nodes: Sequence[str], path: Path) -> None:
    """Draw to `path`, .png or .svg. Local. `nodes[r]` is the node of rank r.

    Raises UsageError if matplotlib is missing, and ConfigError if there are too many edges or the file cannot
    be written.
    """
    # A notebook's session leaves one in the environment on which the import fails.
    os.environ["MPLBACKEND"] = "Agg"
    try:
        import networkx as nx
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        missing = (error.name or "matplotlib").partition(".")[0]
        raise UsageError(f"--draw needs {missing}: pip install matplotlib networkx") from error
    count = sum(map(len, topology.in_edges))
    if count > MOST_EDGES:
        raise ConfigError("draw", str(path), f"a graph of at most {MOST_EDGES} edges, not {count}")
    graph = nx.DiGraph()
    graph.add_nodes_from(range(topology.size))
    for target in range(topology.size):
        for sources in topology.rounds(target):
            for source, weight in sources.items():
                graph.add_edge(source, target, weight=weight)
    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.margins(0.08)
    _draw_graph(graph, topology, nodes, axes)
    several = len(set(nodes)) > 1
    axes.set_title(
        f"{Path(topology.name).name}, {topology.size} ranks" + (f" on {len(set(nodes))} nodes" if several else "")
    )
    if several:
        kinds = [
            Line2D([], [], color=INSIDE, label="inside a node"),
            Line2D([], [], color=BETWEEN, label="between nodes"),
        ]
        axes.legend(handles=kinds, loc="lower right", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError("draw", str(path), f"a file that can be written ({error.strerror})") from error


def _draw_graph(graph: nx.DiGraph, topology: Topology, nodes: Sequence[str], axes: Axes) -> None:
    import networkx as nx

    places = _places(topology, nodes)
    # Square points: neighbours on the circle do not touch.
    size = min(600.0, (1200 / topology.size) ** 2)
    node_numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    colours = [f"C{node_numbers[node] % 10}" for node in nodes]
    nx.draw_networkx_nodes(graph, places, ax=axes, node_size=size, node_color=colours, edgecolors="white")
    if topology.size <= LABELLED_RANKS:
        font = min(12.0, 0.45 * math.sqrt(size))
        nx.draw_networkx_labels(graph, places, ax=axes, font_size=font, font_color="white", font_weight="bold")
    few = graph.number_of_edges() <= 4 * topology.size
    curve = "arc3,rad=0.12"
    for between, colour in ((False, INSIDE), (True, BETWEEN)):
        chosen = [(a, b) for a, b in graph.edges if (nodes[a] != nodes[b]) == between]
        if chosen:
            nx.draw_networkx_edges(
                graph,
                places,
                edgelist=chosen,
                ax=axes,
                node_size=size,
                edge_color=colour,
                width=[0.6 + 2.4 * graph.edges[edge]["weight"] for edge in chosen],
                arrowsize=max(5.0, min(16.0, 0.6 * math.sqrt(size))),
                alpha=0.9 if few or between else 0.45,
                connectionstyle=curve,
            )
    if graph.number_of_edges() <= LABELLED_EDGES:
        labels = {(a, b): f"{weight:.2g}" for a, b, weight in graph.edges(data="weight")}
        nx.draw_networkx_edge_labels(graph, places, labels, ax=axes, font_size=8, connectionstyle=curve)


def _places(topology: Topology, nodes: Sequence[str]) -> dict[int, np.ndarray]:
    """Positions of the ranks: (2,) each. A star's hub is in the middle; a hierarchy's ranks gather by node."""
    import networkx as nx

    ranks = range(topology.size)
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(nodes[rank], []).append(rank)
    places: dict[int, np.ndarray] = {}
    if topology.name == "star" and topology.size > 2:
        places = nx.circular_layout(ranks[1:])
        return {0: np.zeros(2), **places}
    if topology.name != HIERARCHICAL or len(groups) == 1:
        places = nx.circular_layout(ranks)
        return places
    # Neighbouring circles do not touch.
    scale = min(0.7 * math.sin(math.pi / len(groups)), 0.45)
    for number, members in enumerate(groups.values()):
        outwards = 2 * math.pi * number / len(groups)
        # The first ranks carry the edges between nodes: they face the middle.
        inside = nx.rescale_layout_dict(nx.circular_layout(members), scale) if len(members) > 1 else {}
        cos, sin = math.cos(outwards), math.sin(outwards)
        for rank in members:
            x, y = inside.get(rank, (0.0, 0.0))
            places[rank] = np.array([cos * (1 - x) + sin * y, sin * (1 - x) - cos * y])
    return places
