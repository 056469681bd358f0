"""Loaders of a run's folder under inputs that no run wrote: each must be read, or refused in the way that it says.

    python benchmarks/fuzz.py --inputs 1_000_000 --out benchmarks/results/fuzz.json

Checkpoints, their facts and configurations are valid ones with random damage: bytes changed, cut out, doubled, numbers
and names exchanged for extreme ones, and headers that lie about sizes and shapes, with a digest that fits. HDF5 files
(one input in 200, as they take longer) are damaged likewise and read by the analysis in processes of their own, since
HDF5 itself may crash or not return: such ends are counted apart. Memory is bounded, so that what asks for more fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "analysis")]

from test_checkpoint import FACTS, TENSORS, WHOLE  # noqa: E402

from gala_mpi.checkpoint import Facts, decode, encode  # noqa: E402
from gala_mpi.config import ConfigError, RecordConfig, load_preset, read_config  # noqa: E402
from gala_mpi.run_folder import as_toml  # noqa: E402

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
    import numpy as np

    from gala_mpi.recorder import Recorder
    from gala_mpi.schema import TABLES

    path = folder / "whole.h5"
    about = {"run_id": "a", "rank": 0, "size": 1, "env_id": "Task-v0", "config": {}, "t0": 0.0}
    resumed = {"time_s": 1.0, "agent_steps": 5, "updates": [3], "update": 3, "size": 1}
    recorder = Recorder(path, {**about, "resumed": resumed}, RecordConfig(sketch_dimension=4), 1)
    for table in TABLES:
        for row in range(20):
            values = [np.ones(4) if column.name == "sketch" else row for column in table.columns]
            recorder.append(table.name, tuple(values))
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
    }
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
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, shared with other work",
            "seconds": round(time.monotonic() - begin),
        }
        args.out.write_text(json.dumps({**about, "totals": totals, "wrong": wrong}, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
