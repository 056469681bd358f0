"""Frames a second and utilisation of one GPU that 1, 2, 4 and 8 agents share.

    python benchmarks/device.py --out device.json

Runs gala-mpi on Pong with that many ranks on the first GPU, in turn, and reads the GPU's utilisation and memory once a
second meanwhile (nvidia-smi). With one agent also once with `--profile`, which waits for the device after each part and
so shows where the time goes. Ends with exit code 2 where torch can use no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from scaling import launcher, read

QUERY = ["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]


def train(ranks: int, args: argparse.Namespace, *more: str) -> tuple[float, list[list[int]], str]:
    """One run: agent steps a second, samples of utilisation in percent and memory in MiB, and what it printed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [launcher(), "-n", str(ranks), sys.executable, "-m", "gala_mpi", "--env", args.env]
        command += ["--simulators", str(args.simulators), "--device", "cuda", "--record-every", "1"]
        command += ["--total-steps", "1_000_000_000", "--time-limit-s", str(args.seconds), "--out", str(folder), *more]
        samples = []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            if any(folder.glob("rank-*.h5")):
                said = subprocess.run(QUERY, stdout=subprocess.PIPE, text=True, check=True).stdout
                samples.append([int(word) for word in said.split(",")])
            time.sleep(1)
        printed = process.stdout.read() if process.stdout else ""
        if process.returncode:
            sys.exit(f"the run of {ranks} ranks ended with exit code {process.returncode}\n{printed}")
        return sum(read(folder / f"rank-{rank:05d}.h5")[0] for rank in range(ranks)), samples, printed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--simulators", type=int, default=16, help="of an agent")
    parser.add_argument("--seconds", type=float, default=30, help="length of a run")
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("device.py: error: torch can use no GPU here", file=sys.stderr)
        sys.exit(2)
    name, results = torch.cuda.get_device_name(0), {}
    print(f"{name}, {len(os.sched_getaffinity(0))} cores\nagents  frames/s  utilisation  memory")
    for agents in args.agents:
        steps_per_s, samples, _ = train(agents, args)
        # The middle of the run: not its start, in which nothing is learned, and not its end.
        middle = samples[len(samples) // 4 : -1] or samples
        utilisation, mib = (statistics.mean(column) for column in zip(*middle, strict=True))
        found: dict[str, Any] = {"frames_per_s": 4 * steps_per_s, "utilisation_percent": utilisation, "memory_mib": mib}
        results[str(agents)] = found
        print(f"{agents:6d}  {4 * steps_per_s:8,.0f}  {utilisation:9.0f} %  {mib:,.0f} MiB", flush=True)
    print(train(1, args, "--profile")[2])
    if args.out:
        settings = {**vars(args), "out": None, "device": name, "cores": len(os.sched_getaffinity(0))}
        args.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
