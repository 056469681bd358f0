"""What the documentation names is there: settings, columns, messages, files and tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

from gala_mpi import settings
from gala_mpi.bench.command import BenchOptions
from gala_mpi.config import TrainConfig
from gala_mpi.doctor.command import DoctorOptions
from gala_mpi.gossip.topology import TOPOLOGIES
from gala_mpi.graphs.command import TopologyOptions
from gala_mpi.storage.schema import READING, TABLES

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Options of others' programs, and of our scripts.
OTHERS = {
    *("enable-recovery", "with-ft", "kill-on-bad-exit", "mpi", "cpus-per-task", "shm-size", "no-binary", "help"),
    *("seconds", "repeats", "out", "minutes", "ranks", "hosts", "runs", "inputs", "exchanges", "seed", "precisions"),
}
SOURCES = "gala_mpi|tests|jobs|benchmarks|analysis|src|docs|examples"


def all_settings() -> set[str]:
    found = set()
    for options in (TrainConfig, DoctorOptions, TopologyOptions, BenchOptions):
        for section in settings.sections(options):
            for one in section.settings:
                found |= {name.removeprefix("--") for name in re.findall(r"--[a-z-]+", one.name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?![\w-])", page.read_text("utf-8")))
    # A whole family of them.
    named -= {"sketch"}
    assert named <= all_settings() | OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_test_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(rf"(?:(?<=[`( ])|^)((?:{SOURCES})/[\w/.*-]*[\w*])", text, flags=re.M):
        assert list(ROOT.glob(name)), name
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"\btest_\w+(?![\w.])", text):
        assert f"def {name}" in tests or list((ROOT / "tests").rglob(f"{name}*")), name


def test_every_message_of_the_troubleshooting_page_is_one() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").partition("\n## From other programs")[0]
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "gala_mpi").rglob("*.py"))
    # Strings that stand behind each other are one.
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    messages = re.findall(r"^### `(.*)`$", text, flags=re.M)
    assert len(messages) > 20
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in code, message


def test_every_topology_is_in_the_table_of_its_page() -> None:
    text = (ROOT / "docs" / "how-gossip-works.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", text, flags=re.M)) == TOPOLOGIES.keys()


def test_every_column_that_is_watched_exists() -> None:
    columns = {column.name for table in TABLES for column in table.columns}
    assert READING.keys() <= columns
    sums = {column.name for column in TABLES[0].columns} - {"time_s", "update", "agent_steps"}
    assert sums <= READING.keys()


def test_every_counter_that_the_library_page_names_exists() -> None:
    # Not imported: that would start MPI.
    code = (ROOT / "gala_mpi" / "gossip" / "gossip.py").read_text("utf-8")
    names = set(re.findall(r"^    (\w+): (?:int|float) =", code.partition("class ExchangeCounters")[2], flags=re.M))
    text = (ROOT / "docs" / "library.md").read_text("utf-8").partition("`gossip.counters`")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", text)) <= names


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
