"""What a check found: OK, WARN or FAIL in one line, with the setting that mends it; and how findings are shown.

OK: nothing to do. WARN: a run works, but slower than it could, or with a risk. FAIL: a run breaks, or is not
the run that was meant.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gala_mpi.units import spans

OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One finding. `check` is GROUP.SUBJECT; `values` are what was measured, as JSON; no `ranks`: the whole job.

    Raises ValueError for a WARN or FAIL without a `fix`.
    """

    check: str
    status: str
    message: str
    fix: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.status != OK and not self.fix:
            raise ValueError(f"{self.check}: {self.status} needs a fix")


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """The findings in their order, those that differ in their ranks alone made one."""
    merged: dict[str, Finding] = {}
    for finding in findings:
        key = json.dumps([finding.check, finding.status, finding.message, finding.fix, finding.values])
        if key in merged:
            ranks = tuple(sorted({*merged[key].ranks, *finding.ranks}))
            merged[key] = dataclasses.replace(merged[key], ranks=ranks)
        else:
            merged[key] = finding
    return list(merged.values())


def failed(findings: Iterable[Finding]) -> bool:
    """Whether there is a FAIL."""
    return any(finding.status == FAIL for finding in findings)


def as_json(findings: Iterable[Finding], nodes: Sequence[str]) -> str:
    """One JSON list of {check, status, ranks, nodes, message, fix, values}; `nodes[r]` is the node of rank r."""
    entries = []
    for finding in findings:
        where = sorted({nodes[rank] for rank in finding.ranks if rank < len(nodes)})
        entries.append({**dataclasses.asdict(finding), "ranks": list(finding.ranks), "nodes": where})
    return json.dumps(entries, indent=2)


def as_text(findings: Sequence[Finding], title: str) -> str:
    """The findings by group, one line each, under `title`, and their number by status."""
    lines = [title]
    for group in dict.fromkeys(finding.check.partition(".")[0] for finding in findings):
        lines.append(group)
        lines += [_line(finding) for finding in findings if finding.check.partition(".")[0] == group]
    counts = {status: sum(finding.status == status for finding in findings) for status in (OK, WARN, FAIL)}
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n".join(lines)


def _line(finding: Finding) -> str:
    where = f"{spans(finding.ranks)}: " if finding.ranks else ""
    fix = f"; fix: {finding.fix}" if finding.fix else ""
    return f"  {finding.status:<4}  {where}{finding.message}{fix}"
