"""From 8 ranks to 4,096: thin ranks measured, a simulation that is checked against them, and what it says of a cluster.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

Checked: thin ranks (see thin.py) on this machine, taken for several nodes, with the real exchange, board, couriers and
checkpoints; each size free, with the last rank at half speed, and with every rank pausing now and then. All ranks share
the few cores. The simulation (see simulation.py) gets what one rank costs from the free runs of the two smallest sizes:
of the cores' time, an update and a start, with their growth from the one size to the other, and a courier's look, with
and without a peer; and the time of a checkpoint. It is then to foretell all other runs; the error is printed. Runs that
the output file has are not made again.

Simulated: ranks of a cluster, on a core each, 64 on a node, with a link of `--gbit-per-s` and `--latency-us` each.
Times of updates are drawn from those of two ranks that play Pong here (one on each core), and so is what a checkpoint
costs them, and an exchange over the network, with courier and board. To that comes what grows with the ranks: the
board's rows, the couriers' peers, checkpoints at once under all-reduce, and the start. Once with all times, and once
without the longest hundredth: of a thousand ranks one always draws the longest, and an all-reduce waits for it. What a
start takes of a shared file system is not in it, and couriers' time is spread evenly, though heirs have most peers.

Needs MPICH: mpirun of the environment that runs it, beside its Python or on the PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import held_up
import numpy as np
from simulation import FREE, Checkpoints, Cluster, Network, Outcome, Straggling, allreduce, gossip
from thin import Seen, Setting, courier_rest_s, running

from gala_mpi.gossip.news import ROW_BYTES, Heirs, round_s
from gala_mpi.gossip.topology import HIERARCHICAL, Topology, make_topology
from gala_mpi.storage.turns import TOGETHER_BYTES_PER_S

# Couriers look at a message when it waits, when it has arrived, and when it is answered.
LOOKS = 3
# SLEEP_S and IDLE_S of gala_mpi.gossip.courier, which is not imported, as that starts MPI.
COURIER_REST_S, IDLE_REST_S = 0.002, 0.05
CHECKPOINT_EVERY_S, PER_NODE = 300.0, 64
COUNTED = ("update", "mixed", "sent", "mixing_updates", "stale_sum", "learner_s", "process_s", "time_s", "board_bytes")
# Of `Board.report`, for each rank: see roster.py.
ROW_S = 0.03e-6
UPDATES = 400


@dataclass(frozen=True)
class Costs:
    """What one thin rank takes of a core, by the number of ranks: at `ranks` of them, and more for each one more."""

    ranks: int
    update_s: float
    update_growth_s: float
    look_s: float
    """Of a courier, without its peers."""
    peer_s: float
    checkpoint_s: float
    start_s: float
    start_growth_s: float
    launch_s: float
    """What a start takes beside all ranks' own time."""


def kinds(update_s: float, args: argparse.Namespace) -> dict[str, Straggling]:
    """What holds ranks up, by name, where an update takes so long in the mean."""
    pauses = Straggling(pause_s=args.pause_updates * update_s, pause_share=args.pause_share)
    return {"free": FREE, "one slow": Straggling(factor=args.slow), "pauses": pauses}


def sleep_s(ranks: int, args: argparse.Namespace) -> float:
    """Mean sleep of a thin rank."""
    return max(ranks * args.update_ms_a_rank / 1000, 0.1)


def check(ranks: int, nodes: int, kind: Straggling, args: argparse.Namespace) -> dict[str, Any]:
    """One job of thin ranks, measured."""
    setting = Setting(
        ranks, nodes, HIERARCHICAL, update_s=sleep_s(ranks, args), timeout_s=args.timeout_s,
        checkpoint_every_s=args.checkpoint_every * sleep_s(ranks, args), straggling=kind,
    )  # fmt: skip
    with running(setting) as job:
        started = job.gather("pid", args.deadline_s).values()
        start_s = max(facts["time_s"] for facts in started) - job.begun_s
        seen = job.looks(
            args.before, args.counted, at_least=3, rest_s=4 * setting.update_s, deadline_s=args.deadline_s,
            longest_s=args.run_s,
        )  # fmt: skip
    start_cpu_s = statistics.mean(facts["process_s"] for facts in started)
    about = {"ranks": ranks, "nodes": nodes, "update_s": setting.update_s}
    found = told(seen)
    return {
        **about, "start_s": start_s, "start_cpu_s": start_cpu_s, **found,
        "board_bytes_per_s": found["board_bytes_per_s"] / nodes,
    }  # fmt: skip


