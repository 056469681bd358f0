"""Imports run one way, and importing the package has no side effect."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gala_mpi

PACKAGE = Path(__file__).resolve().parent.parent / "gala_mpi"
ORDER = (
    *(
        "exit_codes",
        "output",
        "config",
        "arguments",
        "collective",
        "files",
        "lease",
        "run_folder",
        "edge_list",
        "topology",
        "graphs.measures",
        "graphs.drawing",
        "graphs.command",
        "parameters",
        "_native",
        "user_code",
        "signals",
        "waiting",
        "window",
        "mailbox",
        "courier",
        "mailboxes",
        "gossip",
    ),
    *("exchange", "vector_env", "simulator_state", "environments", "networks", "stopwatch"),
    *("cuda_graph", "tape", "rollout", "learner", "stalls"),
    *("board", "schema", "recorder", "monitor", "checkpoint", "resume", "checkpointer"),
    *("doctor.findings", "doctor.libraries", "doctor.placement", "doctor.storage", "doctor.preflight"),
    *("preparation", "metrics", "agent"),
    *("doctor.devices", "doctor.peers", "doctor.links", "doctor.verdicts", "doctor.examination", "doctor.command"),
    *("bench.gloo", "bench.costs", "bench.exchange_cost", "bench.cost_table", "bench.command"),
    *("train_command", "cli", "__main__"),
)
# The doctor's examination asks the library for its version and its thread level; the benchmark times MPI's all-reduce.
MAY_IMPORT_MPI = {"window", "exchange", "cli", "doctor.examination", "bench.exchange_cost"}


def runtime_imports(module: str) -> set[str]:
    """Names of all modules that a module imports when it runs, type checking left out."""
    found = set()
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def all_modules() -> list[str]:
    """Every module by its name below the package."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return [".".join(path.parts) for path in paths if path.name != "__init__"]


def test_modules_import_only_from_those_before_them() -> None:
    modules = set(all_modules())
    assert modules - {"_native"} == set(ORDER) - {"_native"}
    for module in modules - {"_native"}:
        earlier = ORDER[: ORDER.index(module)]
        mine = {name.removeprefix("gala_mpi.") for name in runtime_imports(module)}
        assert {name for name in mine if name in ORDER} <= set(earlier), module


def test_only_the_window_the_exchange_and_the_command_line_import_mpi() -> None:
    users = {module for module in all_modules() if "mpi4py.MPI" in runtime_imports(module)}
    assert users == MAY_IMPORT_MPI


def test_what_is_imported_from_the_package_is_there() -> None:
    """The package's own __getattr__ hides a wrong name from the type checker."""
    names = {module.partition(".")[0] for module in all_modules()} | {"_native", *gala_mpi.__all__}
    root = PACKAGE.parent
    paths = [
        path
        for folder in ("gala_mpi", "tests", "benchmarks", "analysis", "examples")
        for path in (root / folder).rglob("*.py")
    ]
    assert len(paths) > 60
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "gala_mpi":
                assert {alias.name for alias in node.names} <= names, path


def test_importing_the_package_starts_nothing() -> None:
    code = (
        "import sys, threading, random\n"
        "before = random.getstate()\n"
        "import gala_mpi\n"
        "assert not {'mpi4py', 'torch', 'numpy.random'} & set(sys.modules), sorted(sys.modules)\n"
        "assert threading.active_count() == 1 and random.getstate() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
