"""How the costs of an exchange are shown: the summary, which is the JSON, and the same as tables."""

from __future__ import annotations

import io
import shutil
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from gala_mpi.bench.costs import (
    ALL,
    ALLREDUCE,
    AVERAGE,
    DELIVERY,
    EXCHANGE,
    GLOO,
    MEMCPY,
    MIX,
    NAMES,
    ONE,
    PACK,
    POST,
    Costs,
    Timing,
)

# What is held against what. The bounds are this project's own, for 2 ranks of a node and 1.68 M float32 parameters.
RATIOS = ((POST, MEMCPY, 1.3), (MIX, AVERAGE, 1.5), (EXCHANGE, ALLREDUCE, 0.25), (EXCHANGE, GLOO, None))
# Share of the rounds with a preemption from which on a median is not the machine's own.
BUSY = 0.2
CPU_OF = (EXCHANGE, ALLREDUCE, GLOO)


def summary(costs: Costs, missing: Mapping[str, str]) -> dict[str, Any]:
    """Medians, quartiles, ratios of the medians and the raw times of one size. `missing`: name -> why not measured.

    Ratios are {numerator, denominator, bound, one, all}; what is not measured is None.
    """
    shown = {
        name: {mode: _figures(costs.timings[name, mode]) for mode in (ONE, ALL) if (name, mode) in costs.timings}
        for name in NAMES
    }
    ratios = []
    for numerator, denominator, bound in RATIOS:
        # An all-reduce, which has one mode, is what either mode of an exchange stands beside.
        below = {mode: shown[denominator].get(mode, shown[denominator].get(ALL)) for mode in (ONE, ALL)}
        modes = {mode: _quotient(shown[numerator].get(mode), below[mode]) for mode in (ONE, ALL)}
        ratios.append({"numerator": numerator, "denominator": denominator, "bound": bound, **modes})
    return {
        "parameters": costs.parameters,
        "message_bytes": costs.message_bytes,
        "ways": [list(ways) for ways in costs.ways],
        "rounds": len(costs.timings[MEMCPY, ALL]),
        "mixed": costs.mixed,
        "costs": shown,
        "not_measured": {name: missing.get(name, "one rank has no neighbour") for name in NAMES if not shown[name]},
        "ratios": ratios,
    }


def _figures(timings: Sequence[Timing]) -> dict[str, Any]:
    times = [timing.wall_s for timing in timings]
    first, median, third = np.percentile(times, [25, 50, 75]).tolist()
    return {
        "median_s": median,
        "quartile_1_s": first,
        "quartile_3_s": third,
        "cpu_s": statistics.median(timing.cpu_s for timing in timings),
        "preempted": statistics.mean(timing.preempted > 0 for timing in timings),
        "times_s": times,
    }


def _quotient(above: Mapping[str, Any] | None, below: Mapping[str, Any] | None) -> float | None:
    return above["median_s"] / below["median_s"] if above and below else None


def as_text(job: Mapping[str, Any], sizes: Sequence[Mapping[str, Any]]) -> str:
    """All sizes as tables, under what they share."""
    said = io.StringIO()
    console = Console(file=said, width=max(88, shutil.get_terminal_size().columns))
    for line in _heading(job):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for size in sizes:
        console.print(_table(size))
    for why, names in _by_reason(sizes).items():
        console.print(f"not measured: {', '.join(names)} ({why})", markup=False, highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in said.getvalue().rstrip().splitlines())


def _heading(job: Mapping[str, Any]) -> list[str]:
    lines = [
        f"gala-mpi bench: {job['ranks']} rank(s) on {job['nodes']} node(s), {job['topology']}, wire {job['wire']}, "
        f"delivery {job['delivery']}, {job['mpi_library']}"
    ]
    lines += [f"OVERSUBSCRIBED: {said}; times hold the wait for a core" for said in job["oversubscribed"]]
    lines.append("median (quartiles) of a call; CPU: of the whole process, its courier included;")
    lines.append(f"*: other processes took the core from at least {BUSY:.0%} of the calls")
    return lines


def _by_reason(sizes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Reason -> what was not measured for it at some size."""
    found: dict[str, list[str]] = {}
    for name in NAMES:
        for why in {size["not_measured"][name] for size in sizes if name in size["not_measured"]}:
            found.setdefault(why, []).append(name)
    return found


def _table(size: Mapping[str, Any]) -> Table:
    ways = sorted({way for ways in size["ways"] for way in ways})
    how = f", {' and '.join(ways)}" if ways else ""
    mixed = size["mixed"]
    if mixed is not None and mixed < 1:
        how += f"; only {mixed:.0%} of the messages were mixed"
    title = f"{size['parameters']:,} parameters, messages of {size['message_bytes'] / 1e6:.3g} MB{how}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("one rank at work", "all ranks at once", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in NAMES:
        figures = size["costs"][name]
        if figures or name not in (PACK, DELIVERY):
            table.add_row(name, *(_time(figures.get(mode)) for mode in (ONE, ALL)), "")
    for name in CPU_OF:
        figures = size["costs"][name]
        if not figures:
            continue
        table.add_row(f"CPU, {name}", *(_cpu(figures.get(mode)) for mode in (ONE, ALL)), "")
    table.add_section()
    for ratio in size["ratios"]:
        cells = [_ratio(ratio[mode], ratio["bound"]) for mode in (ONE, ALL)]
        bound = "" if ratio["bound"] is None else f"{ratio['bound']:g}"
        table.add_row(f"{ratio['numerator']} / {ratio['denominator']}", *cells, bound)
    return table


def _time(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    median, first, third = (_digits(figures[key]) for key in ("median_s", "quartile_1_s", "quartile_3_s"))
    return f"{median} us ({first}-{third}){'*' if figures['preempted'] >= BUSY else ' '}"


def _cpu(figures: Mapping[str, Any] | None) -> str:
    return "-" if figures is None else f"{_digits(figures['cpu_s'])} us "


def _digits(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}" if seconds >= 1e-5 else f"{1e6 * seconds:.2g}"


def _ratio(value: float | None, bound: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if bound is None else f"{value:.2f} {'within' if value <= bound else 'ABOVE'}"
