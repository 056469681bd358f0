"""What the exchange costs between hosts: training throughput on a virtual cluster of one-rank hosts.

    python benchmarks/network.py --hosts 2 --rate 1gbit --out benchmarks/results/network-mpich.json

Trains with gossip, as it is and with half the bytes (float16), without an exchange and with all-reduce, in turn (A B
C D A B C D), on hosts that are network namespaces (tests/cluster.py) with links of `--rate`. Printed are the agent
steps a second of all ranks together; for the exchanges the ratio to the run without one of the same turn; the megabits
a second that each host sends, headers included; the share of updates that mixed a message; and that of the time spent
in the exchange. The time of a run's first and last second is left out.

Without an exchange a rank still counts the run's steps, over the same links, and its communication thread runs: the
ratio tells what the messages cost, not the thread. Each rank has a core of its own if there are as many as hosts.
Needs root and iproute2, and the MPI library that `--mpi` names (see tests/conftest.py).
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cluster import Cluster, ClusterUnavailable  # noqa: E402
from conftest import MPIS, Mpi, finish, kill  # noqa: E402

EXCHANGES = {
    "gossip": ("--exchange", "gossip"),
    "float16": ("--exchange", "gossip", "--wire", "float16"),
    "none": ("--exchange", "none"),
    "allreduce": ("--exchange", "allreduce"),
}
COMPARED = [exchange for exchange in EXCHANGES if exchange != "none"]
# Left out at either end of a run.
MARGIN_S = 1
# Until the ranks have started, and from the time limit to the end.
PATIENCE_S = 60


def cpu_name() -> str:
    """The processor, as the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def ranks_figures(folder: Path, ranks: int) -> dict[str, float]:
    """Agent steps a second of all ranks together, and the means over ranks of the two shares."""
    steps_per_s, mixed, exchange = 0.0, [], []
    for rank in range(ranks):
        with h5py.File(folder / f"rank-{rank:05d}.h5", "r") as file:
            rows = file["updates"][:]
        time_s = rows["time_s"]
        rows = rows[(time_s > MARGIN_S) & (time_s < time_s[-1] - MARGIN_S)]
        seconds = rows["time_s"][-1] - rows["time_s"][0]
        steps_per_s += (rows["agent_steps"][-1] - rows["agent_steps"][0]) / seconds
        # A row for each update; one that mixed two messages counts once.
        mixed.append(float((rows["messages_mixed"][1:] > rows["messages_mixed"][:-1]).mean()))
        exchange.append(float(rows["exchange_s"][-1] - rows["exchange_s"][0]) / seconds)
    return {
        "steps_per_s": float(steps_per_s),
        "mixed_share": statistics.mean(mixed),
        "exchange_share": statistics.mean(exchange),
    }


def sent_megabits_per_s(cluster: Cluster, started: Callable[[], bool], seconds: float) -> list[float]:
    """What each host sends during a run of `seconds`, read while it goes on, from when it has `started`."""
    deadline = time.monotonic() + PATIENCE_S
    while not started():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no rank has started after {PATIENCE_S} s")
        time.sleep(0.05)
    time.sleep(MARGIN_S)
    begin, before = time.monotonic(), list(map(cluster.sent_bytes, cluster.hosts))
    time.sleep(seconds - 2 * MARGIN_S)
    inside_s, after = time.monotonic() - begin, list(map(cluster.sent_bytes, cluster.hosts))
    return [(end - start) * 8e-6 / inside_s for start, end in zip(before, after, strict=True)]


def run_once(cluster: Cluster, mpi: Mpi, args: argparse.Namespace, exchange: str) -> dict[str, Any]:
    """One run: its figures, and how busy the machine was before it."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = ["-m", "gala_mpi", "train", "--preset", args.preset, *(["--env", args.env] if args.env else [])]
        command += [*EXCHANGES[exchange], "--total-steps", "1_000_000_000", "--time-limit-s", str(args.seconds)]
        command += ["--record-every", "1", "--out", str(folder)]
        process = cluster.mpi(mpi).start(args.hosts, *command, cwd=ROOT)

        def started() -> bool:
            return (folder / "rank-00000.h5").exists() or process.poll() is not None

        try:
            sent = sent_megabits_per_s(cluster, started, args.seconds)
            done = finish(process, PATIENCE_S)
        finally:
            if process.poll() is None:
                kill(process)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
        with h5py.File(folder / "rank-00000.h5", "r") as file:
            about = {"mpi_library": str(file.attrs["mpi_library"]), "delivery": json.loads(file.attrs["delivery"])}
        return {**ranks_figures(folder, args.hosts), "sent_mbit_per_s": sent, "load_before": load, **about}


def ratios(runs: dict[str, list[dict[str, Any]]], exchange: str) -> list[float]:
    """Steps a second with `exchange` over those without one, turn by turn."""
    return [a["steps_per_s"] / b["steps_per_s"] for a, b in zip(runs[exchange], runs["none"], strict=True)]


def report(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print the medians of each exchange, and the ratios."""
    for exchange, own in runs.items():
        median = {name: statistics.median(run[name] for run in own) for name in ("steps_per_s", "mixed_share")}
        share = statistics.median(run["exchange_share"] for run in own)
        sent = statistics.median(megabits for run in own for megabits in run["sent_mbit_per_s"])
        print(
            f"{exchange:9s}: {median['steps_per_s']:,.0f} steps/s, {sent:.1f} Mbit/s sent per host, "
            f"{median['mixed_share']:.1%} of updates mixed, {share:.2%} of the time in the exchange"
        )
    for exchange in COMPARED:
        found = ratios(runs, exchange)
        print(f"{exchange} / none: {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="one rank on each")
    parser.add_argument("--rate", default="1gbit", help="of each link, as tc writes it: 100mbit, say")
    parser.add_argument("--mpi", choices=("mpich", "openmpi"), default="mpich")
    parser.add_argument("--preset", default="gala-atari")
    parser.add_argument("--env", help="instead of the preset's")
    parser.add_argument("--seconds", type=float, default=40, help="length of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    if args.hosts < 2 or args.repeats < 1 or args.seconds < 4 * MARGIN_S:
        parser.error(f"at least 2 hosts, 1 repeat and {4 * MARGIN_S} seconds")
    if args.mpi not in MPIS:
        parser.error(f"no {args.mpi} here, only {', '.join(MPIS) or 'no MPI library at all'}")
    runs: dict[str, list[dict[str, Any]]] = {exchange: [] for exchange in EXCHANGES}
    try:
        with Cluster(args.hosts, args.rate) as cluster:
            for turn in range(args.repeats):
                for exchange in EXCHANGES:
                    run = run_once(cluster, MPIS[args.mpi], args, exchange)
                    runs[exchange].append(run)
                    speed, load = run["steps_per_s"], run["load_before"]
                    print(f"turn {turn + 1}, {exchange:9s}: {speed:,.0f} steps/s (load {load:.2f})", flush=True)
    except ClusterUnavailable as error:
        parser.error(f"no virtual cluster: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"a run ended with exit code {error.returncode}:\n{error.stdout[-2000:]}\n{error.stderr[-4000:]}")
    report(runs)
    if args.out:
        about = {"machine": f"{cpu_name()}, {os.cpu_count()} CPUs, shared with other work"}
        settings = {**vars(args), "out": None, **about}
        over_none = {exchange: ratios(runs, exchange) for exchange in COMPARED}
        args.out.write_text(json.dumps({"settings": settings, "over_none": over_none, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
