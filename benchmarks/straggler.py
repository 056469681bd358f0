"""What one slow rank costs the others, under gossip, all-reduce and no exchange.

    python benchmarks/straggler.py --ranks 4 --pause-ms 50 --out straggler.json

Runs CartPole with each exchange, with and without a pause of `--pause-ms` after every update of the last rank, in
turn (A B A B), and prints the speed of the other ranks with the pause as a share of their speed without it. The
time of a run's first and last second is left out. Needs mpirun of the environment that runs it on the PATH.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py

SLOWED = """
import sys, time
from gala_mpi import cli, agent
from mpi4py import MPI
pause_s, args = float(sys.argv[1]), sys.argv[2:]
train = agent.Agent.train
def slowed(self, stop):
    last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
    return train(self, stop, on_update=(lambda _: time.sleep(pause_s)) if last else None)
if pause_s:
    agent.Agent.train = slowed
sys.exit(cli.train(args))
"""


def speed_of_others(folder: Path, ranks: int) -> float:
    """Agent steps a second of all ranks but the last, between the first and the last second of the run."""
    total = 0.0
    for rank in range(ranks - 1):
        with h5py.File(folder / f"rank-{rank:05d}.h5", "r", swmr=True, locking=False) as file:
            time_s, steps = file["updates"]["time_s"], file["updates"]["agent_steps"]
        inside = (time_s > 1) & (time_s < time_s[-1] - 1)
        time_s, steps = time_s[inside], steps[inside]
        total += (steps[-1] - steps[0]) / (time_s[-1] - time_s[0])
    return total


def measure(ranks: int, exchange: str, pause_s: float, seconds: float) -> float:
    """Speed of the other ranks in one run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = ["mpirun", "-n", str(ranks), sys.executable, "-c", SLOWED, str(pause_s)]
        command += ["--preset", "cartpole", "--exchange", exchange, "--total-steps", "1_000_000_000"]
        command += ["--time-limit-s", str(seconds), "--record-every", "1", "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=seconds + 120)
        return speed_of_others(folder, ranks)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pause-ms", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=10, help="length of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for exchange in ("gossip", "allreduce", "none"):
        plain, paused = [], []
        for _ in range(args.repeats):
            plain.append(measure(args.ranks, exchange, 0, args.seconds))
            paused.append(measure(args.ranks, exchange, args.pause_ms / 1000, args.seconds))
        shares = [slow / fast for slow, fast in zip(paused, plain, strict=True)]
        found[exchange] = {"steps_per_s": plain, "steps_per_s_paused": paused, "share": shares}
        print(
            f"{exchange:9s}: the other ranks keep {statistics.median(shares):6.1%} of their speed "
            f"({min(shares):.1%} to {max(shares):.1%}); {statistics.median(plain):,.0f} -> "
            f"{statistics.median(paused):,.0f} steps/s",
            flush=True,
        )
    if args.out:
        settings = {**vars(args), "out": None, "machine": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({"settings": settings, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
