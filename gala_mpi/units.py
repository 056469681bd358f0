"""Numbers with their units, for people."""

from __future__ import annotations


def in_units(nbytes: float) -> str:
    """A number of bytes for people: "64 MB", "1.2 TB"."""
    size, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.2g} {units[0]}" if size < 99.5 else f"{size:,.0f} {units[0]}"
