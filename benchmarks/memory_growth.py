"""Whether a run's memory stays flat: resident memory, /dev/shm and the run's files, sampled while it goes on.

    python benchmarks/memory_growth.py --minutes 10 --ranks 2 --out benchmarks/results/memory-growth.json

Runs CartPole for `--minutes` on one MPI library; with `--cluster`, one rank on each host of the virtual cluster (see
tests/cluster.py), where messages go in the background. Growth is the mean of the last fifth of the samples over the
mean of the second fifth (the first is start-up), for each rank. Resident memory is taken as a whole, and apart from
what is shared (windows, libraries).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cluster import RANK_VARIABLES, Cluster  # noqa: E402
from conftest import MPIS, finish  # noqa: E402
from host import machine  # noqa: E402

FLAT = 0.02
MEASURES = ("VmRSS", "RssAnon", "RssFile", "RssShmem")


def find_ranks(folder: str) -> dict[int, int]:
    """Rank -> process id of the run that writes to `folder`: the Python processes that have it as an argument."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if folder.encode() in words and words[0].rpartition(b"/")[2].startswith(b"python"):
                variables = (entry / "environ").read_bytes().split(b"\0")
                rank = next((v.partition(b"=")[2] for v in variables if v.startswith(RANK_VARIABLES)), None)
                if rank is not None:
                    found[int(rank)] = int(entry.name)
    return found


def sample(ranks: dict[int, int], folder: Path) -> dict[str, Any]:
    """Memory of each rank in KiB, and sizes of /dev/shm and of the run's files in bytes."""
    memory = {}
    for rank, pid in sorted(ranks.items()):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            found = {name: re.search(rf"{name}:\s+(\d+) kB", status) for name in (*MEASURES, "Threads")}
            memory[rank] = {name: int(match[1]) for name, match in found.items() if match}
            memory[rank]["files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    space = os.statvfs("/dev/shm")
    return {
        "ranks": memory,
        "dev_shm_bytes": (space.f_blocks - space.f_bfree) * space.f_frsize,
        "recorder_bytes": {path.name: path.stat().st_size for path in sorted(folder.glob("rank-*.h5"))},
    }


def growth(values: list[int]) -> float:
    """The last fifth over the second fifth, less one."""
    fifth = max(len(values) // 5, 1)
    return statistics.mean(values[-fifth:]) / statistics.mean(values[fifth : 2 * fifth]) - 1


def report(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth of each measure and rank."""
    found = {}
    for rank in samples[-1]["ranks"]:
        own = [taken["ranks"][rank] for taken in samples if rank in taken["ranks"]]
        found[str(rank)] = {
            name: round(growth([memory[name] for memory in own]), 5) for name in MEASURES if own[0].get(name)
        } | {"first_kib": own[len(own) // 5]["VmRSS"], "last_kib": own[-1]["VmRSS"]}
    return found


def main() -> int:
    """The command line; exit code 1 if a rank's resident memory grew by over 2 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--library", choices=MPIS, default="mpich")
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--every-s", type=float, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory-growth.json")
    args = parser.parse_args()
    samples: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mpi = MPIS[args.library]
        if args.cluster:
            mpi = stack.enter_context(Cluster(args.ranks)).mpi(mpi)
        command = ["-m", "gala_mpi", "train", "--preset", "cartpole", "--total-steps", "1_000_000_000_000"]
        command += ["--time-limit-s", str(60 * args.minutes), "--out", str(scratch / "run")]
        process = mpi.start(args.ranks, *command)
        begin = time.monotonic()
        while process.poll() is None:
            time.sleep(args.every_s)
            ranks = {rank: pid for rank, pid in find_ranks(str(scratch / "run")).items() if process.poll() is None}
            if len(ranks) == args.ranks:
                samples.append({"time_s": round(time.monotonic() - begin, 1), **sample(ranks, scratch / "run")})
                resident = " ".join(f"{memory['VmRSS']:,}" for memory in samples[-1]["ranks"].values())
                print(f"{samples[-1]['time_s']:6.0f} s  resident KiB: {resident}", flush=True)
        done = finish(process, 60)
    found = report(samples)
    shared = growth([taken["dev_shm_bytes"] for taken in samples])
    result = {
        "command": f"python benchmarks/memory_growth.py --minutes {args.minutes:g} --ranks {args.ranks} "
        f"--library {args.library}{' --cluster' if args.cluster else ''}",
        "machine": f"{machine()}, shared with other work",
        "exit_code": done.returncode,
        "growth": found,
        "growth_of_dev_shm": round(shared, 5),
        "samples": samples,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for rank, measures in found.items():
        print(f"rank {rank}: " + ", ".join(f"{name} {measures[name]:+.2%}" for name in MEASURES if name in measures))
    flat = all(measures["VmRSS"] <= FLAT for measures in found.values())
    return int(done.returncode != 0 or not flat)


if __name__ == "__main__":
    sys.exit(main())
