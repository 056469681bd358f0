"""Thin ranks: the real exchange and board, with a stand-in for learner and simulators, so that 256 run on two cores.

    python benchmarks/thin.py --ranks 256 --nodes 8 --kill 1 --kill 8 --kill node --out benchmarks/results/thin-256.json

A thin rank has no torch and no environment. It sleeps for a time that it draws, adds noise of one size to its
parameters, as an optimiser's step does, and then does what a rank of `gala-mpi train` does: `Gossip.step` and
`Board.report`, and with `--checkpoint-every-s` checkpoints in turn, of its parameters twice. So what is measured is
start-up, memory, mixing, the board, and what lost ranks do to all that. What a step costs is not: there are more ranks
than cores.

Of its 2 n + 1 parameters the first n take noise and keep it; the next n forget it, by the factor sqrt(gamma) at each
update; the last counts the steps. The first show how far ranks are apart; the others, by how much less noise they have
than those of a rank alone, from how many ranks it gains (benchmarks/mixing.py).

This script starts the ranks by mpirun, and is told by files what they do. At some instants all ranks write down their
parameters; their distance to their mean is the consensus distance. `--kill N` kills N ranks in a row, and `--kill node`
all of a node; then it waits until all that live have noticed. The ranks end by themselves and with exit code 3 if some
were killed, as training does.

`--nodes N` has MPICH take this machine for N nodes of equal size (its "cliques"). Between them messages go by the
network, so by the courier, and the board's news too. Couriers rest for longer the more ranks there are, as they share
cores here: the time of a message is longer by that.

The mean distance of independent ranks would grow without bound; that of an all-reduce is 0. Consensus distances are in
units of the noise of a step: sqrt(sum of squares / parameters) / step noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from host import launcher, machine
from simulation import FREE, Straggling

from gala_mpi.storage.checkpoint import CheckpointFolder, Facts
from gala_mpi.storage.turns import next_turn_s

if TYPE_CHECKING:
    from gala_mpi.gossip.roster import Roster

LOST = 3
# Of a row of the board, see gala_mpi.train.board.
AGENT_STEPS = 2
LOOK_EVERY_S = 0.2
# By rank what it says.
Told: TypeAlias = dict[int, dict[str, Any]]
# Apart from what is told: each rank reads this folder again and again.
ORDERS = "orders"
NODE = "node"


@dataclass(frozen=True)
class Setting:
    """What a job of thin ranks is. `parameters` are those of each kind; `straggling` holds up its sleep."""

    ranks: int = 32
    nodes: int = 1
    topology: str = "auto"
    parameters: int = 500
    update_s: float = 0.5
    timeout_s: float = 20.0
    checkpoint_every_s: float = 0.0
    straggling: Straggling = FREE
    seed: int = 1

    @classmethod
    def from_json(cls, text: str) -> Setting:
        """What `to_json` gave."""
        values = json.loads(text)
        return cls(**{**values, "straggling": Straggling(**values["straggling"])})

    def to_json(self) -> str:
        """As an argument of a rank."""
        return json.dumps(asdict(self))


def thin(setting: Setting, folder: Path) -> int:
    """One rank."""
    from mpi4py import MPI

    from gala_mpi.gossip import courier as couriers
    from gala_mpi.gossip.courier import Courier
    from gala_mpi.gossip.gossip import Gossip
    from gala_mpi.gossip.mixing import GAMMA
    from gala_mpi.mpi.waiting import wait_until
    from gala_mpi.train.board import Board

    comm, parameters, timeout_s = MPI.COMM_WORLD, setting.parameters, setting.timeout_s
    couriers.SLEEP_S = courier_rest_s(comm.size)
    rng = np.random.default_rng([setting.seed, comm.rank])
    values = np.zeros(2 * parameters + 1, np.float32)
    kept = np.ones_like(values)
    kept[parameters:-1] = np.sqrt(GAMMA)
    courier = Courier(comm)
    board = Board(comm, courier, timeout_s)
    gossip = Gossip(
        values, comm, setting.topology, neighbour_timeout_s=timeout_s, delivery=courier,
        while_waiting=board.come_by, roster=board.roster,
    )  # fmt: skip
    told: set[str] = set()
    update, first_mix_s, looked_at_s = 0, None, 0.0
    saving = Saving(folder, comm.rank, comm.size, setting.checkpoint_every_s)
    mixing_updates = stale_sum = stale_most = 0

    def tell(name: str, facts: dict[str, Any]) -> None:
        scratch = folder / f".{name}-{comm.rank}"
        scratch.write_text(json.dumps(facts))
        scratch.rename(folder / f"{name}-{comm.rank}.json")

    about = {"pid": os.getpid(), "time_s": time.time(), "topology": gossip.topology.name}
    tell("pid", {**about, "process_s": time.process_time()})
    while "stop" not in told:
        sleep_s = rng.uniform(0.5, 1.5) * setting.update_s
        time.sleep(setting.straggling.one(sleep_s, comm.rank == comm.size - 1, rng))
        values *= kept
        values[:-1] += rng.standard_normal(2 * parameters, np.float32)
        values[-1] += 1.0
        update += 1
        gossip.step(update)
        # In place of steps the time, which tells how old news is.
        board.report(int(1e3 * time.time()), update, gossip.counters.staleness)
        stale = gossip.counters.staleness
        mixing_updates, stale_sum, stale_most = mixing_updates + (not stale), stale_sum + stale, max(stale_most, stale)
        saving.save_if_due(values, update)
        if first_mix_s is None and gossip.counters.messages_mixed:
            first_mix_s = time.time()
        if time.monotonic() - looked_at_s < LOOK_EVERY_S:
            continue
        looked_at_s = time.monotonic()
        for path in (folder / ORDERS).iterdir():
            if path.name in told:
                continue
            told.add(path.name)
            told.add(path.name.split("-")[2])
            counters = gossip.counters
            facts = {"update": update, "mixed": counters.messages_mixed, "sent": counters.messages_sent}
            facts |= {"first_mix_s": first_mix_s, "lost": len(board.lost), "exchange_s": counters.exchange_s}
            facts |= {"in_neighbours": len(gossip.in_neighbours), "detour": gossip.detour, **memory()}
            facts |= {"mixing_updates": mixing_updates, "stale_sum": stale_sum, "stale_most": stale_most}
            facts |= {
                "peers": len(courier._peers),
                "learner_s": time.thread_time(),
                "process_s": time.process_time(),
                "time_s": time.time(),
            }
            facts |= {**saving.counts, **ages(board.roster.rows[:, AGENT_STEPS], comm.rank)}
            facts |= {"board_bytes": board_bytes(board.roster)}
            np.save(folder / f"{path.name}-{comm.rank}.npy", values)
            tell(path.name, facts)
    board.finish()
    gossip.finish()

    def done() -> bool:
        board.come_by()
        return board.all_done

    wait_until(done, 10 * timeout_s)
    tell("end", {"code": LOST if board.lost else 0})
    if board.lost:
        # What is collective does not end any more, as in training.
        sys.stdout.flush()
        os._exit(LOST)
    board.meet()
    met = comm.Ibarrier()

    def together() -> bool:
        board.come_by()
        return bool(met.Test())

    wait_until(together, 10 * timeout_s)
    courier.free()
    gossip.free()
    board.free()
    return 0


def courier_rest_s(ranks: int) -> float:
    """Between two looks of a courier: if all had something to carry, they would look 25,000 times a second at most."""
    return max(0.002, ranks / 25_000)


def board_bytes(roster: Roster) -> int:
    """What this rank has sent for the board to other nodes."""
    outboxes = roster._mailboxes.outboxes.values() if roster._mailboxes is not None else ()
    return roster.rows.nbytes * sum(outbox._number for outbox in outboxes)


def ages(told_ms: np.ndarray, mine: int) -> dict[str, float]:
    """How old the news is that a rank has of the others, in seconds, and of how many it has none."""
    theirs = np.delete(told_ms, mine)
    found = time.time() - theirs[theirs > 0] / 1e3
    return {
        "news_mean_s": float(found.mean()) if found.size else 0.0,
        "news_oldest_s": float(found.max(initial=0.0)),
        "never_heard": int((theirs == 0).sum()),
    }


class Saving:
    """A rank's checkpoints, of which nothing is kept but the last."""

    def __init__(self, folder: Path, rank: int, size: int, every_s: float) -> None:
        self._every_s, self._phase, self._rank, self._size = every_s, rank / size, rank, size
        self.counts = {"checkpoints": 0, "checkpoint_s": 0.0}
        if self._every_s:
            self._due_s = next_turn_s(time.time(), self._every_s, self._phase)
            self._folder = CheckpointFolder(folder, rank)

    def save_if_due(self, values: np.ndarray, update: int) -> None:
        """The parameters and as much again, if it is this rank's turn."""
        if not self._every_s or time.time() < self._due_s:
            return
        begin = time.perf_counter()
        facts = Facts(
            run_id="thin", segment=0, rank=self._rank, size=self._size, update=update, agent_steps=update,
            total_steps=update, episodes=0, time_s=0.0, best_return=0.0, recent=[], counters={}, seconds={},
            neighbours={}, config={},
        )  # fmt: skip
        self._folder.save({"parameters.all": values, "optimiser.all": values}, facts, best=False)
        self._due_s = next_turn_s(time.time(), self._every_s, self._phase)
        self.counts["checkpoints"] += 1
        self.counts["checkpoint_s"] += time.perf_counter() - begin


