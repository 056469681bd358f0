"""The figures of the documentation:  python docs/figures/make.py

Writes mailbox.svg, topologies.svg, ball.svg and growth.svg beside itself. Needs matplotlib:

    pip install -c constraints.txt -e '.[analysis]'
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

os.environ["MPLBACKEND"] = "Agg"
import matplotlib as mpl
import matplotlib.pyplot as plt

from gala_mpi import make_topology

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "0.6"
AGENTS, ROUNDS = 8, 150


def mailbox() -> plt.Figure:
    """Three slots before and after each swap."""
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.0), layout="constrained")
    # Of each moment: the title, who owns slots 0 to 2, and whether the one in the middle is fresh.
    moments = (
        ("1. the sender writes", ("back", "middle", "front"), False),
        ("2. it swaps back and middle", ("middle", "back", "front"), True),
        ("3. the receiver swaps front and middle", ("front", "back", "middle"), False),
    )
    colours = {"back": ORANGE, "middle": GREY, "front": BLUE}
    for panel, (title, owners, fresh) in zip(axes, moments, strict=True):
        for slot, owner in enumerate(owners):
            panel.add_patch(plt.Rectangle((slot, 0), 0.86, 1, facecolor=colours[owner], alpha=0.85))
            said = f"{owner}\n(fresh)" if fresh and owner == "middle" else owner
            panel.text(slot + 0.43, 0.5, said, ha="center", va="center", color="white", fontsize=9)
            panel.text(slot + 0.43, -0.14, f"slot {slot}", ha="center", va="top", fontsize=8)
        panel.set(xlim=(-0.1, 3), ylim=(-0.5, 1.1), aspect="equal")
        panel.set_title(title, fontsize=9)
        panel.axis("off")
    return figure


def topologies() -> plt.Figure:
    """Four graphs of eight ranks."""
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.4), layout="constrained")
    angles = np.pi / 2 - 2 * np.pi * np.arange(AGENTS) / AGENTS
    places = np.stack([np.cos(angles), np.sin(angles)], 1)
    for panel, name in zip(axes, ("ring", "exponential", "hypercube", "star"), strict=True):
        graph = make_topology(name, AGENTS)
        for source in range(AGENTS):
            for target in graph.out_neighbours(source):
                arrow = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 6, "shrinkB": 6, "linewidth": 0.8}
                panel.annotate("", places[target], places[source], arrowprops=arrow)
        panel.scatter(*places.T, s=90, color=BLUE, zorder=3)
        for rank, place in enumerate(places):
            panel.text(*place, str(rank), ha="center", va="center", color="white", fontsize=7, zorder=4)
        panel.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        panel.set_title(name, fontsize=9)
        panel.axis("off")
    return figure


def ball() -> plt.Figure:
    """Random steps of eight agents, alone and with gossip over a ring."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharex=True, sharey=True)
    graph = make_topology("ring", AGENTS)
    for panel, gossips in zip(axes, (False, True), strict=True):
        steps = np.random.default_rng(3).normal(size=(ROUNDS, AGENTS, 2))
        now, way = np.zeros((AGENTS, 2)), [np.zeros((AGENTS, 2))]
        for step in steps:
            now = now + step
            if gossips:
                sent = now.copy()
                for rank in range(AGENTS):
                    own, weights = graph.weights(rank)
                    now[rank] = own * sent[rank]
                    for source, weight in zip(graph.in_neighbours(rank), weights, strict=True):
                        now[rank] += weight * sent[source]
            way.append(now)
        ways = np.stack(way)
        panel.plot(ways[..., 0], ways[..., 1], linewidth=0.5, alpha=0.5, color=GREEN if gossips else GREY)
        mean = now.mean(0)
        epsilon = np.linalg.norm(now - mean, axis=1).max()
        panel.add_patch(plt.Circle(mean, epsilon, facecolor="none", edgecolor=ORANGE, linewidth=1.2))
        panel.scatter(*now.T, s=18, color=BLUE, zorder=3)
        panel.set_title(f"{'gossip over a ring' if gossips else 'alone'}: radius {epsilon:.0f}", fontsize=9)
        panel.set_aspect("equal")
        panel.tick_params(labelsize=7)
    return figure


def growth() -> plt.Figure:
    """What a rank and a node take as ranks become more, as benchmarks/scaling.py measured it."""
    found = json.loads((HERE.parent.parent / "benchmarks" / "results" / "scaling.json").read_text())["checked"]
    free = [one["measured"] for name, one in found.items() if name.endswith(", free")]
    ranks = np.array([one["ranks"] for one in free])
    figure, (memory, traffic) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    memory.plot(ranks, [one["most_pss_mib"] for one in free], "o-", color=ORANGE, label="the rank that takes most")
    memory.plot(ranks, [one["pss_mib"] for one in free], "s-", color=BLUE, label="mean of all ranks")
    memory.set(xlabel="ranks", ylabel="memory of a rank (Pss), MiB", ylim=(0, 60), xlim=(0, None))
    sent = [one["board_bytes_per_s"] * one["ranks"] / one["updates_per_s"] / 1024 for one in free]
    traffic.plot(ranks, ranks * 64 / 1024, "--", color=GREY, label="a row of 64 bytes for each rank")
    traffic.plot(ranks, sent, "o-", color=BLUE, label="measured")
    traffic.set(
        xlabel="ranks", ylabel="sent for the board by a node\nat each update, KiB", ylim=(0, None), xlim=(0, None)
    )
    for panel in (memory, traffic):
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    return figure


def main() -> None:
    """Draw all of them, the same to the byte each time."""
    mpl.rcParams["svg.hashsalt"] = "gala-mpi"
    for make in (mailbox, topologies, ball, growth):
        figure = make()
        figure.savefig(HERE / f"{make.__name__}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
