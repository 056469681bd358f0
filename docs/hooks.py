"""Pages that are made of the code when the site is built: all settings, all metrics, all exit codes.

mkdocs calls `on_files`. The project's own rules hold: nothing is written beside the site.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

from gala_mpi import exit_codes, settings
from gala_mpi.bench.command import BenchOptions
from gala_mpi.config import TrainConfig, load_preset, preset_names
from gala_mpi.doctor.command import DoctorOptions
from gala_mpi.graphs.command import TopologyOptions
from gala_mpi.status.command import StatusOptions
from gala_mpi.storage.schema import READING, TABLES

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

# Programs of the documentation are no pages of it.
NO_PAGES = (".py",)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for file in [file for file in files if file.src_uri.endswith(NO_PAGES)]:
        files.remove(file)
    pages = {"configuration": configuration(), "metrics": metrics(), "exit-codes": codes()}
    for name, lines in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content="\n".join(lines)))
    return files


def table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    """A table of Markdown."""
    yield ""
    yield f"| {' | '.join(columns)} |"
    yield f"| {' | '.join('---' for _ in columns)} |"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def configuration() -> Iterator[str]:
    """All settings of all commands."""
    yield "# Configuration"
    yield ""
    yield "This page is made of the dataclasses in `gala_mpi/config.py` and of the other commands' options."
    yield "A preset is a TOML file with a section for each heading of `train`, and `_` for `-` in names."
    yield "The command line overrides the preset. The effective configuration of each run is saved as `config.toml`."
    commands = (
        ("train", TrainConfig),
        ("doctor", DoctorOptions),
        ("status", StatusOptions),
        ("topology", TopologyOptions),
        ("bench", BenchOptions),
    )
    for command, options in commands:
        yield f"\n## gala-mpi {command}"
        for section in settings.sections(options):
            if command == "train":
                yield f"\n### {section.name}"
            yield f"\n{section.meaning}"
            yield from table(
                ("setting", "default", "meaning"),
                (
                    (f"`{one.option}`", f"`{one.default}`" if one.default else "", one.meaning)
                    for one in section.settings
                ),
            )
    yield "\n## Presets\n"
    yield "What each sets otherwise than the defaults above."
    plain = TrainConfig().as_dict()
    rows = []
    for preset in preset_names():
        for section_name, values in load_preset(preset).as_dict().items():
            rows += [
                (f"`{preset}`", f"`{section_name}.{name}`", f"`{value}`")
                for name, value in values.items()
                if value != plain[section_name][name] and name != "preset"
            ]
    yield from table(("preset", "setting", "value"), iter(rows))


def metrics() -> Iterator[str]:
    """All columns of all tables."""
    yield "# Metrics"
    yield ""
    yield "This page is made of `gala_mpi/storage/schema.py`."
    yield "Each rank writes these tables to a file of its own, `RUN/rank-00000.h5` and so on."
    yield "Sums run since the rank's start: the difference of two rows is what lies between them."
    for one in TABLES:
        yield f"\n## {one.name}\n"
        yield f"A row is {one.row_is}."
        rows = ((f"`{c.name}`", c.unit, c.meaning, READING.get(c.name, "")) for c in one.columns)
        yield from table(("column", "unit", "meaning", "good and bad values"), rows)


def codes() -> Iterator[str]:
    """All exit codes, with the comments behind them."""
    yield "# Exit codes"
    yield ""
    yield "Any other code is the launcher's own."
    yield "After a rank was killed it is 9 with MPICH's mpirun, and 137 with Open MPI's."
    found = (
        (line.partition("=")[2].partition("#")[0].strip(), line.partition("# ")[2])
        for line in inspect.getsource(exit_codes).splitlines()
        if line.startswith("EXIT_")
    )
    yield from table(("exit code", "meaning"), found)
