"""Topologies: directed graphs whose mixing weights sum to 1 and over which news reaches every rank."""

from __future__ import annotations

import math
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gala_mpi.config import ConfigError
from gala_mpi.gossip.topology import TOPOLOGIES, Topology, make_topology
from gala_mpi.graphs.measures import diameter, is_doubly_stochastic, measure, spectral_gap


@st.composite
def topologies(draw: st.DrawFn, largest: int = 33) -> Topology:
    """Any kind, over any size that it can serve; placements in any order, on nodes of any sizes."""
    name = draw(st.sampled_from(sorted(TOPOLOGIES)))
    size = draw(st.integers(1, largest))
    if name == "hypercube":
        size = 1 << (size.bit_length() - 1)
    nodes = draw(st.lists(st.sampled_from("abcdefgh"), min_size=size, max_size=size))
    return make_topology(name, size, nodes)


def graph(topology: Topology) -> nx.DiGraph:
    """The same graph, built from the senders' side, for networkx to judge."""
    made = nx.DiGraph()
    made.add_nodes_from(range(topology.size))
    made.add_edges_from((rank, target) for rank in range(topology.size) for target in topology.out_neighbours(rank))
    return made


@settings(deadline=None)
@given(topologies())
def test_every_rank_reaches_every_other(topology: Topology) -> None:
    assert nx.is_strongly_connected(graph(topology))
    assert diameter(topology) == nx.diameter(graph(topology))


@settings(deadline=None)
@given(topologies())
def test_in_and_out_neighbours_are_the_same_edges_ascending_and_none_is_a_loop(topology: Topology) -> None:
    ranks = range(topology.size)
    into = [(source, rank) for rank in ranks for source in topology.in_neighbours(rank)]
    out = [(rank, target) for rank in ranks for target in topology.out_neighbours(rank)]
    assert sorted(into) == out and len(set(out)) == len(out)
    assert all(source != target for source, target in out)
    assert all(list(topology.in_edges[rank]) == sorted(topology.in_edges[rank]) for rank in ranks)


@settings(deadline=None)
@given(topologies(), st.integers(1, 1000))
def test_over_a_period_the_targets_are_the_out_neighbours(topology: Topology, first: int) -> None:
    for rank in range(topology.size):
        sent = [topology.targets(rank, update) for update in range(first, first + topology.period)]
        assert sorted({target for targets in sent for target in targets}) == list(topology.out_neighbours(rank))
        assert all(rank in topology.in_neighbours(target) for targets in sent for target in targets)
        assert topology.targets(rank, first) == topology.targets(rank, first + topology.period)
        if topology.rotating and topology.size > 1:
            assert all(len(targets) == 1 for targets in sent)


@settings(deadline=None)
@given(topologies(), st.integers(1, 1000))
def test_weights_are_positive_and_mixing_keeps_the_mean(topology: Topology, update: int) -> None:
    """Every kind is doubly stochastic: what a rank gets and what it gives both sum to 1."""
    matrix = topology.mixing_matrix(update)
    assert matrix.sum(axis=1) == pytest.approx(np.ones(topology.size))
    assert matrix.sum(axis=0) == pytest.approx(np.ones(topology.size))
    assert is_doubly_stochastic(topology)
    for rank in range(topology.size):
        own, weights = topology.weights(rank)
        assert own > 1e-9 and all(weight > 0 for weight in weights)
        heard = 1 if topology.rotating and weights else len(weights)
        assert own + sum(weights[:heard]) == pytest.approx(1)
        assert matrix[rank, rank] == own and len(weights) == len(topology.in_neighbours(rank))
        heard_now = {source for source in range(topology.size) if rank in topology.targets(source, update)}
        assert set(np.flatnonzero(matrix[rank])) == heard_now | {rank}


@settings(deadline=None)
@given(topologies(largest=17), st.integers(0, 2**32 - 1))
def test_repeated_mixing_comes_to_the_mean_as_fast_as_the_spectral_gap_says(topology: Topology, seed: int) -> None:
    start = np.random.default_rng(seed).normal(size=topology.size)
    gap = spectral_gap(topology)
    assert gap is not None and 0 < gap <= 1
    period = np.eye(topology.size)
    for update in range(1, topology.period + 1):
        period = topology.mixing_matrix(update) @ period
    # Where the matrix is not normal the rate holds in the long run only; hence the factor.
    values = np.linalg.matrix_power(period, math.ceil(50 / gap)) @ start
    assert values == pytest.approx(np.full(topology.size, start.mean()), abs=1e-9)


def degrees(name: str, size: int) -> set[tuple[int, int]]:
    topology = make_topology(name, size)
    return {(len(topology.in_neighbours(rank)), len(topology.out_neighbours(rank))) for rank in range(size)}