def memory() -> dict[str, int]:
    """Resident memory of this process, and its part of what is shared among processes, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {"rss_bytes": 1024 * kib["Rss"], "pss_bytes": 1024 * kib["Pss"]}


@dataclass(frozen=True)
class Seen:
    """What all ranks that live told at about one time: facts, and their parameters (ranks, 2 n + 1)."""

    facts: dict[int, dict[str, Any]]
    vectors: np.ndarray

    @property
    def distance(self) -> float:
        """The consensus distance of those that keep their noise, a parameter's."""
        kept = self.vectors[:, : self.vectors.shape[1] // 2]
        return float(np.sqrt(np.mean(np.square(kept - kept.mean(axis=0)))))

    @property
    def variance(self) -> float:
        """Of those that forget their noise."""
        return float(np.mean(np.square(self.vectors[:, self.vectors.shape[1] // 2 : -1])))

    @property
    def steps(self) -> float:
        """The mean of all counts of steps."""
        return float(self.vectors[:, -1].mean())

    @property
    def updates(self) -> float:
        """Mean number of updates of a rank."""
        return statistics.mean(facts["update"] for facts in self.facts.values())


class Job:
    """Thin ranks under mpirun, as this script sees them."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self._setting, self._folder, self._orders = setting, folder, 0
        (folder / ORDERS).mkdir()
        self.dead: set[int] = set()
        about = subprocess.run([launcher(), "--version"], capture_output=True, text=True, check=True).stdout
        self._open_mpi = "Open MPI" in about or "OpenRTE" in about
        options = ["--oversubscribe", "--enable-recovery"] if self._open_mpi else ["-disable-auto-cleanup"]
        outlive = Path(__file__).resolve().parent.parent / "jobs" / "outlive.sh"
        command = [launcher(), *options, "-n", str(setting.ranks)]
        command += [] if self._open_mpi else ["sh", str(outlive)]
        command += [sys.executable, __file__, "--thin", setting.to_json(), "--folder", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if setting.nodes > 1:
            if self._open_mpi or setting.ranks % setting.nodes:
                sys.exit(f"{setting.nodes} nodes: they take MPICH, and ranks in a number that they divide")
            environment |= {"MPIR_CVAR_NUM_CLIQUES": str(setting.nodes), "MPIR_CVAR_CLIQUES_BY_BLOCK": "1"}
            # By TCP, as between hosts. UCX ends a rank that has a message under way to one that dies.
            environment |= {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
        self.begun_s = time.time()
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)

    def gather(self, name: str, deadline_s: float) -> dict[int, dict[str, Any]]:
        """What all that live have told under this name."""
        end = time.monotonic() + deadline_s
        found: dict[int, dict[str, Any]] = {}
        while True:
            ended = self.process.poll() is not None or time.monotonic() > end
            for path in self._folder.glob(f"{name}-*.json"):
                rank = int(path.stem.rsplit("-", 1)[1])
                if rank not in found and rank not in self.dead:
                    found[rank] = json.loads(path.read_text())
            if len(found) == self._setting.ranks - len(self.dead):
                return found
            if ended:
                self.end()
                living = self._setting.ranks - len(self.dead)
                sys.exit(f"{name}: {len(found)} of {living} ranks within {deadline_s:g} s")
            time.sleep(0.2)

    def order(self, what: str, deadline_s: float) -> Seen:
        """All that live look, and tell."""
        self._orders += 1
        name = f"order-{self._orders}-{what}"
        (self._folder / ORDERS / name).touch()
        facts = self.gather(name, deadline_s)
        vectors = [np.load(self._folder / f"{name}-{rank}.npy") for rank in facts]
        return Seen(facts, np.array(vectors, float))

    def looks(
        self, before: int, counted: int, *, at_least: int, rest_s: float, deadline_s: float, longest_s: float
    ) -> list[Seen]:
        """Looks over `counted` updates or more, once all ranks have had `before` of them; then the ranks end."""
        about, end = f"{self._setting.topology}, {self._setting.ranks} ranks", time.monotonic() + longest_s
        seen: list[Seen] = []
        while len(seen) < at_least or seen[-1].updates - seen[0].updates < counted:
            if time.monotonic() > end:
                sys.exit(f"{about}: not done within {longest_s:g} s")
            look = self.order("look", deadline_s)
            if any(facts["lost"] for facts in look.facts.values()):
                sys.exit(f"{about}: some rank was lost; take a longer --timeout-s")
            if min(facts["update"] for facts in look.facts.values()) >= before:
                seen.append(look)
            time.sleep(rest_s)
        _, code = self.stop(deadline_s)
        if code:
            sys.exit(f"{about}: exit code {code}")
        return seen

    def kill(self, what: int | str, pids: dict[int, int]) -> int:
        """Kill so many ranks in a row, from a quarter of those that live on, or the last node; how many those are."""
        living = sorted(pids.keys() - self.dead)
        per_node = self._setting.ranks // self._setting.nodes
        first, number = (
            (living[-1] // per_node * per_node, per_node) if what == NODE else (living[len(living) // 4], what)
        )
        doomed = [rank for rank in living if rank >= first][: int(number)]
        for rank in doomed:
            os.kill(pids[rank], signal.SIGKILL)
            self.dead.add(rank)
        return len(doomed)

    def stop(self, deadline_s: float) -> tuple[set[int], int]:
        """Have the ranks end by themselves: the codes that they tell, and the launcher's."""
        self.order("stop", deadline_s)
        codes = {facts["code"] for facts in self.gather("end", deadline_s).values()}
        return codes, self.process.wait(deadline_s)

    def end(self) -> None:
        """Whatever goes on."""
        if self.process.poll() is None:
            # Of the launcher's own group; ranks may have others, and end when they find nobody to hear them.
            os.killpg(self.process.pid, signal.SIGKILL)


def killed(text: str) -> int | str:
    """What --kill takes."""
    return text if text == NODE else int(text)


@contextlib.contextmanager
def running(setting: Setting) -> Iterator[Job]:
    """A job, of which nothing is left behind."""
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(setting, Path(scratch))
        try:
            yield job
        finally:
            job.end()


def observe(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """What a job does, from its start to its end; prints what it finds as it goes on."""
    started = job.gather("pid", args.deadline_s)
    pids = {rank: facts["pid"] for rank, facts in started.items()}
    start_s = max(facts["time_s"] for facts in started.values()) - job.begun_s
    print(f"{args.ranks} ranks, {started[0]['topology']}: all have started within {start_s:.1f} s", flush=True)
    acts: list[dict[str, Any]] = []
    for what in (0, *args.kill):
        number = job.kill(what, pids)
        dead = len(job.dead)
        knowing = until(job, args, partial(all_know_of, dead), f"know of all {dead} that are lost")
        until(job, args, partial(all_have_mixed_since, knowing), "have mixed since")
        time.sleep(args.settle_s)
        seen = [job.order("look", args.deadline_s) for _ in range(args.looks + 1)]
        facts = seen[-1].facts
        acts.append(act(number, dead, knowing, facts, [one.distance for one in seen]))
        print(json.dumps(acts[-1]), flush=True)
    # Of the codes of all ranks, killed ones among them, launchers make one each in their way.
    codes, _ = job.stop(args.deadline_s)
    first_mix_s = max(f["first_mix_s"] for f in facts.values()) - job.begun_s
    about = {"ranks": args.ranks, "nodes": args.nodes, "topology": started[0]["topology"], "start_s": round(start_s, 1)}
    return {**about, "first_mix_of_all_s": round(first_mix_s, 1), "acts": acts, "exit_codes": sorted(codes)}


def all_know_of(dead: int, facts: Told) -> bool:
    """Whether all that live know of so many that are lost."""
    return all(f["lost"] == dead for f in facts.values())


def all_have_mixed_since(before: Told, facts: Told) -> bool:
    """Whether each has mixed a message since then."""
    return all(f["mixed"] > before[rank]["mixed"] for rank, f in facts.items())


def until(job: Job, args: argparse.Namespace, holds: Callable[[Told], bool], what: str) -> Told:
    """Look again and again until that holds for what all tell, which is returned; else this script ends."""
    end = time.monotonic() + args.deadline_s
    while True:
        time.sleep(args.settle_s)
        facts = job.order("look", args.deadline_s).facts
        if holds(facts):
            return facts
        if time.monotonic() > end:
            sys.exit(f"not all ranks that live {what} within {args.deadline_s:g} s")


def act(
    killed: int,
    dead: int,
    knowing: Told,
    facts: Told,
    distances: list[float],
) -> dict[str, Any]:
    """What was seen after so many were killed, `dead` in all, from where all that live were `knowing` of it."""

    def per_update(what: str) -> list[float]:
        return [(f[what] - knowing[rank][what]) / (f["update"] - knowing[rank]["update"]) for rank, f in facts.items()]

    return {
        "killed": killed,
        "living": len(facts),
        "lost": dead,
        "know_of_all_lost": sum(f["lost"] == dead for f in facts.values()),
        "consensus_distance": round(statistics.median(distances), 3),
        "consensus_distances": [round(distance, 3) for distance in distances],
        "mixed_per_update": round(statistics.mean(per_update("mixed")), 3),
        "least_mixed_per_update": round(min(per_update("mixed")), 3),
        "sent_per_update": round(statistics.mean(per_update("sent")), 3),
        "detours": sum(f["detour"] != [None, None] for f in facts.values()),
        "rss_mib": round(statistics.mean(f["rss_bytes"] for f in facts.values()) / 2**20, 1),
        "pss_mib": round(statistics.mean(f["pss_bytes"] for f in facts.values()) / 2**20, 1),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Setting()
    parser.add_argument("--ranks", type=int, default=usual.ranks)
    parser.add_argument("--nodes", type=int, default=usual.nodes, help="as which MPICH takes this machine")
    parser.add_argument(
        "--kill", type=killed, action="append", default=[], help=f"so many more ranks, or {NODE}: one act after another"
    )
    parser.add_argument("--topology", default=usual.topology)
    parser.add_argument("--parameters", type=int, default=usual.parameters, help="of each kind")
    parser.add_argument("--update-s", type=float, default=usual.update_s, help="mean sleep of an update")
    parser.add_argument("--checkpoint-every-s", type=float, default=usual.checkpoint_every_s, help="0: none")
    parser.add_argument("--timeout-s", type=float, default=usual.timeout_s, help="silence after which a rank is lost")
    parser.add_argument("--settle-s", type=float, default=20.0, help="between acts, before distances are taken")
    parser.add_argument("--looks", type=int, default=4, help="distances of an act, beside the last")
    parser.add_argument("--deadline-s", type=float, default=300.0, help="of whatever is waited for")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--thin", type=Setting.from_json, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.thin is not None:
        return thin(args.thin, args.folder)
    if args.ranks < 2 or (NODE in args.kill and args.nodes < 2):
        parser.error(f"--ranks: expected two or more, and --nodes too where --kill is {NODE}")
    setting = Setting(
        args.ranks, args.nodes, args.topology, args.parameters, args.update_s, args.timeout_s, args.checkpoint_every_s,
        seed=args.seed,
    )  # fmt: skip
    with running(setting) as job:
        found = observe(job, args)
    print(json.dumps({key: value for key, value in found.items() if key != "acts"}), flush=True)
    if args.out is not None:
        about = {"command": "python " + " ".join(sys.argv), "machine": f"{machine()}, shared with other work"}
        args.out.write_text(json.dumps({**about, **found}, indent=1) + "\n")
    return int(found["exit_codes"] != [LOST if args.kill else 0])


if __name__ == "__main__":
    sys.exit(main())
