"""Imports run one way, package by package and module by module, and importing the package has no side effect."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import gala_mpi

PACKAGE = Path(__file__).resolve().parent.parent / "gala_mpi"
# The ground: modules beside the packages, which all packages may import. `cli` stands above all of them.
GROUND = {"_native", "arguments", "config", "exit_codes", "files", "output", "settings", "stopwatch", "units"}
GROUND |= {"user_code"}
TOP = {"__main__", "cli"}
# What each package may import, beside the ground and itself; a module stands for itself alone.
BELOW = {
    "mpi": set(),
    "gossip": {"mpi"},
    "storage": {"mpi"},
    "status": {"storage"},
    "learning": {"gossip.parameters"},
    "graphs": {"gossip.topology", "gossip.mixing"},
    "doctor": {"mpi", "gossip"},
    "bench": {"mpi", "gossip", "doctor"},
    "train": {"mpi", "gossip", "storage", "learning", "doctor"},
}
# The doctor's examination asks the library for its version and its thread level; the benchmark times MPI's all-reduce.
MAY_IMPORT_MPI = {"mpi.window", "gossip.exchange", "cli", "doctor.examination", "bench.exchange_cost"}


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


def own_imports(module: str) -> set[str]:
    """The modules of this package among them."""
    names = {name.removeprefix("gala_mpi.") for name in runtime_imports(module)}
    return names & {*all_modules(), "_native"}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_its_place() -> None:
    places = {package_of(module) for module in all_modules()} | {"_native"}
    assert places == GROUND | TOP | BELOW.keys()


def test_packages_import_only_from_those_below() -> None:
    for module in set(all_modules()) - TOP:
        package = package_of(module)
        for name in own_imports(module):
            allowed = {package_of(name), name} & (GROUND | BELOW.get(package, set()) | {package} - GROUND)
            assert allowed, f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules: Iterator[str] = TopologicalSorter({module: own_imports(module) for module in all_modules()}).static_order()
    assert len(list(modules)) == len(all_modules()) + 1  # with _native


def test_every_package_says_what_it_is_for() -> None:
    for package in BELOW:
        said = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text("utf-8")))
        assert said and "Imports" in said and "import" in said.partition("Imports")[2], package
        assert "Entry point: `" in said, package


def test_only_the_window_the_exchange_and_the_command_line_import_mpi() -> None:
    users = {module for module in all_modules() if "mpi4py.MPI" in runtime_imports(module)}
    assert users == MAY_IMPORT_MPI


def test_what_is_imported_from_the_package_is_there() -> None:
    """The package's own __getattr__ hides a wrong name from the type checker."""
    names = {package_of(module) for module in all_modules()} | {"_native", *gala_mpi.__all__}
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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_a_topology_needs_neither_torch_nor_mpi() -> None:
    code = (
        "import sys, gala_mpi\n"
        "assert gala_mpi.make_topology('ring', 4).size == 4 and gala_mpi.Topology and gala_mpi.ConfigError\n"
        "assert not {'mpi4py', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
