"""Whoever is gone, those that are left are one graph, and take back who returns."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from cluster import Cluster
from conftest import Mpi
from hypothesis import given, settings
from hypothesis import strategies as st

from gala_mpi.gossip.connectivity import is_one_graph, ring_neighbours
from gala_mpi.gossip.topology import TOPOLOGIES, Topology, make_topology

PLACED = [("hierarchical", nodes) for nodes in ("aaaabbbb", "aabbccdd", "aaaaabbc")]
PROGRAM = str(Path(__file__).parent / "programs" / "survivors.py")


def strongly_connected(edges: set[tuple[int, int]], ranks: list[int]) -> bool:
    """By the closure of the graph."""
    number = {rank: place for place, rank in enumerate(ranks)}
    reached = np.eye(len(ranks), dtype=bool)
    for source, target in edges:
        reached[number[source], number[target]] = True
    for _ in range(len(ranks)):
        reached |= reached @ reached
    return bool(reached.all())


def check(topology: Topology, gone: np.ndarray) -> None:
    there = [int(rank) for rank in np.flatnonzero(~gone)]
    edges = {(r, t) for r in there for t in topology.out_neighbours(r) if t in there}
    whole = strongly_connected(edges, there)
    found = {rank: ring_neighbours(topology, rank, gone) for rank in there}
    for rank, (before, after) in found.items():
        assert is_one_graph(topology, gone, rank) == whole
        # Both ends of an edge know of it, and of no other.
        assert after is None or found[after][0] == rank
        assert before is None or found[before][1] == rank
        assert not whole or (before, after) == (None, None)
        edges |= {(rank, after)} - {(rank, None)}
    assert strongly_connected(edges, there)


@pytest.mark.parametrize(("name", "nodes"), [*((name, None) for name in TOPOLOGIES), *PLACED])
def test_whoever_is_gone_the_others_are_strongly_connected(name: str, nodes: str | None) -> None:
    """The carriers between nodes too."""
    size = 8
    topology = make_topology(name, size, nodes)
    for gone in itertools.product([False, True], repeat=size):
        check(topology, np.array(gone))


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 40), st.data())
def test_so_are_those_of_any_number_of_ranks(size: int, data: st.DataObject) -> None:
    gone = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    check(make_topology(data.draw(st.sampled_from(["ring", "torus", "star", "one-peer-exponential"])), size), gone)


@pytest.mark.parametrize(
    ("size", "topology", "silent"),
    [(4, "ring", [2]), (5, "ring", [1, 2, 4]), (5, "star", [3]), (4, "bidirectional-ring", [1, 3])],
)
def test_survivors_hear_of_each_other_and_of_who_returns(mpi: Mpi, size: int, topology: str, silent: list[int]) -> None:
    arguments = ("--topology", topology, "--silent", *map(str, silent))
    done = mpi.run(size, PROGRAM, *arguments, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["survivors are one graph", "all are back"]
    assert "ranks that are gone have cut the topology" in done.stderr or topology == "star"


def test_so_do_those_on_other_hosts(cluster: Cluster, mpi: Mpi) -> None:
    done = cluster.mpi(mpi, ranks_per_host=2).run(6, PROGRAM, "--silent", "2", "3", timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["survivors are one graph", "all are back"]
