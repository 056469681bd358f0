"""Loaders of a run's folder under inputs that no run wrote: each must be read, or refused in the way that it says.

    python benchmarks/fuzz.py --inputs 1_000_000 --out benchmarks/results/fuzz.json

Checkpoints, their facts and configurations are valid ones with random damage: bytes changed, cut out, doubled, numbers
and names exchanged for extreme ones, and headers that lie about sizes and shapes, with a digest that fits. States of
networks, streams and simulators that are not what a run wrote are taken over under such a digest, and a rollout is
played with them. So are the other small files of a run's folder, and names in it. HDF5 files
(one input in 200, as they take longer) are damaged likewise and read by the analysis in processes of their own, since
HDF5 itself may crash or not return: such ends are counted apart. Memory is bounded, so that what asks for more fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "storage"), str(ROOT / "analysis")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from host import machine  # noqa: E402
from test_checkpoint import FACTS, TENSORS, WHOLE  # noqa: E402

from gala_mpi.config import ConfigError, EnvironmentConfig, RecordConfig, load_preset, read_config  # noqa: E402
from gala_mpi.gossip.parameters import FlatParameters  # noqa: E402
from gala_mpi.learning.environments import Episode, make_simulators  # noqa: E402
from gala_mpi.learning.networks import MLPPolicy  # noqa: E402
from gala_mpi.learning.rollout import Collector  # noqa: E402
from gala_mpi.stopwatch import Stopwatch  # noqa: E402
from gala_mpi.storage import lease  # noqa: E402
from gala_mpi.storage.checkpoint import Checkpoint, CheckpointError, Facts, decode, encode  # noqa: E402
from gala_mpi.storage.lease import LEASE_FILE, LeaseError, check_free  # noqa: E402
from gala_mpi.storage.resume import Resumption  # noqa: E402
from gala_mpi.storage.run_folder import as_toml, run_id_of, segments  # noqa: E402
from gala_mpi.train.checkpointer import Checkpointer, Identity, expect  # noqa: E402

MEMORY_BYTES = 8 * 2**30
EXTREME = (
    "-1",
    "0",
    "1e400",
    "NaN",
    "9" * 30,
    "9" * 5000,
    "true",
    "null",
    '"x"',
    "[]",
    "{}",
    '"../../x"',
    "2.5",
    "[[",
    "\\u0000",
)
# Of HDF5: inputs a process reads, and seconds that it may take for all of them.
BATCH, BATCH_S = 50, 60


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a few faults, where they are not zero: most of an HDF5 file is room for rows."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        if not made:
            break
        place = chance.randrange(len(made))
        while made[place] == 0 and chance.random() < 0.99:
            place = chance.randrange(len(made))
        match chance.randrange(6):
            case 0:
                made[place] = chance.randrange(256)
            case 1:
                made[place] ^= 1 << chance.randrange(8)
            case 2:
                del made[place : place + chance.randrange(1, 40)]
            case 3:
                made[place:place] = made[place : place + chance.randrange(1, 40)]
            case 4:
                made[place : place + 8] = chance.choice((0, 1, 2**63, 2**64 - 1, 2**32)).to_bytes(8, "little")
            case 5:
                del made[place:]
    return bytes(made)


def altered_text(text: str, chance: random.Random) -> str:
    """The text with a few of its words or values exchanged for others."""
    parts = text.replace(",", " , ").replace(":", " : ").split(" ")
    for _ in range(chance.choice((1, 1, 2, 4))):
        parts[chance.randrange(len(parts))] = chance.choice((*EXTREME, chance.choice(parts)))
    return " ".join(parts)


def try_checkpoint(chance: random.Random) -> str:
    """Bytes of a checkpoint with faults, mostly in the header."""
    data = damaged(WHOLE, chance)
    if chance.random() < 0.5:
        length = int.from_bytes(WHOLE[:8], "little")
        header = altered_text(WHOLE[8 : 8 + length].decode(), chance).encode()
        data = len(header).to_bytes(8, "little") + header + WHOLE[8 + length :]
    try:
        decode(data)
    except ValueError:
        return "refused"
    return "read"


def try_facts(chance: random.Random) -> str:
    """Facts with faults, under a digest that fits."""
    text = altered_text(FACTS.to_json(), chance)
    forged = dataclasses.replace(FACTS)
    object.__setattr__(forged, "to_json", lambda: text)
    try:
        facts, _ = decode(encode(TENSORS, forged))
    except ValueError:
        return "refused"
    assert isinstance(facts, Facts) and facts.update >= 0
    return "read"


@dataclasses.dataclass
class Counters:
    """As those of an exchange, which would start MPI."""

    messages_sent: int = 0
    message_age_s: float = math.nan


class Rank:
    """What a rank without MPI gives its state to, and takes it from."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.simulators = make_simulators(EnvironmentConfig(env="Acrobot-v1", simulators=2), 1)
        policy = MLPPolicy(6, [8], 3, generator)
        self.flat = FlatParameters(policy)
        self.collector = Collector(self.simulators, policy, 2, 1, generator)
        self.learner = SimpleNamespace(state={"mean_square": torch.ones_like(self.flat.data)})
        self.stopwatch = Stopwatch()
        self.exchange = SimpleNamespace(
            counters=Counters(), in_neighbours=[], synchronous=False, go_on_from=self.take_heard
        )
        self.board = SimpleNamespace(go_on_from=self.take_steps, note_episodes=self.take_episodes, total_steps=0)
        self.counts = np.zeros(4, np.int64)

    def take_heard(self, update: int, heard: dict[int, int]) -> None:
        """As an exchange does."""
        self.counts[0] = max([update, *heard.values()])

    def take_steps(self, agent_steps: list[int], update: int, episodes: int) -> None:
        """As a board does, in integers of 64 bits."""
        self.counts[1:] = agent_steps[0], update, episodes

    def take_episodes(self, episodes: list[Episode]) -> None:
        """As a board does."""
        np.zeros(1)[0] = sum(episode.episode_return for episode in episodes)


