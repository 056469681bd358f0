"""Runs of 4 ranks that are killed and resumed at random, until they have learned CartPole all the same.

    python benchmarks/soak_resume.py --minutes 480 --out benchmarks/results/soak-resume.json

Again and again, with a new seed, in turn on each MPI library: a run of the preset cartpole is started, and resumed as
often as it takes to spend its budget. Each start may be ended, after a random time that may lie within its start-up, by
SIGKILL of a random rank, of all ranks and the launcher, or by SIGTERM, SIGINT or SIGUSR1 to a random rank. Some of them
go on with another number of ranks. After each start all files of the run must be readable, rows in order without a gap,
checkpoints whole, and of rows and training no more lost than the intervals; at the end the mean return of the last 100
episodes must be at least 475. The result is written anew after each start, so what a cut leaves is valid.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "analysis")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conftest import MPIS, Mpi, finish, kill, rank_process  # noqa: E402
from host import machine  # noqa: E402
from learning_curves import curve  # noqa: E402
from runs import RunError, read_run  # noqa: E402

from gala_mpi.storage.checkpoint import BEST, CheckpointError, CheckpointFolder, ranks_with_checkpoints, read  # noqa: E402

RANKS = 4
FLUSH_S, CHECKPOINT_S = 0.5, 1.0
ENDS = ("none", "kill one", "kill one", "kill all", "kill all", "SIGTERM", "SIGINT", "SIGUSR1")
DEADLINE_S = 240


def start(mpi: Mpi, run: Path, size: int, seed: int) -> subprocess.Popen[str]:
    """Start the run, or go on with it."""
    args = ["-m", "gala_mpi", "train"]
    if run.exists():
        args += ["--resume", str(run)]
    else:
        args += ["--preset", "cartpole", "--seed", str(seed), "--out", str(run), "--record-every", "1"]
        args += ["--flush-every-s", str(FLUSH_S), "--checkpoint-every-s", str(CHECKPOINT_S)]
    return mpi.start(size, *args)


def end_by(how: str, process: subprocess.Popen[str], size: int, chance: random.Random) -> None:
    """End a start in the way that `how` says, if it is still there."""
    try:
        if how == "kill all":
            kill(process)
        elif how != "none":
            number = signal.SIGKILL if how == "kill one" else signal.Signals[how]
            os.kill(rank_process(process.pid, chance.randrange(size)), number)
    # There is no rank yet, or none any more.
    except (pytest.fail.Exception, ProcessLookupError):
        pass


def examine(run: Path) -> dict[str, Any]:
    """What is wrong with a run's files, and how much training after the last checkpoint the metrics know of."""
    wrong: list[str] = []
    lost_s = 0.0
    newest: dict[int, float] = {}
    for rank in ranks_with_checkpoints(run):
        folder = CheckpointFolder(run, rank)
        for path in [*folder.newest_first(), folder.path / BEST]:
            try:
                if path.exists():
                    facts = read(path, 10**8).facts
                    newest[rank] = max(newest.get(rank, 0.0), facts.time_s)
            except CheckpointError as error:
                wrong.append(str(error))
    if not any(run.glob("rank-*.h5")):
        # Killed before it had one.
        return {"wrong": wrong, "lost_s": 0.0, "return": math.nan}
    try:
        found = read_run(run)
        table = found.table("updates")
        for rank, rows in table.groupby("rank"):
            updates, numbers = rows["update"].to_numpy(), rows["segment"].to_numpy()
            for seam in np.flatnonzero(np.diff(updates) != 1):
                # A rank that was not in a segment before, or left no checkpoint there, went on from another's update.
                between = [s for s in found.segments if numbers[seam] < s.number <= numbers[seam + 1]]
                if all(segment.went_on(rank) is not None for segment in between):
                    known = [(segment.number, segment.size, segment.resumed) for segment in found.segments]
                    places = " and ".join(f"{updates[i]} of segment {numbers[i]}" for i in (seam, seam + 1))
                    wrong.append(f"rank {rank}: rows are missing between updates {places}: {known}")
            last = found.segments[-1].number
            if rank in newest and (rows["segment"] == last).any():
                lost_s = max(lost_s, float(rows["time_s"].max()) - newest[rank])
        data = curve(found, 100)
        if (np.diff(data["agent_steps"]) < 0).any():
            wrong.append("the learning curve goes back")
        mean = float(data["mean_return"].iloc[-1]) if len(data) else math.nan
    except RunError as error:
        wrong.append(str(error))
        mean = math.nan
    return {"wrong": wrong, "lost_s": lost_s, "return": mean}


