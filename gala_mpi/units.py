"""Numbers, with their units, and lists of them, for people."""

from __future__ import annotations

from collections.abc import Sequence


def in_units(nbytes: float) -> str:
    """A number of bytes for people: "64 MB", "1.2 TB"."""
    size, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.2g} {units[0]}" if size < 99.5 else f"{size:,.0f} {units[0]}"


def spans(ranks: Sequence[int]) -> str:
    """Ranks as a reader takes them in: "rank 3", "ranks 0-31", "ranks 0-2,7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(ranks) != 1 else ''} {text}"
