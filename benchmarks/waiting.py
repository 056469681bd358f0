"""When to mix: once all in-neighbours have left a message, with whatever has come, or with less weight for old ones.

    python benchmarks/waiting.py --out benchmarks/results/waiting.json

Ranks go on at times of their own: the simulation is that of benchmarks/topologies.py. Its cases are `even` ranks, one
of `half speed` where all others are alike, and one that is `silent` but trains on. Three ways to mix:

    all   when each in-neighbour has left a message since the last mix; over a graph with a period, as come
    come  whatever has come; the weight of who has sent nothing stays with the rank's own parameters
    aged  as come, with a weight that is divided by the message's age in updates of the receiver, from one update on

Each way is told by three figures, means of several runs. `neighbours` and `progress` are those of
benchmarks/topologies.py. `unit` is the weight of a unit of a rank's data in the mean of all, where 1 is an equal share:
the least and the greatest of all ranks, and that of the rank apart. Where a rank is silent, it has no part in these
figures, but for its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from topologies import placed, several

from gala_mpi.gossip.mixing import GAMMA

WAYS = ("all", "come", "aged")
CASES = ("even", "half speed", "silent")
NAMES = ("ring", "one-peer-exponential", "bidirectional-ring", "torus", "exponential", "complete")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for size in args.ranks:
        for name in NAMES:
            topology, _ = placed(name, size)
            for case in CASES:
                for way in WAYS:
                    found = several(topology, way, case)
                    row: dict[str, Any] = {"topology": name, "ranks": size, "way": way, "case": case, **found}
                    rows.append(row)
                    print(
                        f"| {size} | `{name}` | {case} | {way} | {row['mixes_of_an_update']:.2f} | "
                        f"{row['neighbours']:.3g} | {row['progress']:.2f} | {row['least_unit']:.2f} to "
                        f"{row['greatest_unit']:.2f} | {row['unit_of_the_rank_apart']:.2f} |",
                        flush=True,
                    )
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    args.out.write_text(json.dumps({"machine": machine, "gamma": GAMMA, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