def told(seen: list[Seen]) -> dict[str, Any]:
    """What the ranks did between the first look and the last."""
    first, last = seen[0].facts, seen[-1].facts
    ranks = sorted(last)
    gained = {name: np.array([last[rank][name] - first[rank][name] for rank in ranks], float) for name in COUNTED}
    checkpoints, checkpoint_s = (
        sum(last[rank][name] - first[rank][name] for rank in ranks) for name in ("checkpoints", "checkpoint_s")
    )
    updates = gained["update"].sum()
    speeds = gained["update"] / gained["time_s"]
    courier_s = (gained["process_s"] - gained["learner_s"]) / gained["time_s"]
    every = [facts for one in seen for facts in one.facts.values()]
    peers = np.array([last[rank]["peers"] for rank in ranks])
    # Least squares over the ranks that have any: of a courier, and of one peer.
    some = peers > 0
    by_peers = [float(courier_s[some].mean()) if some.any() else 0.0, 0.0]
    if len(set(peers[some])) > 1:
        by_peers = np.polyfit(peers[some], courier_s[some], 1).tolist()[::-1]
    return {
        "updates_per_s": float(speeds.sum()),
        "others_per_s": float(speeds[:-1].sum()),
        "mixed_share": float(gained["mixing_updates"].sum() / updates),
        "messages_mixed": float(gained["mixed"].sum() / updates),
        "messages_sent": float(gained["sent"].sum() / updates),
        "staleness_mean": float(gained["stale_sum"].sum() / updates),
        "news_mean_s": statistics.mean(facts["news_mean_s"] for facts in every),
        "news_oldest_s": max(facts["news_oldest_s"] for facts in every),
        "checkpoint_share": float(checkpoint_s / gained["time_s"].sum()),
        "checkpoint_s": float(checkpoint_s / checkpoints) if checkpoints else 0.0,
        "update_cpu_s": float(gained["learner_s"].sum() / updates),
        "courier_share": float(courier_s.mean()),
        "courier_by_peers": by_peers,
        "with_peers": float(some.mean()),
        "pss_mib": statistics.mean(facts["pss_bytes"] for facts in last.values()) / 2**20,
        "most_pss_mib": max(facts["pss_bytes"] for facts in last.values()) / 2**20,
        "board_bytes_per_s": float(gained["board_bytes"].sum() / gained["time_s"].mean()),
        "peers": float(peers.mean()),
    }


def costs(small: dict[str, Any], large: dict[str, Any], sizes: tuple[int, int], cores: int) -> Costs:
    """Of free runs of two sizes."""
    more = sizes[1] - sizes[0]
    base, peer = (share * courier_rest_s(sizes[1]) for share in large["courier_by_peers"])
    return Costs(
        ranks=sizes[0],
        update_s=small["update_cpu_s"],
        update_growth_s=(large["update_cpu_s"] - small["update_cpu_s"]) / more,
        look_s=base,
        peer_s=peer,
        checkpoint_s=small["checkpoint_s"],
        start_s=small["start_cpu_s"],
        start_growth_s=max(large["start_cpu_s"] - small["start_cpu_s"], 0.0) / more,
        launch_s=max(small["start_s"] - sizes[0] * small["start_cpu_s"] / cores, 0.0),
    )


def courier_share(cost: Costs, one: dict[str, Any], ranks: int, cores: int, work_s: float) -> float:
    """What a courier takes of a core, where all share cores: the longer it waits for one, the less it looks.

    The share s of all cores that couriers take solves s = sum of look / (rest + look / (1 - s - what learners take)).
    """
    rest_s = courier_rest_s(ranks)
    busy_s = cost.look_s + one["peers"] / max(one["with_peers"], 1e-9) * cost.peer_s
    kinds_of = ((one["with_peers"], busy_s, rest_s), (1 - one["with_peers"], cost.look_s, IDLE_REST_S))
    learners = ranks * work_s / (one["update_s"] + work_s) / cores

    def taken(left: float) -> float:
        return sum(share * look_s / (rest + look_s / left) for share, look_s, rest in kinds_of)

    low, high = 0.0, max(1 - learners, 1e-3)
    for _ in range(50):
        middle = (low + high) / 2
        enough = taken(max(1 - middle - learners, 1e-6)) * ranks / cores > middle
        low, high = (middle, high) if enough else (low, middle)
    return low * cores / ranks


