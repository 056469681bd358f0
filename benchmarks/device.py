"""Frames a second and utilisation of one GPU that 1, 2, 4 and 8 agents share.

    python benchmarks/device.py --out device.json

Runs gala-mpi on Pong with that many ranks on one GPU, in turns, and reads its utilisation, memory and power once a
second meanwhile (nvidia-smi). With one agent also once with `--profile`, which waits for the device after each part and
so shows where the time goes. The figures are written anew after each run. Ends with exit code 2 where torch can use no
GPU.
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
from held_up import read
from host import launcher

QUERIED = "utilization.gpu,memory.used,power.draw"


def train(ranks: int, gpu: str, args: argparse.Namespace, *more: str) -> tuple[float, list[list[float]], str]:
    """One run: agent steps a second; samples of percent, MiB and W; and what it printed. `gpu` is the device's UUID."""
    query = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={QUERIED}", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / "run", Path(scratch) / "output"
        command = [launcher(), "-n", str(ranks), sys.executable, "-m", "gala_mpi", "--env", args.env]
        command += ["--simulators", str(args.simulators), "--device", "cuda", "--record-every", "1"]
        command += ["--total-steps", "1_000_000_000", "--time-limit-s", str(args.seconds), "--out", str(folder), *more]
        samples = []
        with output.open("w") as file:
            process = subprocess.Popen(command, stdout=file, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
        while process.poll() is None:
            if any(folder.glob("rank-*.h5")):
                said = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout
                samples.append([float(word) for word in said.split(",")])
            time.sleep(1)
        printed = output.read_text()
        if process.returncode or len(samples) < 4:
            sys.exit(f"the run of {ranks} ranks ended early, with exit code {process.returncode}\n{printed}")
        return sum(read(folder / f"rank-{rank:05d}.h5")[0] for rank in range(ranks)), samples, printed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--simulators", type=int, default=16, help="of an agent")
    parser.add_argument("--seconds", type=float, default=30, help="length of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("device.py: error: torch can use no GPU here", file=sys.stderr)
        sys.exit(2)
    name, gpu = torch.cuda.get_device_name(0), f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    results: dict[str, list[dict[str, Any]]] = {str(agents): [] for agents in args.agents}
    print(f"{name}, {len(os.sched_getaffinity(0))} cores\nagents  frames/s  utilisation  memory      power")
    for _ in range(args.repeats):
        for agents in args.agents:
            steps_per_s, samples, _ = train(agents, gpu, args)
            # The middle of the run: not its start, in which nothing is learned, and not its end.
            means = [statistics.mean(column) for column in zip(*samples[len(samples) // 4 : -1], strict=True)]
            named = dict(zip(("utilisation_percent", "memory_mib", "power_w"), means, strict=True))
            results[str(agents)].append({"frames_per_s": 4 * steps_per_s, **named})
            if args.out:
                settings = {**vars(args), "out": None, "device": name, "cores": len(os.sched_getaffinity(0))}
                args.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
            print(
                f"{agents:6d}  {4 * steps_per_s:8,.0f}  {means[0]:9.0f} %  {means[1]:6,.0f} MiB  {means[2]:5.0f} W",
                flush=True,
            )
    print(train(1, gpu, args, "--profile")[2])


if __name__ == "__main__":
    main()
