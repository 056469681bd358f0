"""What each topology costs, and how well it mixes: in step computed up to 1,024 ranks, out of step simulated.

    python benchmarks/topologies.py --out benchmarks/results/topologies.json

In step, every message arrives at once: the spectral gap and the effective neighbours of `gala-mpi topology`. Costs are
those of an update, in a mean over the period. Bytes are those of Pong's network in float32.

Out of step, ranks take noise and mix at times of their own, as they do in a run: an update lasts 1 in the mean, with a
spread of 20 % from update to update and 10 % from rank to rank. A mailbox holds the newest message. A graph that stays
the same mixes when each in-neighbour has left one; one with a period mixes whatever has come, by `mixing_weights`.

A message that has waited lacks what its sender, and its receiver, have learned since. So ranks get on more slowly
than one alone would: `progress` is what is left of a step that all ranks take at each update. Noise and its decay are
slower by as much; the effective neighbours follow from the variance, with that taken into account.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from gala_mpi.config import ConfigError
from gala_mpi.gossip.mixing import GAMMA, effective_neighbours
from gala_mpi.gossip.topology import TOPOLOGIES, Topology, make_topology, mixing_weights
from gala_mpi.graphs.measures import messages, spectral_gap

SIZES = (8, 32, 256, 1024)
RANKS_PER_NODE = 16
MESSAGE_BYTES = 4 * 866_439
SLOTS = 3
SIMULATED = (8, 12, 16, 32, 64)
COLUMNS = 64
# Updates that are left out, until variance and drift have come to their heights, and those that are counted.
BEFORE, COUNTED = 1000, 500
UPDATE_SPREAD, RANK_SPREAD = 0.2, 0.1


def placed(name: str, size: int) -> tuple[Topology, list[str]]:
    """The topology over nodes of RANKS_PER_NODE ranks in order, and the nodes."""
    nodes = [f"n{rank // RANKS_PER_NODE}" for rank in range(size)]
    return make_topology(name, size, nodes), nodes


def in_step(name: str, size: int) -> dict[str, Any]:
    """Measures and costs of a topology."""
    topology, nodes = placed(name, size)
    places = np.unique(nodes, return_inverse=True)[1]
    sent, crossed = messages(topology, places)
    most = max(len(topology.in_neighbours(rank)) for rank in range(size))
    return {
        "topology": name,
        "stands_for": topology.name,
        "ranks": size,
        "nodes": len(set(nodes)),
        "spectral_gap": spectral_gap(topology),
        "effective_neighbours": effective_neighbours(topology),
        "messages_of_a_rank": sent / size,
        "bytes_of_a_rank": sent / size * MESSAGE_BYTES,
        "messages_out_of_a_node": crossed / len(set(nodes)),
        "most_mailboxes_of_a_rank": most,
        "mailbox_bytes_of_that_rank": most * SLOTS * MESSAGE_BYTES,
    }


def out_of_step(topology: Topology, rng: np.random.Generator) -> tuple[float, float]:
    """Effective neighbours of ranks that go on at times of their own, and their progress."""
    size = topology.size
    speeds = rng.lognormal(0, RANK_SPREAD, size)
    # The last column has no noise and keeps all: it counts the steps.
    values = np.zeros((size, COLUMNS + 1))
    kept = np.append(np.full(COLUMNS, np.sqrt(GAMMA)), 1.0)
    updates = [0] * size
    rounds = [topology.rounds(rank) for rank in range(size)]
    expected = [len(topology.in_neighbours(rank)) for rank in range(size)]
    boxes: list[dict[int, tuple[int, np.ndarray]]] = [{} for _ in range(size)]
    due = [(float(speeds[rank] * rng.random()), rank) for rank in range(size)]
    heapq.heapify(due)
    variance = 0.0
    seen, begun = 0, 0.0
    while due[0][0] < BEFORE + COUNTED:
        now, rank = heapq.heappop(due)
        updates[rank] += 1
        values[rank] = kept * values[rank] + np.append(rng.standard_normal(COLUMNS), 1.0)
        box = boxes[rank]
        taken = list(box.items()) if topology.rotating or len(box) == expected[rank] else []
        for target in topology.targets(rank, updates[rank]):
            boxes[target][rank] = (updates[rank], values[rank].copy())
        if taken:
            weights = mixing_weights(rounds[rank], [(source, update) for source, (update, _) in taken])
            values[rank] *= 1 - sum(weights)
            for weight, (_, (_, message)) in zip(weights, taken, strict=True):
                values[rank] += weight * message
            box.clear()
        if now > BEFORE:
            begun = begun or float(values[:, -1].mean())
            noise = values[rank, :-1]
            seen, variance = seen + 1, variance + float(noise @ noise) / COLUMNS
        heapq.heappush(due, (now + float(speeds[rank] * rng.lognormal(0, UPDATE_SPREAD)), rank))
    progress = (float(values[:, -1].mean()) - begun) / (seen / size)
    return progress / (1 - GAMMA) / (variance / seen), progress


def simulated(name: str, size: int) -> dict[str, Any]:
    """The effective neighbours in step and out of it."""
    topology, _ = placed(name, size)
    neighbours, progress = out_of_step(topology, np.random.default_rng([1, size]))
    return {
        "topology": name,
        "stands_for": topology.name,
        "ranks": size,
        "in_step": effective_neighbours(topology),
        "out_of_step": neighbours,
        "progress": progress,
    }


def number(value: float) -> str:
    """In three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "gamma": GAMMA,
        "ranks_per_node": RANKS_PER_NODE,
        "message_bytes": MESSAGE_BYTES,
        "in_step": [],
        "out_of_step": [],
    }
    for size in SIZES:
        for name in TOPOLOGIES:
            row = in_step(name, size)
            found["in_step"].append(row)
            costs = f"{number(row['messages_of_a_rank'])} | {number(row['bytes_of_a_rank'] / 1e6)} MB"
            costs += f" | {number(row['messages_out_of_a_node'])} | {row['most_mailboxes_of_a_rank']}"
            mixing = f"{number(row['spectral_gap'])} | {number(row['effective_neighbours'])}"
            print(f"| {size} | `{name}` | {mixing} | {costs} |", flush=True)
    for size in SIMULATED:
        for name in TOPOLOGIES:
            with contextlib.suppress(ConfigError):  # a hypercube of 12 ranks
                row = simulated(name, size)
                found["out_of_step"].append(row)
                figures = (row["in_step"], row["out_of_step"], row["progress"])
                print(f"| {size} | `{name}` | {' | '.join(map(number, figures))} |", flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