def foretell(
    ranks: int, one: dict[str, Any], kind: Straggling, cost: Costs, args: argparse.Namespace
) -> dict[str, Any]:
    """What the simulation says of a job of thin ranks; of what was measured it gets the setting and the peers."""
    rng, cores, rest_s = np.random.default_rng(ranks), len(os.sched_getaffinity(0)), courier_rest_s(ranks)
    more = ranks - cost.ranks
    work_s = cost.update_s + more * cost.update_growth_s
    cluster = Cluster(
        make_topology(HIERARCHICAL, ranks, [f"n{rank * one['nodes'] // ranks}" for rank in range(ranks)]),
        ranks // one["nodes"],
        message_s=LOOKS * rest_s,
        news_s=LOOKS * rest_s,
        courier_share=courier_share(cost, one, ranks, cores, work_s),
        cores=cores,
        # All that it takes is taken by one rank at a time, as they share a disk and cores.
        checkpoints=Checkpoints(args.checkpoint_every * one["update_s"], cost.checkpoint_s, cost.checkpoint_s),
        timeout_s=args.timeout_s,
    )
    updates = args.before + args.counted
    drawn = rng.uniform(0.5, 1.5, (updates, ranks)) * one["update_s"]
    rests = np.array([[kind.one(s, rank == ranks - 1, rng) for rank, s in enumerate(row)] for row in drawn])
    outcome = gossip(cluster, rests, np.full_like(rests, work_s), warm_up_s=args.before * one["update_s"])
    return {
        **told_of(outcome),
        "start_s": cost.launch_s + ranks * (cost.start_s + more * cost.start_growth_s) / cores,
        "courier_share": cluster.courier_share,
        "update_cpu_s": work_s,
    }


def told_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome by the names of `told`."""
    values = {name: value for name, value in asdict(outcome).items() if name != "updates_per_s"}
    speeds = outcome.updates_per_s
    return {**values, "updates_per_s": float(speeds.sum()), "others_per_s": float(speeds[:-1].sum())}


COMPARED = {
    "start_s": "start, s",
    "updates_per_s": "updates/s",
    "others_per_s": "of the others",
    "mixed_share": "mixing updates",
    "messages_mixed": "mixed",
    "staleness_mean": "staleness",
    "news_mean_s": "news, s",
    "courier_share": "couriers",
    "checkpoint_share": "checkpoints",
}


def checked(args: argparse.Namespace) -> tuple[dict[str, Any], Costs]:
    """All sizes, measured and foretold; prints a line for each of both."""
    cores = len(os.sched_getaffinity(0))
    print(f"thin ranks on {cores} cores, measured and foretold\n ranks  kind        " + "  ".join(COMPARED.values()))
    found = made_before(args)
    nodes = dict(zip(args.ranks, args.nodes, strict=True))
    for ranks in args.ranks:
        for name, kind in kinds(sleep_s(ranks, args), args).items():
            if f"{ranks}, {name}" not in found:
                found[f"{ranks}, {name}"] = {"measured": check(ranks, nodes[ranks], kind, args)}
                write(args, {"checked": found})
            print(f"{ranks:6,}  {name:<10}  {line(found[f'{ranks}, {name}']['measured'])}", flush=True)
    sizes = (args.ranks[0], args.ranks[1])
    cost = costs(*(found[f"{size}, free"]["measured"] for size in sizes), sizes, cores)
    print("\nforetold, and how far off")
    for ranks in args.ranks:
        for name, kind in kinds(sleep_s(ranks, args), args).items():
            one = found[f"{ranks}, {name}"]
            one["foretold"] = foretell(ranks, one["measured"], kind, cost, args)
            fitted = name == "free" and ranks in sizes
            print(f"{ranks:6,}  {name:<10}  {line(one['foretold'], one['measured'])}{' (fitted)' * fitted}", flush=True)
    # For the cluster: what a start grows by shows from some dozen ranks on only.
    second, last = (found[f"{size}, free"]["measured"] for size in (sizes[1], args.ranks[-1]))
    more = max(last["ranks"] - second["ranks"], 1)
    return found, replace(cost, start_growth_s=max(last["start_cpu_s"] - second["start_cpu_s"], 0.0) / more)


# What runs of one file have in common.
COMMON = (
    "update_ms_a_rank", "before", "counted", "checkpoint_every", "timeout_s", "slow", "pause_updates", "pause_share"
)  # fmt: skip


def made_before(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs of thin ranks that the output file has."""
    if args.out is None or not args.out.exists():
        return {}
    before = json.loads(args.out.read_text())
    if "checked" not in before or any(before["settings"][name] != vars(args)[name] for name in COMMON):
        sys.exit(f"{args.out}: was made by other settings")
    nodes = dict(zip(args.ranks, args.nodes, strict=True))
    runs = before["checked"].items()
    return {name: run for name, run in runs if nodes.get(run["measured"]["ranks"]) == run["measured"]["nodes"]}