@functools.cache
def a_rank() -> tuple[Rank, Checkpointer, dict[str, np.ndarray]]:
    """A rank, its checkpointer, and the tensors of a valid checkpoint of it."""
    rank = Rank()
    folder: Any = SimpleNamespace(best_return=lambda *_: 0.0)
    identity = Identity(FACTS.run_id, 1, 0, 2, {})
    checkpointer = Checkpointer(folder, cast("Any", rank), identity, 300.0)
    return rank, checkpointer, {name: np.array(values) for name, values in checkpointer._tensors().items()}


EXTREME_NUMBERS = (0, -1, 1, 30, -30, 1e6, 1e7, 1e30, 1e300, math.inf, -math.inf, math.nan, 2**31, 2**62)


def altered_tensor(values: np.ndarray, chance: random.Random) -> np.ndarray:
    """The array with other numbers, of another shape, or of another kind."""
    made = values.copy()
    with np.errstate(all="ignore"):
        match chance.randrange(5):
            case 0 | 1 if made.size:
                made.flat[chance.randrange(made.size)] = np.array(chance.choice(EXTREME_NUMBERS)).astype(made.dtype)
            case 2:
                made = np.resize(made, chance.choice(((), (0,), (1,), (made.size + 1,), (2, 2), made.shape[::-1])))
            case 3:
                made = made.astype(chance.choice((np.float64, np.float32, np.int64, np.uint8, np.bool_)))
            case _:
                made = np.full_like(made, np.array(chance.choice(EXTREME_NUMBERS)).astype(made.dtype))
    return made


def try_restore(chance: random.Random) -> str:
    """State that is not what a run wrote, under a digest that fits: taken over, and a rollout played with it."""
    rank, checkpointer, whole = a_rank()
    tensors = dict(whole)
    for _ in range(chance.choice((1, 1, 2, 5))):
        name = chance.choice(list(tensors))
        if chance.random() < 0.1:
            del tensors[name]
        else:
            tensors[name] = altered_tensor(tensors[name], chance)
    if chance.random() < 0.1:
        stream = tensors["actions.stream"] = whole["actions.stream"].copy()
        stream[8:12] = np.array([chance.randrange(626)], np.int32).view(np.uint8)
        stream[16:24] = np.array([chance.randrange(626)], np.int64).view(np.uint8)
    forged = dataclasses.replace(FACTS)
    if chance.random() < 0.3:
        text = altered_text(FACTS.to_json(), chance)
        object.__setattr__(forged, "to_json", lambda: text)
    try:
        facts, found = decode(encode(tensors, forged))
        checkpoint = Checkpoint(facts, found, Path("forged"))
        expect(rank.flat, rank.learner, FACTS.run_id, checkpoint)
    except (ValueError, CheckpointError):
        return "refused"
    steps = [facts.agent_steps, facts.agent_steps]
    checkpointer.restore(Resumption(checkpoint, checkpoint, True, 2, steps, [facts.update] * 2, facts.time_s))
    # Words that are left and the next one: of a generator that draws from beyond its 624 they make another number.
    stream = rank.collector.state()["actions.stream"]
    assert int(stream[8:12].view(np.int32)[0]) + int(stream[16:24].view(np.int64)[0]) in (1, 625)
    rollout = rank.collector.collect()
    counters = np.array([value for value in vars(rank.exchange.counters).values() if type(value) is int], np.int64)
    assert np.isfinite(rollout.rewards.numpy()).all() and (counters >= 0).all()
    return "read"


