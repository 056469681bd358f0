"""gala-mpi topology: measures and drawings of a graph, with neither MPI nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gala_mpi.config import UsageError
from gala_mpi.gossip.topology import TOPOLOGIES
from gala_mpi.graphs import command as topology_report


def command(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gala_mpi", "topology", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )


def test_the_text_shows_the_measures_and_the_adjacency_picture() -> None:
    done = command("hierarchical", "--size", "6", "--ranks-per-node", "3")
    assert done.returncode == 0 and not done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "hierarchical: 6 ranks on 2 nodes"
    assert "edges 16, of them 4 between nodes" in lines
    assert "in-degree 2 to 3" in lines
    assert "doubly stochastic yes: in lockstep, mixing keeps the mean of all ranks" in lines
    assert "messages per update 8, of them 2 between nodes (mean over a period of 2" in lines
    assert "0 node0 \\ooX.. 3 3 1 2 3 0.1 or 0.5 0.4 or 0.5" in lines
    assert "5 node1 ...oo\\ 2 2 3 4 0.5 0.5" in lines


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_every_kind_is_described(name: str) -> None:
    said = topology_report.report([name, "--size", "16", "--ranks-per-node", "2"])
    called = "hierarchical: 16 ranks on 8 nodes (auto)" if name == "auto" else f"{name}: 16 ranks on 8 nodes"
    assert said.startswith(f"{called}\n") and "spectral gap" in said and "effective neighbours" in said
    assert ("warning: a ring of 16 ranks mixes slowly" in said) == (name == "ring")
    called = "ring: 1 rank on 1 node (auto)" if name == "auto" else f"{name}: 1 rank on 1 node"
    assert topology_report.report([name, "--size", "1"]).startswith(f"{called}\n")


def test_effective_neighbours_are_told_for_any_gamma() -> None:
    short, long = (
        json.loads(topology_report.report(["ring", "--size", "4096", "--json", "--gamma", gamma]))
        for gamma in ("0", "0.99")
    )
    # Of fresh noise alone a mix of two halves the variance.
    assert short["effective_neighbours"] == pytest.approx(2) and short["gamma"] == 0
    assert long["effective_neighbours"] == pytest.approx(11, rel=1e-3) and "11 of them" in long["warning"]
    said = topology_report.report(["ring", "--size", "8", "--gamma", "0.5"])
    assert "effective neighbours  " in said and " of 8, at gamma 0.5" in said and "warning" not in said


def test_json_says_in_which_update_of_a_period_an_edge_is_used() -> None:
    said = json.loads(topology_report.report(["base-2", "--size", "3", "--json"]))
    assert said["period"] == 3 and said["messages_per_update"] == 2
    # Ranks 0 and 1, then 0 and 2, then 0 and 1.
    two_thirds = pytest.approx(2 / 3)
    assert sorted(said["edge_list"]) == sorted(
        [[0, 1, 0.5, 1], [1, 0, 0.5, 1], [0, 2, two_thirds, 2], [2, 0, two_thirds, 2], [0, 1, 0.5, 3], [1, 0, 0.5, 3]]
    )


def test_many_ranks_are_listed_in_part() -> None:
    said = topology_report.report(["complete", "--size", "41"])
    assert "... (40)" in said and said.endswith("... and 1 ranks more: --json lists all")


def test_json_holds_the_measures_and_rebuilds_the_graph(tmp_path: Path) -> None:
    done = command("star", "--size", "5", "--ranks-per-node", "4", "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["in_degrees"] == said["out_degrees"] == [4, 1, 1, 1, 1]
    assert said["edges"] == 8 and said["edges_between_nodes"] == 2 and said["nodes"] == 2
    assert said["spectral_gap"] == pytest.approx(0.2) and said["diameter"] == 2 and said["doubly_stochastic"]
    own = tmp_path / "star.txt"
    own.write_text("".join(f"{source} {target} {weight}\n" for source, target, weight in said["edge_list"]))
    again = json.loads(topology_report.report([str(own), "--size", "5", "--ranks-per-node", "4", "--json"]))
    assert {**again, "name": "star"} == said


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["moebius", "--size", "4"], "'moebius' cannot be used; expected one of ring, "),
        ([], " NAME and --size: not given; usage: gala-mpi topology NAME --size INTEGER [OPTIONS]\n"),
        (["ring"], " --size: not given; usage: "),
        (["--size", "4"], " NAME: not given; usage: "),
        (["ring", "--ranks", "4"], " --ranks: no such option (see gala-mpi topology --help)"),
        (["ring", "--size"], " --size: no value is given; expected one (see "),
        (["ring", "--size", "0"], "--size: 0 "),
        (["ring", "--size", "4097"], "from 1 to 4096"),
        (["ring", "--size", "four"], "--size"),
        (["hypercube", "--size", "6"], "power of two, not 6"),
        (["ring", "--size", "4", "--ranks-per-node", "0"], "--ranks-per-node: 0 "),
        (["ring", "--size", "4", "--gamma", "1"], "--gamma: 1.0 cannot be used; expected a number from 0 to 0.9999"),
        (["ring", "--size", "4", "--gamma", "nan"], "--gamma: nan "),
        (["ring", "--size", "4", "--draw", "graph.jpg"], "--draw: 'graph.jpg'"),
        (["ring", "--size", "4", "--draw", "missing/graph.png"], "--draw: 'missing/graph.png'"),
        (["complete", "--size", "100", "--draw", "graph.png"], "at most 5000 edges, not 9900"),
        (["edges.txt", "--size", "2"], "edges.txt, line 2: 0 2"),
        (["ring", "--size", "4", "--no-such-flag"], "--no-such-flag"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(args: list[str], named: str, tmp_path: Path) -> None:
    (tmp_path / "edges.txt").write_text("0 1\n0 2\n")
    done = command(*args, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("gala-mpi: error: ") and done.stderr.count("\n") == 1 and named in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["edges.txt"]


def test_help_names_every_kind() -> None:
    said = " ".join(command("--help").stdout.split())
    assert said.startswith("usage: gala-mpi topology NAME --size INTEGER [OPTIONS] ")
    assert all(name in said for name in TOPOLOGIES)


@pytest.mark.parametrize("name", ["ring", "star", "hierarchical", "one-peer-exponential"])
@pytest.mark.parametrize("size", ["1", "2", "9"])
def test_drawings_are_images(tmp_path: Path, name: str, size: str) -> None:
    """In this process, where a warning is an error."""
    png, svg = tmp_path / "graph.png", tmp_path / "graph.svg"
    said = topology_report.report([name, "--size", size, "--ranks-per-node", "3", "--draw", str(png)])
    assert said.endswith(f"drawn to {png}")
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000
    assert json.loads(topology_report.report([name, "--size", size, "--json", "--draw", str(svg)]))
    assert "<svg" in svg.read_text("utf-8")


def test_a_missing_matplotlib_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"^--draw needs matplotlib: pip install matplotlib networkx$"):
        topology_report.report(["ring", "--size", "4", "--draw", str(tmp_path / "graph.png")])


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import gala_mpi.cli as c; c.topology(['torus', '--size', '4'])", "torch mpi4py.MPI networkx matplotlib"),
        ("import gala_mpi.train.agent", "networkx matplotlib gala_mpi.graphs.measures"),
    ],
    ids=["the command", "training"],
)
def test_nothing_is_imported_that_is_not_needed(code: str, absent: str) -> None:
    check = f"import sys; {code}; assert not set('{absent}'.split()) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=480, stdout=subprocess.DEVNULL)