@settings(deadline=None)
@given(st.integers(5, 40))
def test_degrees(size: int) -> None:
    log = math.ceil(math.log2(size))
    assert degrees("ring", size) == {(1, 1)}
    assert degrees("bidirectional-ring", size) == {(2, 2)}
    assert degrees("exponential", size) == degrees("one-peer-exponential", size) == {(log, log)}
    assert degrees("complete", size) == degrees("hierarchical", size) == {(size - 1, size - 1)}
    assert degrees("star", size) == {(size - 1, size - 1), (1, 1)}
    assert degrees("hypercube", 1 << log) == {(log, log)}


def test_the_torus_is_the_most_nearly_square_grid() -> None:
    torus = make_topology("torus", 12)  # 3 rows of 4
    assert torus.out_neighbours(0) == (1, 3, 4, 8)
    assert degrees("torus", 12) == {(4, 4)}
    assert degrees("torus", 10) == {(3, 3)}  # 2 x 5: up is down
    assert degrees("torus", 4) == {(2, 2)}
    assert make_topology("torus", 7).in_edges == make_topology("bidirectional-ring", 7).in_edges


def test_the_ring_sends_to_the_next_rank() -> None:
    ring = make_topology("ring", 4)
    assert [ring.out_neighbours(rank) for rank in range(4)] == [(1,), (2,), (3,), (0,)]
    assert ring.weights(0) == (0.5, (0.5,))
    assert make_topology("ring", 1).in_neighbours(0) == ()
    assert make_topology("ring", 1).weights(0) == (1, ())


def test_one_peer_doubles_its_step_at_each_update() -> None:
    one_peer = make_topology("one-peer-exponential", 8)
    assert [one_peer.targets(7, update) for update in range(1, 5)] == [(1,), (3,), (0,), (1,)]
    assert one_peer.rotating and not make_topology("exponential", 8).rotating
    assert one_peer.weights(0) == (0.5, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["star", "torus", "hypercube", "bidirectional-ring", "complete"])
def test_undirected_graphs_have_symmetric_weights(name: str) -> None:
    matrix = make_topology(name, 16).mixing_matrix()
    assert np.array_equal(matrix, matrix.T)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 6))
def test_a_hierarchy_is_dense_inside_a_node_and_sparse_between_nodes(nodes: int, ranks: int) -> None:
    # Placed round-robin, as some launchers do.
    where = [f"n{rank % nodes}" for rank in range(nodes * ranks)]
    topology = make_topology("hierarchical", len(where), where)
    sent, received = dict.fromkeys(where, 0), dict.fromkeys(where, 0)
    for rank in range(topology.size):
        mates = {mate for mate in range(topology.size) if where[mate] == where[rank]} - {rank}
        away = set(topology.out_neighbours(rank)) - mates
        assert mates <= set(topology.out_neighbours(rank))
        assert len(away) <= (1 if ranks > 1 else 2)
        sent[where[rank]] += len(away)
        for target in away:
            received[where[target]] += 1
    assert set(sent.values()) == set(received.values()) == {1 if nodes <= 4 else 2}
    measures = measure(topology, where)
    assert measures.nodes == nodes and measures.edges_between_nodes == sum(sent.values())


@pytest.mark.parametrize("size", [2, 3, 4, 7, 16, 50])
def test_spectral_gaps_against_closed_forms(size: int) -> None:
    assert spectral_gap(make_topology("ring", size)) == pytest.approx(1 - math.cos(math.pi / size))
    assert spectral_gap(make_topology("complete", size)) == pytest.approx(1)
    assert spectral_gap(make_topology("star", size)) == pytest.approx(1 / size if size > 2 else 1)
    dimension = size.bit_length()
    assert spectral_gap(make_topology("hypercube", 1 << dimension)) == pytest.approx(2 / (1 + dimension))
    # Exact consensus after one period where the number of ranks is a power of two, and only there.
    assert spectral_gap(make_topology("one-peer-exponential", 1 << dimension)) == 1
    uneven = spectral_gap(make_topology("one-peer-exponential", size + 1 if size & (size - 1) == 0 else size))
    assert uneven is not None and 0.2 < uneven < 0.9


@settings(deadline=None)
@given(topologies(largest=17))
def test_the_quick_ways_to_the_spectral_gap_agree_with_the_general_one(topology: Topology) -> None:
    period = np.eye(topology.size)
    for update in range(1, topology.period + 1):
        period = topology.mixing_matrix(update) @ period
    deflated = period - 1 / topology.size
    rate = max(abs(np.linalg.eigvals(deflated)))
    # A defective eigenvalue 0 comes out as a root of the rounding error.
    assert 1 - (spectral_gap(topology) or 0) == pytest.approx(rate ** (1 / topology.period), rel=1e-6, abs=0.05)


