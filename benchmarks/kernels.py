"""How far the kernels are from the speed of memory, on one thread.

    python benchmarks/kernels.py --out kernels.json

The yardstick is `average`, which reads two float32 values and writes one, 12 bytes, and does nothing else. A ratio is
a kernel's time, divided by the time the yardstick would take for as many bytes; the bytes of a kernel are those that
it cannot do without: `mix` reads each message once and reads and writes the state, whatever it does in fact.

All memory begins at a multiple of 64 bytes, as PyTorch's does and the slots of a window do: 16 bytes further on, where
NumPy's begins, `mix` of one message is slower by a third, as each of the widest loads touches two cache lines.

All kernels run in turn, forwards and backwards alternately, each on a fresh state and once without the clock before
it is timed, so that the caches hold what they can hold of its operands. Prints the median time, the median over the
rounds of the ratio within a round, and the ratio of the shortest times, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gala_mpi import _native

YARDSTICK = "average"
MESSAGES = (1, 2, 4)


@dataclass(frozen=True)
class Case:
    """One kernel on its operands: `call` moves at least `moved_bytes`."""

    call: Callable[[], object]
    moved_bytes: int


@dataclass(frozen=True)
class Figures:
    """What was measured of one kernel; the ratios are to the yardstick for as many bytes."""

    median_s: float
    ratio: float
    ratio_of_shortest: float
    times_s: list[float]


def aligned(data: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 64 bytes."""
    memory = np.zeros(data.nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    place = memory[begin : begin + data.nbytes].view(data.dtype)
    place[:] = data
    return place


def build_cases(count: int, start: np.ndarray, state: np.ndarray) -> dict[str, Case]:
    """All kernels on `count` float32 values; they read random messages and write to `state` or to their own memory."""
    rng = np.random.default_rng(1)
    sources = [aligned(rng.random(count, np.float32)) for _ in range(max(MESSAGES))]
    copy = aligned(state)
    cases = {
        "copyto": Case(partial(np.copyto, copy, start), 8 * count),
        YARDSTICK: Case(partial(_native.average, state, sources[0]), 12 * count),
    }
    for wire, itemsize in _native.WIRE_ITEMSIZE.items():
        payloads = [aligned(np.zeros(count * itemsize, np.uint8)) for _ in sources]
        for source, payload in zip(sources, payloads, strict=True):
            _native.pack([source], payload, wire)
        out = aligned(payloads[0])
        for number in MESSAGES:
            # With weights of opposite sign the state does not come near the messages, however often it is mixed.
            weights = [0.5 / number] * number
            mix = partial(_native.mix, state, -0.5, payloads[:number], weights, wire)
            cases[f"mix {number} {wire}"] = Case(mix, (8 + number * itemsize) * count)
        cases[f"pack {wire}"] = Case(partial(_native.pack, [start], out, wire), (4 + itemsize) * count)
        cases[f"all_finite {wire}"] = Case(partial(_native.all_finite, payloads[0], wire), itemsize * count)
    return cases


def measure(count: int, seconds: float) -> dict[str, Figures]:
    """Times and ratios of each case: as many rounds as fit into `seconds`, and five at the least."""
    start = aligned(np.random.default_rng(0).random(count, np.float32))
    state = aligned(start)
    cases = build_cases(count, start, state)
    times: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(times[YARDSTICK]) < 5:
        for name in order:
            np.copyto(state, start)
            cases[name].call()
            begun = time.perf_counter()
            cases[name].call()
            times[name].append(time.perf_counter() - begun)
        order.reverse()
    found = {}
    for name, case in cases.items():
        share = cases[YARDSTICK].moved_bytes / case.moved_bytes
        ratios = [share * own / other for own, other in zip(times[name], times[YARDSTICK], strict=True)]
        shortest = share * min(times[name]) / min(times[YARDSTICK])
        found[name] = Figures(statistics.median(times[name]), statistics.median(ratios), shortest, times[name])
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[870_000, 1_680_000, 16_000_000])
    parser.add_argument("--seconds", type=float, default=10, help="time for each count of values")
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    args = parser.parse_args()
    results = {}
    for count in args.counts:
        found = measure(count, args.seconds)
        results[str(count)] = {name: asdict(row) for name, row in found.items()}
        yardstick = found[YARDSTICK]
        speed = 12 * count / yardstick.median_s / 1e9
        print(f"{count:,} values, {len(yardstick.times_s)} rounds, yardstick at {speed:.1f} GB/s")
        for name, row in found.items():
            ratios = f"{row.ratio:6.2f} x the yardstick ({row.ratio_of_shortest:.2f} of the shortest)"
            print(f"  {name:20s} {row.median_s * 1e6:10.1f} us {ratios}", flush=True)
    if args.out:
        settings = {**vars(args), "out": None, "cpus": os.cpu_count(), "machine": platform.machine()}
        args.out.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