def one_run(library: str, seed: int, chance: random.Random, note: Any) -> dict[str, Any]:
    """A run from its first start to the end of its budget."""
    starts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        while True:
            size = RANKS if not starts or chance.random() < 0.8 else chance.choice([1, 2, 3, 5])
            how = chance.choice(ENDS) if len(starts) < 12 else "none"
            process = start(MPIS[library], run, size, seed)
            after_s = chance.uniform(1, 8)
            if how != "none":
                with_end = time.monotonic() + after_s
                while time.monotonic() < with_end and process.poll() is None:
                    time.sleep(0.02)
                end_by(how, process, size, chance)
            try:
                done = finish(process, DEADLINE_S)
                code, said = done.returncode, done.stdout + done.stderr
            except pytest.fail.Exception as hang:
                code, said = None, f"hang: {hang}"
            found = examine(run) if run.exists() else {"wrong": [], "lost_s": 0.0, "return": math.nan}
            over = code == 0 and "finished" in said
            if not as_it_must(how, code, said):
                found["wrong"].append(f"exit code {code} after {how}: {said[-1500:]}")
            if found["lost_s"] > CHECKPOINT_S + FLUSH_S + 1:
                found["wrong"].append(f"{found['lost_s']:.1f} s of training lost")
            starts.append({"ranks": size, "end": how, "after_s": round(after_s, 2), "exit_code": code, **found})
            note(starts[-1])
            if over:
                break
            if len(starts) > 40:
                starts[-1]["wrong"].append("no end after 40 starts")
                break
    return {"library": library, "seed": seed, "starts": starts, "return": starts[-1]["return"]}


def as_it_must(how: str, code: int | None, said: str) -> bool:
    """Whether a start ended with an exit code that it may have, `how` it was ended."""
    if code is None:
        return False
    if "kill" in how:
        return True
    # A run that was over before the signal came; one that was told in time to stop; one that had not begun to listen.
    return code == 0 or (how != "none" and (code == 75 or "metrics in" not in said))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals."""
    starts = [start for run in runs for start in run["starts"]]
    ended = [run["return"] for run in runs if run["starts"][-1]["exit_code"] == 0]
    return {
        "runs": len(runs),
        "starts": len(starts),
        "ends": dict(Counter(start["end"] for start in starts)),
        "exit_codes": dict(Counter(str(start["exit_code"]) for start in starts)),
        "wrong": [text for start in starts for text in start["wrong"]],
        "most_lost_s": max((start["lost_s"] for start in starts), default=0.0),
        "returns": [round(value, 1) for value in ended],
        "solved": sum(value >= 475 for value in ended),
    }


def main() -> int:
    """The command line; exit code 1 if anything was wrong, or a run did not reach 475."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the first run, and of all chance")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak-resume.json")
    args = parser.parse_args()
    chance, runs, seed = random.Random(args.seed), [], args.seed
    end = time.monotonic() + 60 * args.minutes
    about = {
        "command": f"python benchmarks/soak_resume.py --minutes {args.minutes:g} --seed {args.seed}",
        "machine": f"{machine()}, shared with other work",
    }

    def note(one: dict[str, Any]) -> None:
        print(
            f"{time.strftime('%H:%M:%S')} {library:8} seed {seed:3}: {one['ranks']} ranks, {one['end']:8} after "
            f"{one['after_s']:5.1f} s, exit code {one['exit_code']}, lost {one['lost_s']:.1f} s, return "
            f"{one['return']:.0f} {' '.join(one['wrong'])}",
            flush=True,
        )

    while time.monotonic() < end:
        library = list(MPIS)[seed % len(MPIS)]
        runs.append(one_run(library, seed, chance, note))
        seed += 1
        scratch = args.out.with_suffix(".tmp")
        scratch.write_text(json.dumps({**about, "totals": summary(runs), "runs": runs}, indent=1) + "\n")
        scratch.rename(args.out)
    totals = summary(runs)
    print(json.dumps(totals, indent=1))
    return int(bool(totals["wrong"]) or totals["solved"] < totals["runs"])


if __name__ == "__main__":
    sys.exit(main())
