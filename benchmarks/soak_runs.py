"""Short training runs to the end, hundreds of times on each MPI library: nothing may hang, fail or be left behind.

    python benchmarks/soak_runs.py --runs 200 --out benchmarks/results/soak-runs.json

A run is `mpirun -n 4 gala-mpi train --preset cartpole --total-steps 2_000`. Counted are exit codes, hangs (no end
within the deadline), tracebacks, and after each run the files in /dev/shm and the processes that it left. The
result is written anew after each run, so what a cut leaves is valid; the same command goes on from there. Needs both
MPI libraries (see tests/conftest.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pytest  # noqa: E402
from conftest import MPIS, Mpi, finish  # noqa: E402
from host import machine  # noqa: E402

SHARED_MEMORY = Path("/dev/shm")
RANKS = 4
# What a process needs to go away once its launcher has returned.
GRACE_S = 3


def shared_files() -> set[str]:
    """Names of the files in /dev/shm."""
    return {path.name for path in SHARED_MEMORY.iterdir()}


def processes_of(mark: str) -> list[int]:
    """Ids of the living processes that have `mark` in their environment: a run's own, whatever started them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def end(pids: list[int]) -> None:
    """Kill processes."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def owned_by(pids: set[int]) -> set[str]:
    """Files in /dev/shm that processes of others hold."""
    names = set()
    for entry in Path("/proc").glob("[0-9]*"):
        if int(entry.name) not in pids:
            with contextlib.suppress(OSError):
                names |= {
                    part.split("/dev/shm/")[1] for part in (entry / "maps").read_text().split() if "/dev/shm/" in part
                }
    return names


def run_once(mpi: Mpi, steps: int, seed: int, deadline_s: float) -> dict[str, Any]:
    """One run, and what it left."""
    before = shared_files()
    with tempfile.TemporaryDirectory() as scratch:
        mark = f"GALA_MPI_SOAK={Path(scratch).name}"
        args = ("-m", "gala_mpi", "train", "--preset", "cartpole", "--total-steps", str(steps), "--seed", str(seed))
        begin = time.monotonic()
        process = mpi.start(RANKS, *args, "--out", f"{scratch}/run", env=dict([mark.split("=")]))
        # A process that has left the launcher's tree would hold the pipes open for ever.
        last_resort = threading.Timer(deadline_s + 20, lambda: end(processes_of(mark)))
        last_resort.start()
        try:
            done = finish(process, deadline_s)
        except pytest.fail.Exception as hang:
            result: dict[str, Any] = {"exit_code": None, "hang": True, "tail": str(hang)[-2000:]}
        else:
            result = {
                "exit_code": done.returncode,
                "hang": False,
                "traceback": "Traceback" in done.stdout + done.stderr,
            }
            if done.returncode or result["traceback"]:
                result["tail"] = (done.stdout + done.stderr)[-2000:]
            elif "finished" not in done.stdout:
                result["tail"] = "no word of the end: " + done.stdout[-500:]
        last_resort.cancel()
        result["seconds"] = round(time.monotonic() - begin, 2)
        deadline = time.monotonic() + GRACE_S
        while (left := processes_of(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        # Files of other work on this machine come and go meanwhile: those that somebody maps are not this run's.
        files = shared_files() - before - owned_by(set(left))
    return {**result, "processes_left": len(left), "files_left": sorted(files)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals of each library."""
    totals = {}
    for library in MPIS:
        own = [run for run in runs if run["library"] == library]
        # A file is a leftover if it is still there at the end of all.
        files = sorted({name for run in own for name in run["files_left"] if (SHARED_MEMORY / name).exists()})
        totals[library] = {
            "runs": len(own),
            "exit_codes": dict(Counter(str(run["exit_code"]) for run in own)),
            "hangs": sum(run["hang"] for run in own),
            "tracebacks": sum(run.get("traceback", False) for run in own),
            "without_end": sum("tail" in run for run in own),
            "runs_that_left_processes": sum(run["processes_left"] > 0 for run in own),
            "files_left_in_dev_shm": files,
            "median_s": statistics.median([run["seconds"] for run in own]) if own else None,
            "longest_s": max((run["seconds"] for run in own), default=None),
        }
    return totals


def main() -> int:
    """The command line; exit code 1 if any run was not clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="on each library")
    parser.add_argument("--total-steps", type=int, default=2000)
    parser.add_argument("--deadline-s", type=float, default=120)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak-runs.json")
    args = parser.parse_args()
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    about = {
        "command": f"python benchmarks/soak_runs.py --runs {args.runs} --total-steps {args.total_steps}",
        "machine": f"{machine()}, shared with other work",
        "ranks": RANKS,
        "deadline_s": args.deadline_s,
    }
    for number in range(args.runs):
        for library, mpi in MPIS.items():
            if sum(run["library"] == library for run in runs) > number:
                continue
            runs.append({"library": library, **run_once(mpi, args.total_steps, number, args.deadline_s)})
            totals = summary(runs)
            scratch = args.out.with_suffix(".tmp")
            scratch.write_text(json.dumps({**about, "totals": totals, "runs": runs}, indent=1) + "\n")
            scratch.rename(args.out)
            own = totals[library]
            print(
                f"{time.strftime('%H:%M:%S')} {library:8} run {own['runs']:3}: {runs[-1]['seconds']:5.1f} s, "
                f"exit codes {own['exit_codes']}, {own['hangs']} hangs, {own['tracebacks']} tracebacks, "
                f"{own['runs_that_left_processes']} left processes, files left: {own['files_left_in_dev_shm']}",
                flush=True,
            )
    clean = all(
        set(own["exit_codes"]) <= {"0"} and not own["without_end"] and not own["runs_that_left_processes"]
        and not own["files_left_in_dev_shm"]
        for own in summary(runs).values()
    )  # fmt: skip
    return int(not clean)


if __name__ == "__main__":
    sys.exit(main())