def try_folder(chance: random.Random) -> str:
    """The small files of a run's folder with faults, and names that are nearly those of a run."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        folder = Path(place)
        texts = {"run.json": json.dumps({"run_id": "0" * 32, "started": "now"})}
        texts[LEASE_FILE] = json.dumps({"run_id": "0" * 32, "segment": 3, "ended": True})
        for name, text in texts.items():
            kinds = (text.encode(), altered_text(text, chance).encode(), damaged(text.encode(), chance))
            (folder / name).write_bytes(chance.choice(kinds))
        for name in ("config.2.toml", "segment-1", "checkpoints"):
            made = altered_text(name, chance).replace("/", "").replace("\0", "")[:100]
            if made.strip("."):
                (folder / made).write_bytes(b"")
        assert all(number >= 0 for number in segments(folder))
        try:
            run_id_of(folder)
            check_free(folder, 1)
        except (ConfigError, LeaseError):
            return "refused"
    return "read"


PRESETS = [as_toml(load_preset(name)) for name in ("gala-atari", "cartpole")]


def try_config(chance: random.Random) -> str:
    """A configuration with faults."""
    text = chance.choice(PRESETS)
    text = (
        altered_text(text, chance) if chance.random() < 0.5 else damaged(text.encode(), chance).decode(errors="replace")
    )
    try:
        read_config(text, "resume", "run")
    except ConfigError:
        return "refused"
    return "read"


def _read_files(seed: int, whole: bytes, folder: str, said: Any) -> None:
    """Read damaged HDF5 files; tells what became of each."""
    import runs
    from consensus import distances
    from learning_curves import curve
    from runs import RunError, read_run

    runs.DEADLINE_S = 5.0
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    chance = random.Random(seed)
    for number in range(BATCH):
        run = Path(folder) / f"{seed}-{number}"
        run.mkdir()
        (run / "rank-00000.h5").write_bytes(damaged(whole, chance))
        try:
            found = read_run(run)
            for table in ("updates", "episodes", "sketches", "neighbours"):
                found.table(table)
            curve(found, 10)
            distances(found)
            said.send("read")
        except RunError:
            said.send("refused")
        except BaseException:
            said.send(f"error: {traceback.format_exc()[-1500:]}")
        (run / "rank-00000.h5").unlink()
        run.rmdir()
    said.close()


def try_files(seed: int, whole: bytes, folder: str) -> list[str]:
    """What became of a batch of HDF5 files."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read_files, args=(seed, whole, folder, sender))
    process.start()
    sender.close()
    found: list[str] = []
    end = time.monotonic() + BATCH_S
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            found.append(receiver.recv())
        found.append("HDF5 did not return")
        process.kill()
    except EOFError:
        process.join(10)
        if process.exitcode:
            found.append(f"HDF5 ended the process ({process.exitcode})")
    process.join(10)
    return found


def whole_file(folder: Path) -> bytes:
    """A valid file of a rank, with rows in every table."""
    from gala_mpi.storage.recorder import Recorder
    from gala_mpi.storage.schema import TABLES

    path = folder / "whole.h5"
    about = {"run_id": "a", "rank": 0, "size": 1, "env_id": "Task-v0", "config": {}, "t0": 0.0}
    resumed = {"time_s": 1.0, "agent_steps": 5, "updates": [3], "update": 3, "size": 1}
    recorder = Recorder(path, {**about, "resumed": resumed}, RecordConfig(sketch_dimension=4), 1)
    for table in TABLES:
        for row in range(20):
            values = {column.name: np.ones(4) if column.name == "sketch" else row for column in table.columns}
            recorder.append(table.name, **values)
    recorder.close()
    return path.read_bytes()


def main() -> int:
    """The command line; exit code 1 if an input did what it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the counts to this JSON file")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    loaders: dict[str, Callable[[random.Random], str]] = {
        "checkpoint": try_checkpoint,
        "facts": try_facts,
        "configuration": try_config,
        "state": try_restore,
        "folder": try_folder,
    }
    # Whoever finds a lease that was not given back would wait.
    lease.WAIT_S = 0.0
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*loaders, "metrics")}
    wrong: list[str] = []
    begin = time.monotonic()
    files = max(args.inputs // 200, BATCH)
    for number in range(args.inputs - files):
        name = list(loaders)[number % len(loaders)]
        seed = f"{args.seed}-{number}"
        try:
            counts[name][loaders[name](random.Random(seed))] += 1
        except Exception:
            wrong.append(f"{name}, seed {seed}: {traceback.format_exc()[-1500:]}")
        if number % 50_000 == 49_999:
            print(f"{number + 1:,} inputs, {time.monotonic() - begin:.0f} s, {len(wrong)} wrong", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        whole = whole_file(Path(scratch))
        while counts["metrics"].total() < files:
            for result in try_files(1000 * args.seed + counts["metrics"].total(), whole, scratch):
                kind, _, text = result.partition(": ")
                counts["metrics"][kind] += 1
                if kind == "error":
                    wrong.append(f"metrics: {text}")
    totals = {name: dict(count) for name, count in counts.items()}
    print(json.dumps(totals, indent=1))
    for text in wrong[:20]:
        print(text)
    if args.out:
        about = {
            "command": f"python benchmarks/fuzz.py --inputs {args.inputs} --seed {args.seed}",
            "machine": f"{machine()}, shared with other work",
            "seconds": round(time.monotonic() - begin),
        }
        args.out.write_text(json.dumps({**about, "totals": totals, "wrong": wrong}, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
