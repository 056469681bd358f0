"""How well each topology mixes in real ranks: measured by thin ranks (see thin.py), beside what was computed.

    python benchmarks/mixing.py --ranks 8 32 --out benchmarks/results/mixing.json

For each topology a job of thin ranks runs until its noise is at its height. Then all ranks tell their parameters some
times. Where every rank takes noise of the same size at each update:

    distance    consensus distance, of a parameter, in units of a step's noise
    neighbours  effective neighbours: by how much less noise a rank has than one alone, times its progress
    progress    what is left of a step that all ranks take at each update
    messages    sent by a rank at an update, in the mean; bytes are those of Pong's network in float32

`hierarchical` runs on nodes of 16 ranks, as which MPICH takes this machine, so it needs MPICH and whole nodes; all
others run on one node.

The same figures, in step computed and out of step simulated, are those of topologies.py. There are more ranks than
cores, so that ranks come and go as the system lets them: out of step, but sleeping for most of an update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from host import machine
from thin import Seen, Setting, running
from topologies import MESSAGE_BYTES, placed

from gala_mpi.config import ConfigError
from gala_mpi.gossip.mixing import GAMMA, effective_neighbours
from gala_mpi.gossip.topology import HIERARCHICAL, TOPOLOGIES


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One job of `args.ranks` ranks over `args.topology`."""
    setting = Setting(
        args.ranks, nodes(args.topology, args.ranks), args.topology, args.parameters, timeout_s=args.timeout_s,
        seed=args.seed, update_s=args.ranks * args.update_ms_a_rank / 1000,
    )  # fmt: skip
    with running(setting) as job:
        job.gather("pid", args.deadline_s)
        seen = job.looks(
            args.before, args.counted, at_least=args.looks, rest_s=args.rest_s, deadline_s=args.deadline_s,
            longest_s=args.run_s,
        )  # fmt: skip
    return {**row(args.topology, args.ranks, seen), **settings(args)}


def nodes(topology: str, ranks: int) -> int:
    """As which the machine is taken: several for the topology that knows of nodes."""
    return len(set(placed(topology, ranks)[1])) if topology == HIERARCHICAL else 1


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What rows of one size must have in common."""
    names = ("parameters", "update_ms_a_rank", "before", "counted", "looks", "seed")
    return {"machine": machine(), **{name: getattr(args, name) for name in names}}


def row(name: str, ranks: int, seen: list[Seen]) -> dict[str, Any]:
    """What those looks tell."""
    first, last = seen[0], seen[-1]
    progress = (last.steps - first.steps) / (last.updates - first.updates)
    variance = statistics.mean(one.variance for one in seen)
    gained = {
        what: sum(last.facts[rank][what] - first.facts[rank][what] for rank in last.facts) / ranks
        for what in ("sent", "mixed", "update")
    }
    messages = gained["sent"] / gained["update"]
    return {
        "topology": name,
        "ranks": ranks,
        "distance": statistics.mean(one.distance for one in seen),
        "neighbours": progress / (1 - GAMMA) / variance,
        "nodes": nodes(name, ranks),
        "in_step": effective_neighbours(placed(name, ranks)[0]),
        "progress": progress,
        "messages": messages,
        "bytes": messages * MESSAGE_BYTES,
        "mixed": gained["mixed"] / gained["update"],
        "updates": last.updates - first.updates,
        "seen": len(seen),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32], dest="sizes")
    parser.add_argument("--topologies", nargs="+", default=[name for name in TOPOLOGIES if name != "auto"])
    parser.add_argument("--parameters", type=int, default=4000, help="of each kind")
    parser.add_argument("--update-ms-a-rank", type=float, default=5.0, help="mean sleep of an update, for each rank")
    parser.add_argument("--before", type=int, default=400, help="updates before the first look")
    parser.add_argument("--counted", type=int, default=200, help="updates over which ranks look")
    parser.add_argument("--looks", type=int, default=8, help="at least")
    parser.add_argument("--run-s", type=float, default=1800.0, help="longest time of a job's looks")
    parser.add_argument("--rest-s", type=float, default=2.0, help="between two looks")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="silence after which a rank is lost")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="of whatever is waited for")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rows that are in it are not measured again")
    args = parser.parse_args()
    found: dict[str, Any] = {"gamma": GAMMA, "rows": []}
    if args.out.exists():
        found = json.loads(args.out.read_text())
        here = [one for one in found["rows"] if one["ranks"] in args.sizes]
        if any(one[name] != value for one in here for name, value in settings(args).items()):
            sys.exit(f"{args.out}: has rows of this size of another machine or other settings")
    print("| ranks | topology | consensus distance | effective neighbours | in step | progress | messages | mixed |")
    for size in args.sizes:
        for name in args.topologies:
            if size % nodes(name, size):
                print(f"{name}: not over {size} ranks, which are no whole nodes", file=sys.stderr)
                continue
            try:
                placed(name, size)
            except ConfigError as error:
                print(error, file=sys.stderr)
                continue
            if any((one["topology"], one["ranks"]) == (name, size) for one in found["rows"]):
                continue
            args.ranks, args.topology = size, name
            one = measure(args)
            found["rows"].append(one)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(
                f"| {size} | `{name}` | {one['distance']:.2f} | {one['neighbours']:.3g} | {one['in_step']:.3g} | "
                f"{one['progress']:.2f} | {one['messages']:.3g} | {one['mixed']:.3g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