def test_large_graphs_stay_practical() -> None:
    hierarchy = make_topology("hierarchical", 4096, [f"n{rank // 64}" for rank in range(4096)])
    assert spectral_gap(hierarchy) is None
    assert diameter(hierarchy) > 2
    assert spectral_gap(make_topology("ring", 4096)) == pytest.approx(1 - math.cos(math.pi / 4096), rel=1e-6)


def test_unknown_names_and_sizes_that_cannot_be_served_are_refused() -> None:
    allowed = f"one of {', '.join(TOPOLOGIES)}, or the path of an edge list"
    with pytest.raises(ConfigError, match=f"'rung' cannot be used; expected {allowed}"):
        make_topology("rung", 4)
    with pytest.raises(ConfigError, match=r"'hypercube'.*power of two, not 6"):
        make_topology("hypercube", 6)
    with pytest.raises(ValueError, match="2 nodes for 3 ranks"):
        make_topology("hierarchical", 3, ["a", "b"])


def edge_list(folder: Path, text: str, size: int = 3) -> Topology:
    path = folder / "edges.txt"
    path.write_text(text)
    return make_topology(str(path), size)


def test_an_edge_list_without_weights(tmp_path: Path) -> None:
    topology = edge_list(tmp_path, "# a comment\n0 1\n1 2  # and one more\n\n 2\t0\n0 2\n")
    assert topology.in_edges == ((2,), (0,), (0, 1))
    assert topology.weights(0) == (0.5, (0.5,))
    own, weights = topology.weights(2)
    assert [own, *weights] == pytest.approx([1 / 3] * 3)
    assert not is_doubly_stochastic(topology)


def test_an_edge_list_with_weights_mixes_to_one_value(tmp_path: Path) -> None:
    topology = edge_list(tmp_path, "2 1 0.1\n0 1 0.25\n1 2 .5\n2 0 1e-1\n")
    own, weights = topology.weights(1)
    assert [own, *weights] == pytest.approx([0.65, 0.25, 0.1])
    values = np.linalg.matrix_power(topology.mixing_matrix(), 1000) @ np.array([1.0, 2.0, 6.0])
    assert np.ptp(values) < 1e-9 and 1 < values[0] < 6


@pytest.mark.parametrize(
    ("text", "line", "allowed"),
    [
        ("0 1\n1\n", "line 2: 1", "source target weight"),
        ("0 1 0.1 7\n", "line 1: 0 1 0.1 7", "source target weight"),
        ("0 one\n", "line 1: 0 one", "in numbers"),
        ("0 1 much\n", "line 1: 0 1 much", "in numbers"),
        ("0 1.5\n", "line 1: 0 1.5", "in numbers"),
        ("0 1\n# 9 9\n1 3\n", "line 3: 1 3", "ranks from 0 to 2"),
        ("-1 0\n", "line 1: -1 0", "ranks from 0 to 2"),
        ("1 1\n", "line 1: 1 1", "two different ranks"),
        ("0 1\n1 2\n0 1\n", "line 3: 0 1", "each edge once"),
        ("0 1 0.5\n1 2\n", "line 2: 1 2", "a weight on every edge, or on none"),
        ("0 1 0\n", "line 1: 0 1 0", "above 0 and below 1"),
        ("0 1 1\n", "line 1: 0 1 1", "above 0 and below 1"),
        ("0 1 nan\n", "line 1: 0 1 nan", "above 0 and below 1"),
        ("0 1 0.5\n1 2 0.5\n2 1 0.5\n", "line 3: 2 1 0.5", "into rank 1 that sum to less than 1, not 1"),
        ("0 1\n1 0\n1 2\n", "edges.txt'", "rank 2 cannot reach rank 0"),
        ("0 1\n1 0\n2 1\n", "edges.txt'", "rank 0 cannot reach rank 2"),
        ("", "edges.txt'", "rank 0 cannot reach rank 1"),
    ],
)
def test_edge_lists_that_cannot_be_used_name_file_line_and_what_is_allowed(
    tmp_path: Path, text: str, line: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        edge_list(tmp_path, text)
    said = str(refused.value)
    assert "edges.txt" in said and line in said and allowed in said.partition("expected")[2] and "\n" not in said


def test_ten_weights_of_a_tenth_leave_nothing(tmp_path: Path) -> None:
    text = "".join(f"{source} 0 0.1\n0 {source} 0.1\n" for source in range(1, 11))
    with pytest.raises(ConfigError, match=r"line 19: 10 0 0\.1"):
        edge_list(tmp_path, text, 11)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="a text file that can be read"):
        make_topology(str(tmp_path / "binary"), 2)
