"""Topologies: directed graphs whose mixing weights sum to 1 and over which news reaches every rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gala_mpi.config import ConfigError
from gala_mpi.topology import TOPOLOGIES, Topology, make_topology

SIZES = st.integers(1, 33)


def any_topology(name: str, size: int) -> Topology:
    return make_topology(name, 1 << (size.bit_length() - 1) if name == "hypercube" else size)


def reachable(topology: Topology, start: int) -> set[int]:
    seen, frontier = {start}, [start]
    while frontier:
        for target in topology.out_neighbours(frontier.pop()):
            if target not in seen:
                seen.add(target)
                frontier.append(target)
    return seen


@given(st.sampled_from(sorted(TOPOLOGIES)), SIZES)
def test_every_rank_reaches_every_other(name: str, size: int) -> None:
    topology = any_topology(name, size)
    assert all(reachable(topology, rank) == set(range(topology.size)) for rank in range(topology.size))


@given(st.sampled_from(sorted(TOPOLOGIES)), SIZES)
def test_in_and_out_neighbours_are_the_same_edges_and_none_is_a_loop(name: str, size: int) -> None:
    topology = any_topology(name, size)
    into = {(source, rank) for rank in range(topology.size) for source in topology.in_neighbours(rank)}
    out = {(rank, target) for rank in range(topology.size) for target in topology.out_neighbours(rank)}
    assert into == out
    assert all(source != target for source, target in into)


@given(st.sampled_from(sorted(TOPOLOGIES)), SIZES)
def test_mixing_keeps_the_mean(name: str, size: int) -> None:
    """All three are doubly stochastic: what a rank gets and what it gives both sum to 1."""
    topology = any_topology(name, size)
    given_away = [0.0] * topology.size
    for rank in range(topology.size):
        own, weights = topology.weights(rank)
        assert own + sum(weights) == pytest.approx(1)
        given_away[rank] += own
        for source, weight in zip(topology.in_neighbours(rank), weights, strict=True):
            given_away[source] += weight
    assert given_away == pytest.approx([1.0] * topology.size)


def test_the_ring_sends_to_the_next_rank() -> None:
    ring = make_topology("ring", 4)
    assert [ring.out_neighbours(rank) for rank in range(4)] == [(1,), (2,), (3,), (0,)]
    assert ring.weights(0) == (0.5, (0.5,))
    assert make_topology("ring", 1).in_neighbours(0) == ()


def test_degrees() -> None:
    assert {len(make_topology("complete", 5).in_neighbours(rank)) for rank in range(5)} == {4}
    assert {len(make_topology("hypercube", 8).in_neighbours(rank)) for rank in range(8)} == {3}


def test_unknown_names_and_sizes_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'rung'.*ring, complete, hypercube"):
        make_topology("rung", 4)
    with pytest.raises(ConfigError, match=r"'hypercube'.*power of two, not 6"):
        make_topology("hypercube", 6)
