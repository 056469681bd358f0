"""How long a run takes to begin, and how much memory its ranks hold.

    python benchmarks/startup.py --out benchmarks/results/startup.json

For each number of ranks: seconds from the start of mpirun to the first update of the first and of the last rank; a
rank's mean time for its imports, and for making its simulators; and once all ranks train, their memory: resident, and
with what ranks share divided among them (Rss and Pss of smaps_rollup).

Needs mpirun of the environment that runs it, beside its Python or on the PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
from host import launcher

# Every rank writes how long it took to import what it needs, and to make its simulators.
STARTED = """
import json, sys, time
begin = time.perf_counter()
from gala_mpi import cli
from gala_mpi.train import agent
imports_s = time.perf_counter() - begin
make = agent.make_simulators
def timed(*args):
    begin = time.perf_counter()
    made = make(*args)
    with open(f"{sys.argv[1]}/{__import__('os').getpid()}.json", "w") as file:
        json.dump({"imports_s": imports_s, "simulators_s": time.perf_counter() - begin}, file)
    return made
agent.make_simulators = timed
sys.exit(cli.train(sys.argv[2:]))
"""


def memory(pid: int) -> dict[str, int]:
    """Resident memory of a process in KiB: all of it, and with shared pages divided among their users."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {name: int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) for name in ("Rss", "Pss")}


def measure(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of `ranks` ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, notes = Path(scratch) / "run", Path(scratch) / "notes"
        notes.mkdir()
        command = [launcher(), "-n", str(ranks), sys.executable, "-c", STARTED, str(notes)]
        command += ["--env", args.env, "--device", "cpu", "--record-every", "1", "--flush-every-s", "0.5"]
        command += ["--total-steps", "1_000_000_000", "--out", str(folder)]
        began, deadline = time.time(), time.monotonic() + 120 + 30 * ranks
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while (first := first_updates(folder, ranks)) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the run of {ranks} ranks has not begun to train")
                time.sleep(0.5)
            pids = [int(path.stem) for path in notes.iterdir()]
            used = [memory(pid) for pid in pids]
            own = [json.loads(path.read_text()) for path in notes.iterdir()]
        finally:
            process.terminate()
            process.wait(120)
        return {
            "first_update_s": min(first) - began,
            "last_first_update_s": max(first) - began,
            "imports_s": [entry["imports_s"] for entry in own],
            "simulators_s": [entry["simulators_s"] for entry in own],
            "rss_kib": [entry["Rss"] for entry in used],
            "pss_kib": [entry["Pss"] for entry in used],
        }


def first_updates(folder: Path, ranks: int) -> list[float] | None:
    """When each rank ended its first update, as time of day; None if one has not yet."""
    found = []
    for rank in range(ranks):
        try:
            with h5py.File(folder / f"rank-{rank:05d}.h5", "r", swmr=True, locking=False) as file:
                if not len(file["updates"]):
                    return None
                found.append(float(file.attrs["t0"]) + float(file["updates"][0]["time_s"]))
        except OSError:
            return None
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--env", default="ALE/Pong-v5")
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    cores, results = len(os.sched_getaffinity(0)), {}
    print(f"{cores} cores\nranks  first update  all ranks   imports  simulators  resident   shared divided")
    for ranks in args.ranks:
        found = results[str(ranks)] = measure(ranks, args)
        mean = {name: sum(found[name]) / ranks for name in ("imports_s", "simulators_s", "rss_kib", "pss_kib")}
        print(
            f"{ranks:5d}  {found['first_update_s']:10.1f} s  {found['last_first_update_s']:7.1f} s  "
            f"{mean['imports_s']:6.1f} s  {mean['simulators_s']:8.1f} s  {mean['rss_kib'] / 1024:5.0f} MiB  "
            f"{mean['pss_kib'] / 1024:5.0f} MiB a rank",
            flush=True,
        )
    if args.out:
        settings = {**vars(args), "out": None, "machine": platform.processor() or platform.machine(), "cores": cores}
        args.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
