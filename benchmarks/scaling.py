"""More ranks, and ranks that are held up: measured here, and simulated for a cluster.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

Measured: Pong on 1, 2, 4 and 8 ranks of this machine (marked where those are more than its cores) under gossip,
all-reduce and no exchange; each free, with the last rank at a fraction of its speed (it computes for nothing, so that
it keeps its share of a core), and with every rank pausing now and then. The runs of one size take turns. A rank's
first quarter of a run, and the last second, are left out.

Simulated (see simulation.py): the times of updates without exchange, as measured, are first put together to what the
measured runs should have given, and the error is printed; then to what ranks of a cluster would give, on a core each
and a network of `--gbit-per-s` and `--latency-us` for every rank.

Needs mpirun of the environment that runs it, beside its Python or on the PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from simulation import Network, Outcome, Straggling, allreduce, gossip, ring

EXCHANGES = ("none", "gossip", "allreduce")
# The last rank spins; pauses are drawn by every rank.
HELD_UP = """
import random, sys, time
from gala_mpi import cli, agent
from mpi4py import MPI
factor, pause_s, pause_share = map(float, sys.argv[1:4])
last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
rng, begin = random.Random(MPI.COMM_WORLD.rank), time.perf_counter()
def hold_up(update):
    global begin
    if last and factor > 1:
        end = time.perf_counter() + (factor - 1) * (time.perf_counter() - begin)
        while time.perf_counter() < end:
            pass
    if rng.random() < pause_share:
        time.sleep(rng.expovariate(1 / pause_s))
    begin = time.perf_counter()
train = agent.Agent.train
agent.Agent.train = lambda self, stop: train(self, stop, on_update=hold_up)
sys.exit(cli.train(sys.argv[4:]))
"""
SIMULATED_UPDATES = 400
GOSSIP_TABLE = "{:>6}  {:<9}  {:<9}  {:>9}  {:>6.1%}  {:>6.1%}  {:>5.2f}  {:>4d}"


@dataclass(frozen=True)
class Run:
    """What one run gave. `speeds` are agent steps a second of each rank, the rest seconds of its updates."""

    speeds: list[float]
    compute_s: list[list[float]]
    exchange_s: list[list[float]]


def launcher() -> str:
    """The mpirun that belongs to this Python."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    return found or sys.exit("no mpirun beside this Python or on the PATH")


