"""Ranks that are held up: what the others keep of their speed, under gossip, all-reduce and no exchange.

    python benchmarks/held_up.py --out benchmarks/results/held-up.json

Pong on 1, 2, 4 and 8 ranks of this machine (marked where those are more than its cores); each free, with the last rank
at a fraction of its speed (it computes for nothing, so that it keeps its share of a core), and with every rank pausing
now and then. The runs of one size take turns. A rank's first quarter of a run, and the last second, are left out. With
more ranks than cores, ranks that wait in an all-reduce may take the core from those they wait for, and those that pause
give it to others: such sizes show that gossip holds nobody up, and say little of speed.

Beside each figure stands what the simulation makes of it (see simulation.py): it puts together the times of updates of
the free runs of a size to what its runs with stragglers should have given. The free runs themselves are what the
simulation is fitted to, so that theirs is no test.

Needs mpirun of the environment that runs it, beside its Python or on the PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from host import launcher
from simulation import FREE, Cluster, Outcome, Straggling, allreduce, gossip

from gala_mpi.gossip.topology import make_topology

EXCHANGES = ("none", "gossip", "allreduce")
# The last rank spins; pauses are drawn by every rank.
HELD_UP = """
import random, sys, time
from gala_mpi import cli
from gala_mpi.train import agent
from mpi4py import MPI
factor, pause_s, pause_share = map(float, sys.argv[1:4])
last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
rng = random.Random(MPI.COMM_WORLD.rank)
train = agent.Agent.train
def held_up(self, stop):
    # Time spent computing, without the exchange and its waits.
    def computing_s():
        return time.perf_counter() - self._stopwatch.seconds["exchange"]
    begin = computing_s()
    def hold_up(update):
        nonlocal begin
        if last and factor > 1:
            end = time.perf_counter() + (factor - 1) * (computing_s() - begin)
            while time.perf_counter() < end:
                pass
        if rng.random() < pause_share:
            time.sleep(rng.expovariate(1 / pause_s))
        begin = computing_s()
    return train(self, stop, on_update=hold_up)
agent.Agent.train = held_up
sys.exit(cli.train(sys.argv[4:]))
"""
SIMULATED_UPDATES = 400


@dataclass(frozen=True)
class Run:
    """What one run gave, for each rank: agent steps a second; of its updates the numbers and the seconds; and the
    seconds of the first checkpoint, which it writes in its turn.
    """

    speeds: list[float]
    updates: list[list[int]]
    compute_s: list[list[float]]
    exchange_s: list[list[float]]
    checkpoint_s: list[float]

    @property
    def update_s(self) -> float:
        """Mean time of an update."""
        return float(np.mean(np.concatenate(self.compute_s)) + np.mean(np.concatenate(self.exchange_s)))

    @property
    def shortest_exchange_s(self) -> float:
        """Median over the updates of the shortest exchange of all ranks: the last to come to it waits for nobody."""
        own = [dict(zip(u, e, strict=True)) for u, e in zip(self.updates, self.exchange_s, strict=True)]
        common = set.intersection(*(set(rank) for rank in own))
        return float(np.median([min(rank[update] for rank in own) for update in common]))


def run(ranks: int, exchange: str, held_up: Straggling, args: argparse.Namespace, *more: str) -> Run:
    """One run, measured."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [launcher(), "-n", str(ranks), sys.executable, "-c", HELD_UP]
        command += [str(held_up.factor), str(held_up.pause_s), str(held_up.pause_share)]
        command += ["--env", args.env, "--exchange", exchange, "--device", "cpu", "--total-steps", "1_000_000_000"]
        command += ["--time-limit-s", str(args.seconds), "--record-every", "1", "--out", str(folder), *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=args.seconds + 60 * (5 + ranks))
        return Run(*map(list, zip(*(read(folder / f"rank-{r:05d}.h5") for r in range(ranks)), strict=True)))


