"""Millions of verified exchanges through the mailbox, over every transport, inline, stored and in the background.

    python benchmarks/soak_mailbox.py --exchanges 10_000_000 --out benchmarks/results/soak-mailbox.json

Runs tests/gossip/programs/stress_mailbox.py over and over: round by round, one piece on each transport, until each has
its share. An exchange is a message taken and verified whole, in order, and no older than announced. The result is
written anew after each piece, so what a cut leaves is valid; the same command goes on from there. Needs both MPI
libraries and, for the virtual cluster of three hosts, root (see tests/conftest.py and tests/cluster.py).

Every fifth round has payloads up to 64 KiB, uneven paces and three ranks; the others have up to 1 KiB through many
mailboxes at once, which makes an exchange cheap where each step waits for the other rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pytest  # noqa: E402
from cluster import Cluster  # noqa: E402
from conftest import MPIS, Mpi, finish  # noqa: E402
from host import machine  # noqa: E402

PROGRAM = str(ROOT / "tests" / "gossip" / "programs" / "stress_mailbox.py")
OVER_TCP = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
SMALL = {"ranks": 2, "capacity": 1024, "mailboxes": 32, "posts_per_phase": 500, "roles": ["even"], "announcing": 0.1}
LARGE = {"ranks": 3, "capacity": 65536, "mailboxes": 2, "posts_per_phase": 250}
BACKGROUND = {"haste": 0.05, "courier_sleep_s": 1e-4}
LARGE_EVERY = 5


@dataclass(frozen=True)
class Transport:
    """Where a share of the exchanges goes."""

    library: str
    way: str  # shared memory, TCP on one host, or virtual cluster
    delivery: str  # inline: by a Put; stored: inline too, but by the sender's own stores; or background
    share: float

    @property
    def name(self) -> str:
        return f"{self.library}, {self.way}, {self.delivery}"


# A single inline exchange over TCP waits for the target three times, hence the small shares there.
TRANSPORTS = (
    Transport("mpich", "shared memory", "stored", 0.3),
    Transport("openmpi", "shared memory", "stored", 0.3),
    Transport("mpich", "shared memory", "inline", 0.033),
    Transport("openmpi", "shared memory", "inline", 0.033),
    Transport("mpich", "shared memory", "background", 0.13),
    Transport("openmpi", "shared memory", "background", 0.13),
    Transport("mpich", "TCP on one host", "background", 0.03),
    Transport("mpich", "virtual cluster", "background", 0.02),
    Transport("openmpi", "virtual cluster", "background", 0.02),
    Transport("mpich", "TCP on one host", "inline", 0.001),
    Transport("mpich", "virtual cluster", "inline", 0.0015),
    Transport("openmpi", "virtual cluster", "inline", 0.0015),
)


def run_piece(transport: Transport, mpi: Mpi, settings: dict[str, Any], exchanges: int, seed: int) -> dict[str, Any]:
    """One run of the program; what it counted, or what went wrong."""
    how = ["inline", "--shared"] if transport.delivery == "stored" else [transport.delivery]
    options = ["--exchanges", str(exchanges), "--seed", str(seed), "--delivery", *how]
    for name, value in settings.items():
        if name != "ranks":
            options += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    env = OVER_TCP if transport.way == "TCP on one host" else None
    piece: dict[str, Any] = {"transport": transport.name, "seed": seed, "settings": settings, "taken": 0, "posted": 0}
    begin = time.monotonic()
    try:
        done = finish(mpi.start(settings["ranks"], PROGRAM, *options, "--deadline-s", "900", env=env), 960)
    except pytest.fail.Exception as hang:
        return {**piece, "wall_s": time.monotonic() - begin, "failure": str(hang)[-2000:]}
    piece["wall_s"] = round(time.monotonic() - begin, 2)
    if done.returncode:
        return {**piece, "violated": re.findall(r"violated: ([\w-]+)", done.stderr), "failure": done.stderr[-2000:]}
    return {**piece, **json.loads(done.stdout.splitlines()[-1])}


def summary(pieces: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Totals by transport and over all."""
    totals = {}
    for name in [*(transport.name for transport in TRANSPORTS), "all"]:
        own = [piece for piece in pieces if name in (piece["transport"], "all")]
        violated = [promise for piece in own for promise in piece.get("violated", ())]
        totals[name] = {
            "taken": sum(piece["taken"] for piece in own),
            "posted": sum(piece["posted"] for piece in own),
            "bytes_posted": sum(piece.get("bytes_posted", 0) for piece in own),
            "wall_s": round(sum(piece["wall_s"] for piece in own), 1),
            "torn": sum(promise in ("whole", "held") for promise in violated),
            "out_of_order": violated.count("ordered"),
            "other_violations": sum(promise not in ("whole", "held", "ordered") for promise in violated),
            "failed_pieces": sum("failure" in piece for piece in own),
            "pieces": len(own),
            "taken_in_large_pieces": sum(piece["taken"] for piece in own if piece["settings"]["capacity"] > 1024),
        }
    return totals