def run(ranks: int, exchange: str, held_up: Straggling, args: argparse.Namespace) -> Run:
    """One run, measured."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [launcher(), "-n", str(ranks), sys.executable, "-c", HELD_UP]
        command += [str(held_up.factor), str(held_up.pause_s), str(held_up.pause_share)]
        command += ["--env", args.env, "--exchange", exchange, "--device", "cpu", "--total-steps", "1_000_000_000"]
        command += ["--time-limit-s", str(args.seconds), "--record-every", "1", "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=args.seconds + 60 * (5 + ranks))
        return Run(*map(list, zip(*(read(folder / f"rank-{r:05d}.h5") for r in range(ranks)), strict=True)))


def read(path: Path) -> tuple[float, list[float], list[float]]:
    """Speed, computing times and exchange times of one rank."""
    with h5py.File(path, "r", locking=False) as file:
        updates, profile = file["updates"][:], file["profile"][:]
    times = updates["time_s"]
    inside = (times > times[-1] / 4) & (times < times[-1] - 1)
    updates, profile, times = updates[inside], profile[inside], times[inside]
    if len(times) < 3:
        sys.exit(f"{path.name}: too few updates to measure; take more --seconds")
    speed = (updates["agent_steps"][-1] - updates["agent_steps"][0]) / (times[-1] - times[0])
    parts = [name for name in profile.dtype.names if name.endswith("_s") and name not in ("time_s", "exchange_s")]
    compute = np.diff(sum(profile[name] for name in parts))
    return float(speed), compute.tolist(), np.diff(profile["exchange_s"]).tolist()


def predict(exchange: str, ranks: int, held_up: Straggling, free: dict[str, Run], steps: int) -> Outcome:
    """What the simulation says of a measured run: from free runs of the same size, no network."""
    computing = np.concatenate(free["none"].compute_s)
    times = held_up.draw(computing, ranks, SIMULATED_UPDATES, np.random.default_rng(ranks))
    if exchange == "gossip":
        return gossip(times, statistics.median(np.concatenate(free["gossip"].exchange_s)), 0.0, ring(ranks))
    if exchange == "none":
        return gossip(times, 0.0, 0.0, [[] for _ in range(ranks)])
    # The last rank to come waits for nobody: what it spends is the all-reduce itself.
    shortest = min(map(len, free["allreduce"].exchange_s))
    last = np.min([own[:shortest] for own in free["allreduce"].exchange_s], axis=0)
    return allreduce(times, float(np.median(last)))


def others(speeds: list[float]) -> float:
    """Speed of all ranks but the last; of the only one, if there is but one."""
    return sum(speeds[:-1] or speeds)


def measure(ranks: int, kinds: dict[str, Straggling], args: argparse.Namespace) -> tuple[dict[str, Any], dict]:
    """All runs of one size, and what is simulated of them; prints a line for each."""
    runs: dict[tuple[str, str], list[Run]] = {(e, k): [] for k in kinds for e in EXCHANGES}
    for _ in range(args.repeats):
        for exchange, kind in runs:
            runs[exchange, kind].append(run(ranks, exchange, kinds[kind], args))
    free = {exchange: runs[exchange, "free"][0] for exchange in EXCHANGES}
    steps, found = args.simulators * args.rollout_steps, {}
    for (exchange, kind), own in runs.items():
        speeds = [sum(one.speeds) for one in own]
        simulated = float(predict(exchange, ranks, kinds[kind], free, steps).updates_per_s.sum()) * steps
        # Turn by turn, beside the run of the same turn that nothing held up.
        kept = [others(a.speeds) / others(b.speeds) for a, b in zip(own, runs[exchange, "free"], strict=True)]
        found[f"{exchange}, {kind}"] = {
            "steps_per_s": speeds,
            "others_kept": kept,
            "simulated_steps_per_s": simulated,
            "simulation_error": simulated / statistics.median(speeds) - 1,
        }
        marked = f"{ranks}{'*' if ranks > len(os.sched_getaffinity(0)) else ''}"
        print(
            f"{marked:>4}  {exchange:<9}  {kind:<9}  {statistics.median(speeds):>7,.0f}  "
            f"{statistics.median(kept):>6.1%}  {simulated:>7,.0f}  {simulated / statistics.median(speeds) - 1:>+6.1%}",
            flush=True,
        )
    return found, free


def simulate(free: dict[str, Run], kinds: dict[str, Straggling], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ranks of a cluster, from the free runs of one rank a core; prints a line for each."""
    network = Network(args.latency_us * 1e-6, args.gbit_per_s * 1e9 / 8)
    computing = np.concatenate(free["none"].compute_s)
    exchange_s = float(np.median(np.concatenate(free["gossip"].exchange_s)))
    alone, found = 1 / computing.mean(), []
    for kind, held_up in kinds.items():
        for ranks in args.simulate:
            times = held_up.draw(computing, ranks, SIMULATED_UPDATES, np.random.default_rng(ranks))
            together = {
                "gossip": gossip(times, exchange_s, network.message_s(args.message_bytes), ring(ranks)),
                "allreduce": allreduce(times, network.allreduce_s(ranks, args.message_bytes)),
            }
            for exchange, outcome in together.items():
                total = float(outcome.updates_per_s.sum())
                entry = {"ranks": ranks, "exchange": exchange, "straggling": kind, "efficiency": total / ranks / alone}
                entry |= {k: v for k, v in asdict(outcome).items() if k != "updates_per_s"}
                entry["steps_per_s"] = total * args.simulators * args.rollout_steps
                found.append(entry)
                print(
                    GOSSIP_TABLE.format(
                        f"{ranks:,}",
                        exchange,
                        kind,
                        f"{entry['steps_per_s']:,.0f}",
                        entry["efficiency"],
                        outcome.mixed_share,
                        outcome.staleness_mean,
                        outcome.staleness_most,
                    ),
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
    parser.add_argument("--simulate", type=int, nargs="+", default=[2, 16, 128, 1024, 4096], help="sizes to simulate")
    parser.add_argument("--gbit-per-s", type=float, default=25, help="of each rank's link, in each direction")
    parser.add_argument("--latency-us", type=float, default=5, help="of a message of one byte")
    parser.add_argument("--message-bytes", type=int, default=866_000 * 4, help="size of the parameters")
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    args.simulators, args.rollout_steps = 16, 5
    kinds = {
        "free": Straggling(),
        "one slow": Straggling(factor=args.factor),
        "pauses": Straggling(pause_s=args.pause_ms / 1000, pause_share=args.pause_share),
    }
    cores = len(os.sched_getaffinity(0))
    print(
        f"measured ({cores} cores; *: more ranks than cores); others: what all ranks but the last keep of their speed"
        "\nranks  exchange   straggling  steps/s  others  simulated  error"
    )
    measured, free = {}, {}
    for ranks in args.ranks:
        measured[str(ranks)], free[ranks] = measure(ranks, kinds, args)
    fitting = max((ranks for ranks in args.ranks if ranks <= cores), default=min(args.ranks))
    print(
        f"\nsimulated from the free runs of {fitting} ranks; a link of {args.gbit_per_s:g} Gbit/s and "
        f"{args.latency_us:g} us for each rank\n"
        " ranks  exchange   straggling  steps/s  of ideal  mixed  staleness, most"
    )
    simulated = simulate(free[fitting], kinds, args)
    if args.out:
        settings = {**vars(args), "out": None, "machine": platform.processor() or platform.machine(), "cores": cores}
        results = {"settings": settings, "measured": measured, "simulated": simulated}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