def write(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """The results, in place of what the output file had."""
    if args.out is not None:
        about = {"machine": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
        settings = {**vars(args), "out": None, **about}
        scratch = args.out.with_suffix(".tmp")
        scratch.write_text(json.dumps({"settings": settings, **results}, indent=1) + "\n")
        scratch.rename(args.out)


def line(values: dict[str, Any], beside: dict[str, Any] | None = None) -> str:
    """Figures in the order of COMPARED, with their difference from others."""
    parts = []
    for name in COMPARED:
        value = values[name]
        part = f"{value:.3g}"
        if beside is not None and beside[name]:
            part += f" ({value / beside[name] - 1:+.0%})"
        parts.append(f"{part:>12}")
    return "  ".join(parts)


def simulate(
    free: dict[str, held_up.Run], cost: Costs, args: argparse.Namespace
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What it begins with, and ranks of a cluster; prints a line for each."""
    network = Network(args.latency_us * 1e-6, args.gbit_per_s * 1e9 / 8)
    measured = np.concatenate(free["none"].compute_s)
    middle, nearly_all = np.quantile(measured, [0.5, 0.99])
    # What messages to another node cost a rank, with its courier's part in it and the board's.
    exchange_s = max(free["background"].update_s - free["none"].update_s, 0.0)
    alone_s = statistics.mean(free["none"].checkpoint_s)
    print(
        f"\n{len(measured):,} updates: {middle * 1e3:.1f} ms (median), {nearly_all * 1e3:.1f} (99 of 100), "
        f"{measured.max() * 1e3:.1f} (longest); an exchange in the background costs {exchange_s * 1e3:.2f} ms\n"
        " ranks  exchange   straggling    steps/s  of ideal  checkpoints  start, s   mixed  staleness, most  news, s  "
        "oldest  board, Mbit/s  couriers"
    )
    begun = {"updates": len(measured), "median_s": middle, "p99_s": nearly_all, "longest_s": measured.max()}
    begun |= {"exchange_s": exchange_s, "start_s": args.start_s, "checkpoint_s": alone_s}
    cases = [(name, kind, measured) for name, kind in kinds(float(measured.mean()), args).items()]
    cases.append(("no tail", FREE, measured[measured <= nearly_all]))
    # Of a checkpoint the file system's part is not done for two ranks at once.
    file_bytes = 2 * args.message_bytes
    points = Checkpoints(CHECKPOINT_EVERY_S, alone_s, file_bytes / TOGETHER_BYTES_PER_S)
    clusters = {ranks: cluster_of(ranks, exchange_s, points, network, cost, args) for ranks in args.simulate}
    found = []
    for name, kind, computing in cases:
        for ranks in args.simulate:
            cluster, about = clusters[ranks]
            times = kind.draw(computing, ranks, UPDATES, np.random.default_rng(ranks))
            together = {
                "gossip": gossip(cluster, np.zeros_like(times), times, warm_up_s=float(times.sum(axis=0).mean()) / 4),
                "allreduce": allreduce(times, network.allreduce_s(ranks, args.message_bytes), points),
            }
            steps = args.simulators * args.rollout_steps
            for exchange, outcome in together.items():
                total = float(outcome.updates_per_s.sum())
                entry = {"ranks": ranks, "exchange": exchange, "straggling": name}
                entry |= {"topology": cluster.topology.name}
                entry |= {"efficiency": total / ranks * computing.mean(), "steps_per_s": total * steps}
                entry |= {"checkpoint_share": outcome.checkpoint_share}
                entry |= {"start_s": args.start_s + ranks * cost.start_growth_s}
                said = ""
                if exchange == "gossip":
                    entry |= told_of(outcome) | {"courier_share": cluster.courier_share} | about
                    said = (
                        f"{outcome.mixed_share:>8.1%}  {outcome.staleness_mean:>9.2f}  {outcome.staleness_most:>4d}  "
                        f"{outcome.news_mean_s:7.2f}  {outcome.news_oldest_s:6.2f}  "
                        f"{8e-6 * about['board_bytes_per_s']:13.2f}  "
                        f"{cluster.courier_share:8.2%}"
                    )
                found.append(entry)
                print(
                    f"{ranks:6,}  {exchange:<9}  {name:<10}  {entry['steps_per_s']:>9,.0f}  "
                    f"{entry['efficiency']:>8.1%}  {outcome.checkpoint_share:11.3%}  {entry['start_s']:8.1f}  {said}",
                    flush=True,
                )
    return {name: float(value) for name, value in begun.items()}, found


def cluster_of(
    ranks: int, exchange_s: float, points: Checkpoints, network: Network, cost: Costs, args: argparse.Namespace
) -> tuple[Cluster, dict[str, float]]:
    """So many ranks, PER_NODE on a node; and the peers of their couriers, and what a node sends for the board."""
    nodes = [f"n{rank // PER_NODE}" for rank in range(ranks)]
    topology, heirs = make_topology("auto", ranks, nodes), Heirs([r - r % PER_NODE for r in range(ranks)])
    # The first node's ranks; rank 0 leads it, and has the most.
    peers = [distant_peers(rank, topology, heirs) for rank in range(min(PER_NODE, ranks))]
    cluster = Cluster(
        topology, PER_NODE, exchange_s=exchange_s + ranks * ROW_S,
        message_s=network.message_s(args.message_bytes) + LOOKS * COURIER_REST_S,
        news_s=network.message_s(ranks * ROW_BYTES) + LOOKS * COURIER_REST_S,
        # The two ranks that were measured had one peer each.
        courier_share=max(statistics.mean(peers) - 1, 0) * cost.peer_s / COURIER_REST_S, checkpoints=points,
    )  # fmt: skip
    degree = len(heirs.neighbours_of(0))
    board_bytes = (ranks * ROW_BYTES) / round_s(ranks, degree, cluster.timeout_s) if degree else 0.0
    return cluster, {"peers": statistics.mean(peers), "most_peers": max(peers), "board_bytes_per_s": board_bytes}


def distant_peers(rank: int, topology: Topology, heirs: Heirs) -> int:
    """How many ranks of other nodes a rank's courier carries for: the topology's, and the board's."""
    peers = {*topology.out_neighbours(rank), *topology.in_neighbours(rank), *heirs.in_neighbours(rank)}
    return sum(peer // PER_NODE != rank // PER_NODE for peer in peers)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128, 256], help="sizes of thin ranks")
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 2, 8, 16], help="nodes of each size")
    parser.add_argument("--update-ms-a-rank", type=float, default=4.0, help="mean sleep of an update, for each rank")
    parser.add_argument("--before", type=int, default=10, help="updates of thin ranks before the first look")
    parser.add_argument("--counted", type=int, default=40, help="updates of thin ranks over which they look")
    parser.add_argument("--checkpoint-every", type=float, default=10.0, help="updates of thin ranks")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="silence after which a thin rank is lost")
    parser.add_argument("--run-s", type=float, default=1800.0, help="longest time of a job's looks")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="of whatever is waited for")
    parser.add_argument("--slow", type=float, default=2.0, help="how much longer the slow rank takes")
    parser.add_argument("--pause-updates", type=float, default=3.0, help="mean of a pause, in updates")
    parser.add_argument("--pause-share", type=float, default=0.02, help="share of the updates with a pause")
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--seconds", type=float, default=30, help="length of a run of two ranks of Pong")
    parser.add_argument("--simulate", type=int, nargs="+", default=[128, 256, 1024, 4096], help="sizes to simulate")
    parser.add_argument("--gbit-per-s", type=float, default=25, help="of each rank's link, in each direction")
    parser.add_argument("--latency-us", type=float, default=5, help="of a message of one byte")
    parser.add_argument("--message-bytes", type=int, default=866_000 * 4, help="size of the parameters")
    parser.add_argument(
        "--start-s", type=float, default=3.7, help="of one rank of Pong to its first update: startup.py"
    )
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    if len(args.ranks) < 2 or sorted(set(args.ranks)) != args.ranks or len(args.nodes) != len(args.ranks):
        parser.error("--ranks: expected two sizes or more, ascending, and --nodes for each")
    if any(ranks % nodes for ranks, nodes in zip(args.ranks, args.nodes, strict=True)):
        parser.error("--nodes: expected numbers that divide those of --ranks")
    args.simulators, args.rollout_steps = 16, 5
    found, cost = checked(args)
    # One rank on each of two cores, the last runs of all.
    free = {
        "none": held_up.run(2, "none", FREE, args),
        "background": held_up.run(2, "gossip", FREE, args, "--delivery", "background"),
    }
    begun, simulated = simulate(free, cost, args)
    write(args, {"checked": found, "costs": asdict(cost), "simulated_from": begun, "simulated": simulated})


if __name__ == "__main__":
    main()
