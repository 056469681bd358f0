"""What the documentation names is there: settings, columns, messages, files and tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from choices import LEARNERS
from conftest import ROOT
from torch import nn

from gala_mpi import settings
from gala_mpi.bench.command import BenchOptions
from gala_mpi.config import TrainConfig
from gala_mpi.doctor.command import DoctorOptions
from gala_mpi.gossip.parameters import FlatParameters
from gala_mpi.gossip.topology import TOPOLOGIES
from gala_mpi.graphs.command import TopologyOptions
from gala_mpi.learning.learner import Learner
from gala_mpi.status.command import StatusOptions
from gala_mpi.storage.resume import FIXED
from gala_mpi.storage.schema import READING, TABLES

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Options of others' programs.
OTHERS = {
    *("array", "signal", "dependency", "enable-recovery", "with-ft", "kill-on-bad-exit"),
    *("mpi", "cpus-per-task", "shm-size", "no-binary", "help", "force-reinstall"),
    *("no-cache-dir", "no-deps"),
    # Of our scripts.
    *("seconds", "repeats", "out", "minutes", "ranks", "hosts"),
    *("runs", "inputs", "exchanges", "seed", "precisions", "kill"),
    *("looks", "settle-s", "timeout-s", "update-s", "nodes", "rounds"),
    *("update-ms-a-rank", "run-s", "topologies"),
}
SOURCES = "gala_mpi|tests|jobs|benchmarks|analysis|src|docs|examples"


def all_settings() -> set[str]:
    found = set()
    for options in (TrainConfig, DoctorOptions, StatusOptions, TopologyOptions, BenchOptions):
        for section in settings.sections(options):
            for one in section.settings:
                found |= {name.removeprefix("--") for name in re.findall(r"--[a-z-]+", one.name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?![\w-])", page.read_text("utf-8")))
    unknown = named - all_settings() - OTHERS
    assert not unknown, f"{page} names options that no command has; add those of other programs to OTHERS above"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_test_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(rf"(?:(?<=[`( ])|^)((?:{SOURCES})/[\w/.*-]*[\w*])", text, flags=re.M):
        assert list(ROOT.glob(name)), f"{page} names {name}, which is not there"
    tests = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"\btest_\w+(?![\w.])", text):
        assert f"def {name}" in tests or list((ROOT / "tests").rglob(f"{name}*")), f"{page}: no test {name}"


def test_every_message_of_the_troubleshooting_page_is_one() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").partition("\n## From other programs")[0]
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "gala_mpi").rglob("*.py"))
    # Strings that stand behind each other are one.
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    messages = re.findall(r"^### `(.*)`$", text, flags=re.M)
    assert len(messages) > 20
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in code, f"docs/troubleshooting.md: no such message: {message}"


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("docs/how-gossip-works.md", r"^\| `([a-z0-9-]+)` \|"),
        ("gala_mpi/gossip/topology.py", r"^    ([a-z][a-z0-9-]+) {2,}"),
    ],
)
def test_every_topology_is_in_the_tables(file: str, row: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    if file.endswith(".py"):
        text = text.split('"""')[1]
    found = re.findall(row, text, flags=re.M)
    assert found == list(TOPOLOGIES), f"{file}: give its table one row for each name in TOPOLOGIES, in that order"


def test_every_column_of_updates_has_a_word_in_reading() -> None:
    columns = {column.name for column in TABLES[0].columns} - {"time_s", "update", "agent_steps"}
    silent = columns - READING.keys()
    assert not silent, f"gala_mpi/storage/schema.py: columns of updates without a word in READING: {silent}"


def test_every_word_in_reading_is_on_a_column() -> None:
    unknown = READING.keys() - {column.name for table in TABLES for column in table.columns}
    assert not unknown, f"gala_mpi/storage/schema.py: words in READING on what is no column: {unknown}"


def test_the_page_on_resuming_names_all_that_a_run_keeps_and_no_more() -> None:
    text = (ROOT / "docs" / "survival.md").read_text("utf-8")
    (row,) = re.findall(r"^\| another (.*) \| exit code 2: it would be another run", text, flags=re.M)
    fixed = {f"--{name.replace('_', '-')}" for name in FIXED}
    assert set(re.findall(r"--[a-z-]+", row)) == fixed, "docs/survival.md, Other settings: name what FIXED has"


def test_the_page_on_resuming_names_each_state_of_an_optimiser() -> None:
    states = {name for choice in LEARNERS for name in Learner(FlatParameters(nn.Linear(1, 1)), choice, 1.0).state}
    named = set(re.findall(r"`optimiser\.(\w+)\.\*`", (ROOT / "docs" / "survival.md").read_text("utf-8")))
    assert named == states, "docs/survival.md, What is in one: a row for each state of an optimiser, and for no other"


def test_every_counter_that_the_library_page_names_exists() -> None:
    # Not imported: that would start MPI.
    code = (ROOT / "gala_mpi" / "gossip" / "gossip.py").read_text("utf-8")
    names = set(re.findall(r"^    (\w+): (?:int|float) =", code.partition("class ExchangeCounters")[2], flags=re.M))
    text = (ROOT / "docs" / "library.md").read_text("utf-8").partition("`gossip.counters`")[2].partition("\n\n")[0]
    unknown = set(re.findall(r"`(\w+)`", text)) - names
    assert not unknown, f"docs/library.md names counters that ExchangeCounters lacks: {unknown}"


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