def schedule(exchanges: int, rounds: int, pieces: list[dict[str, Any]]) -> Iterator[tuple[Transport, bool, int]]:
    """What is still to do: a transport, whether the payloads are large, and a number of exchanges."""
    for number in range(10 * rounds):
        taken = {name: total["taken"] for name, total in summary(pieces).items()}
        if taken["all"] >= exchanges:
            return
        for transport in TRANSPORTS:
            wanted = round(transport.share * exchanges)
            if taken[transport.name] < wanted:
                yield transport, number % LARGE_EVERY == LARGE_EVERY - 1, -(-wanted // rounds)


def libraries() -> dict[str, str]:
    """The first line of each launcher's version."""
    shown = {
        name: subprocess.run([mpi.mpirun, "--version"], capture_output=True, text=True) for name, mpi in MPIS.items()
    }
    return {name: " ".join(done.stdout.split()[:5]) for name, done in shown.items()}


def main() -> int:
    """The command line; exit code 1 if any exchange broke a promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exchanges", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=20, help="pieces that each transport's share is cut into")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak-mailbox.json")
    args = parser.parse_args()
    pieces = json.loads(args.out.read_text())["pieces"] if args.out.exists() else []
    about = {
        "command": f"python benchmarks/soak_mailbox.py --exchanges {args.exchanges} --rounds {args.rounds}",
        "machine": f"{machine()}, shared with other work",
        "libraries": libraries(),
        "shares": {transport.name: transport.share for transport in TRANSPORTS},
    }
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster())
        for transport, large, exchanges in schedule(args.exchanges, args.rounds, pieces):
            mpi = MPIS[transport.library]
            settings = dict(LARGE if large else SMALL)
            if transport.delivery == "background":
                settings |= BACKGROUND
            if transport.way == "virtual cluster":
                settings["ranks"] = 3
                mpi = cluster.mpi(mpi)
            if transport.way != "shared memory":
                # Shorter pieces, and fewer announcements, each of which waits for its target.
                settings |= {"posts_per_phase": 50, "announcing": 0.02}
            piece = run_piece(transport, mpi, settings, exchanges, seed=len(pieces))
            pieces.append(piece)
            totals = summary(pieces)
            scratch = args.out.with_suffix(".tmp")
            scratch.write_text(json.dumps({**about, "totals": totals, "pieces": pieces}, indent=1) + "\n")
            scratch.rename(args.out)
            every = totals["all"]
            print(
                f"{time.strftime('%H:%M:%S')} {transport.name:36}{' large' if large else '      '} "
                f"{piece['taken']:8,} in {piece['wall_s']:6.1f} s; in all {every['taken']:,}, {every['torn']} torn, "
                f"{every['out_of_order']} out of order, {every['failed_pieces']} failed",
                flush=True,
            )
    return int(summary(pieces)["all"]["failed_pieces"] > 0)


if __name__ == "__main__":
    sys.exit(main())
