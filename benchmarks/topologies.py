"""What each topology costs, and how well it mixes: in step computed up to 1,024 ranks, out of step simulated.

    python benchmarks/topologies.py --out benchmarks/results/topologies.json

In step, every message arrives at once: the spectral gap and the effective neighbours of `gala-mpi topology`. Costs are
those of an update, in a mean over the period. Bytes are those of Pong's network in float32.

Out of step, ranks take noise and mix at times of their own, as they do in a run: an update lasts 1 in the mean, with a
spread of 20 % from update to update and 10 % from rank to rank. A mailbox holds the newest message. A rank mixes what
has come, by `mixing_weights`. What other ways to mix would give is told by benchmarks/waiting.py.

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
import statistics
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
SEEDS = 5
# The rank that is slow or silent, where one is.
APART = 3


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


def out_of_step(
    topology: Topology, rng: np.random.Generator, way: str = "come", case: str = "even"
) -> dict[str, float]:
    """Ranks that go on at times of their own. `way` and `case` are those of benchmarks/waiting.py."""
    size = topology.size
    apart = min(APART, size - 1)
    speeds = rng.lognormal(0, RANK_SPREAD, size)
    if case != "even":
        speeds[:] = 1.0
    if case == "half speed":
        speeds[apart] = 2.0
    # Noise that decays, a count of steps, and the data of each rank, which do not decay.
    kept = np.append(np.full(COLUMNS, np.sqrt(GAMMA)), np.ones(1 + size))
    values = np.zeros((size, len(kept)))
    updates = np.zeros(size, int)
    rounds = [topology.rounds(rank) for rank in range(size)]
    silent = apart if case == "silent" else None
    expected = [len(topology.in_neighbours(rank)) for rank in range(size)]
    boxes: list[dict[int, tuple[int, float, np.ndarray]]] = [{} for _ in range(size)]
    due = [(float(speeds[rank] * rng.random()), rank) for rank in range(size)]
    heapq.heapify(due)
    others = [rank for rank in range(size) if rank != silent]
    seen, mixes, variance, begun = 0, 0, 0.0, None
    while due[0][0] < BEFORE + COUNTED:
        now, rank = heapq.heappop(due)
        updates[rank] += 1
        step = np.zeros(len(kept))
        step[:COLUMNS] = rng.standard_normal(COLUMNS)
        step[COLUMNS] = step[COLUMNS + 1 + rank] = 1.0
        values[rank] = kept * values[rank] + step
        box = boxes[rank]
        ready = way != "all" or topology.rotating or len(box) == expected[rank]
        taken = list(box.items()) if ready else []
        if rank != silent:
            for target in topology.targets(rank, int(updates[rank])):
                boxes[target][rank] = (int(updates[rank]), now, values[rank].copy())
        if taken:
            weights = mixing_weights(rounds[rank], [(source, update) for source, (update, _, _) in taken])
            if way == "aged":
                ages = [max((now - sent) / speeds[rank], 1.0) for _, (_, sent, _) in taken]
                weights = [weight / age for weight, age in zip(weights, ages, strict=True)]
            values[rank] *= 1 - sum(weights)
            for weight, (_, (_, _, message)) in zip(weights, taken, strict=True):
                values[rank] += weight * message
            box.clear()
        if now > BEFORE and rank in others:
            if begun is None:
                begun = values[others].mean(axis=0), updates.copy()
            noise = values[rank, :COLUMNS]
            seen, variance, mixes = seen + 1, variance + float(noise @ noise) / COLUMNS, mixes + bool(taken)
        heapq.heappush(due, (now + float(speeds[rank] * rng.lognormal(0, UPDATE_SPREAD)), rank))
    assert begun is not None
    gained, counts = values[others].mean(axis=0) - begun[0], updates - begun[1]
    progress = float(gained[COLUMNS]) / (seen / len(others))
    units = gained[COLUMNS + 1 :] / counts * len(others)
    return {
        "neighbours": progress / (1 - GAMMA) / (variance / seen),
        "progress": progress,
        "mixes_of_an_update": mixes / seen,
        "least_unit": float(units[others].min()),
        "greatest_unit": float(units[others].max()),
        "unit_of_the_rank_apart": float(units[apart]),
    }


def several(topology: Topology, way: str = "come", case: str = "even") -> dict[str, float]:
    """The means of SEEDS runs, and the standard error of the effective neighbours, as a share of them."""
    rngs = [np.random.default_rng([seed, topology.size]) for seed in range(1, SEEDS + 1)]
    runs = [out_of_step(topology, rng, way, case) for rng in rngs]
    means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
    spread = statistics.stdev(run["neighbours"] for run in runs)
    return {**means, "neighbours_error": spread / SEEDS**0.5 / means["neighbours"]}


def simulated(name: str, size: int) -> dict[str, Any]:
    """The effective neighbours in step and out of it."""
    topology, _ = placed(name, size)
    found = several(topology)
    return {
        "topology": name,
        "stands_for": topology.name,
        "ranks": size,
        "in_step": effective_neighbours(topology),
        "out_of_step": found["neighbours"],
        "error": found["neighbours_error"],
        "progress": found["progress"],
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