def read(path: Path) -> tuple[float, list[int], list[float], list[float], float]:
    """What a `Run` has of one rank."""
    with h5py.File(path, "r", locking=False) as file:
        updates, profile = file["updates"][:], file["profile"][:]
    times, checkpoint_s = updates["time_s"], float(profile["checkpoint_s"][0])
    inside = (times > times[-1] / 4) & (times < times[-1] - 1)
    updates, profile, times = updates[inside], profile[inside], times[inside]
    if len(times) < 3:
        sys.exit(f"{path.name}: too few updates to measure; take more --seconds")
    speed = float((updates["agent_steps"][-1] - updates["agent_steps"][0]) / (times[-1] - times[0]))
    parts = [name for name in profile.dtype.names if name.endswith("_s") and name not in ("time_s", "exchange_s")]
    compute = np.diff(sum(profile[name] for name in parts))
    exchange = np.diff(profile["exchange_s"])
    return (
        speed,
        updates["update"][1:].tolist(),
        compute.tolist(),
        exchange.tolist(),
        checkpoint_s,
    )


def predict(exchange: str, ranks: int, held_up: Straggling, free: dict[str, Run]) -> Outcome:
    """What the simulation says of a measured run: from free runs of the same size, no network."""
    computing = np.concatenate(free["none"].compute_s)
    times = held_up.draw(computing, ranks, SIMULATED_UPDATES, np.random.default_rng(ranks))
    if exchange == "allreduce":
        return allreduce(times, free["allreduce"].shortest_exchange_s)
    exchange_s = statistics.median(np.concatenate(free["gossip"].exchange_s)) if exchange == "gossip" else 0.0
    return gossip(Cluster(make_topology("ring", ranks), ranks, exchange_s=exchange_s), np.zeros_like(times), times)


def others(speeds: list[float]) -> float:
    """Speed of all ranks but the last; of the only one, if there is but one."""
    return sum(speeds[:-1] or speeds)


def measure(ranks: int, kinds: dict[str, Straggling], args: argparse.Namespace) -> dict[str, Any]:
    """All runs of one size, and what is simulated of them; prints a line for each."""
    runs: dict[tuple[str, str], list[Run]] = {(e, k): [] for k in kinds for e in EXCHANGES}
    for _ in range(args.repeats):
        for exchange, kind in runs:
            runs[exchange, kind].append(run(ranks, exchange, kinds[kind], args))
    free = {exchange: runs[exchange, "free"][0] for exchange in EXCHANGES}
    steps, found = args.simulators * args.rollout_steps, {}
    for (exchange, kind), own in runs.items():
        speeds = [sum(one.speeds) for one in own]
        simulated = float(predict(exchange, ranks, kinds[kind], free).updates_per_s.sum()) * steps
        # Turn by turn, beside the run of the same turn that nothing held up.
        kept = [others(a.speeds) / others(b.speeds) for a, b in zip(own, runs[exchange, "free"], strict=True)]
        found[f"{exchange}, {kind}"] = {
            "steps_per_s": speeds,
            "others_kept": kept,
            "simulated_steps_per_s": simulated,
            "simulation_error": simulated / statistics.median(speeds) - 1,
        }
        error = "(fitted)" if kind == "free" else f"{simulated / statistics.median(speeds) - 1:+.1%}"
        marked = f"{ranks}{'*' if ranks > len(os.sched_getaffinity(0)) else ''}"
        print(
            f"{marked:>4}  {exchange:<9}  {kind:<9}  {statistics.median(speeds):>7,.0f}  "
            f"{statistics.median(kept):>6.1%}  {simulated:>9,.0f}  {error:>8}",
            flush=True,
        )
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="sizes to measure")
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--seconds", type=float, default=15, help="length of a run")
    parser.add_argument("--repeats", type=int, default=1, help="turns of the runs of one size")
    parser.add_argument("--factor", type=float, default=2, help="how much longer the slow rank takes")
    parser.add_argument("--pause-ms", type=float, default=200, help="mean of a pause")
    parser.add_argument("--pause-share", type=float, default=0.02, help="share of the updates with a pause")
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    args.simulators, args.rollout_steps = 16, 5
    kinds = {
        "free": FREE,
        "one slow": Straggling(factor=args.factor),
        "pauses": Straggling(pause_s=args.pause_ms / 1000, pause_share=args.pause_share),
    }
    cores = len(os.sched_getaffinity(0))
    print(
        f"measured ({cores} cores; *: more ranks than cores); others: what all ranks but the last keep of their speed"
        "\nranks  exchange   straggling  steps/s  others  simulated  error"
    )
    measured = {str(ranks): measure(ranks, kinds, args) for ranks in args.ranks}
    if args.out:
        settings = {**vars(args), "out": None, "machine": platform.processor() or platform.machine(), "cores": cores}
        args.out.write_text(json.dumps({"settings": settings, "measured": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
