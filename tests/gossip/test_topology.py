"""Topologies: directed graphs whose mixing weights sum to 1 and over which news reaches every rank."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from pathlib import Path
from random import Random
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gala_mpi
from gala_mpi.config import ConfigError
from gala_mpi.gossip import mixing
from gala_mpi.gossip.mixing import effective_neighbours
from gala_mpi.gossip.topology import (
    TOPOLOGIES,
    Topology,
    make_changing_topology,
    make_topology,
    mixing_weights,
    warning_of,
)
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
        if topology.name == "one-peer-exponential" and topology.size > 1:
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
        own, weights = topology.weights(rank, update)
        assert own > 1e-9 and all(weight >= 0 for weight in weights)
        assert own + sum(weights) == pytest.approx(1)
        assert matrix[rank, rank] == own
        assert matrix[rank, list(topology.in_neighbours(rank))].tolist() == list(weights)
        heard_now = {source for source in range(topology.size) if rank in topology.targets(source, update)}
        assert set(np.flatnonzero(matrix[rank])) == heard_now | {rank}


@settings(deadline=None)
@given(topologies(), st.integers(1, 1000))
def test_a_mix_of_one_rounds_messages_has_the_weights_of_the_round(topology: Topology, update: int) -> None:
    for rank in range(topology.size):
        heard = [
            (source, update) for source in topology.in_neighbours(rank) if rank in topology.targets(source, update)
        ]
        found = mixing_weights(topology.rounds(rank), heard)
        assert found == [weight for weight in topology.weights(rank, update)[1] if weight]
        # What is late stays with the rank's own parameters.
        assert mixing_weights(topology.rounds(rank), heard[1:]) == found[1:]


@settings(deadline=None)
@given(topologies(), st.randoms())
def test_whatever_messages_a_mix_finds_something_is_left_of_the_rank_itself(topology: Topology, random: Random) -> None:
    """One of each in-neighbour at most, of any update: its last may be of one in which it does not send here."""
    for rank in range(topology.size):
        sources = [source for source in topology.in_neighbours(rank) if random.random() < 0.8]
        found = mixing_weights(topology.rounds(rank), [(source, random.randint(1, 1000)) for source in sources])
        assert len(found) == len(sources) and all(weight > 0 for weight in found) and sum(found) < 1


def test_messages_of_several_one_peer_rounds_count_alike() -> None:
    rounds = make_topology("one-peer-exponential", 8).rounds(0)
    assert mixing_weights(rounds, [(7, 1), (6, 5), (4, 9)]) == pytest.approx([1 / 4] * 3)


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
    assert degrees("hierarchical", size) == {(log, log)}
    assert degrees("complete", size) == {(size - 1, size - 1)}
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
    assert [one_peer.targets(7, update) for update in range(1, 5)] == [(0,), (1,), (3,), (0,)]
    assert one_peer.rotating and not make_topology("exponential", 8).rotating
    assert one_peer.in_neighbours(0) == (4, 6, 7)
    assert [one_peer.weights(0, update)[1] for update in (1, 2, 3)] == [(0, 0, 0.5), (0, 0.5, 0), (0.5, 0, 0)]


@pytest.mark.parametrize("base", [2, 3, 4])
def test_a_base_graph_has_the_exact_mean_after_one_period_for_every_number_of_ranks(base: int) -> None:
    for size in range(1, 101):
        topology = make_topology(f"base-{base}", size)
        period = np.eye(size)
        for update in range(1, topology.period + 1):
            matrix = topology.mixing_matrix(update)
            # Both ways, so doubly stochastic; to base - 1 others at most.
            assert np.array_equal(matrix, matrix.T) and matrix.sum(axis=1) == pytest.approx(np.ones(size))
            assert np.count_nonzero(matrix, axis=1).max() <= base and matrix.diagonal().min() > 1e-3
            period = matrix @ period
        np.testing.assert_allclose(period, np.full((size, size), 1 / size), rtol=0, atol=1e-13)
        assert topology.period <= 2 * math.log(size, base) + 2


def test_a_base_graph_takes_no_more_rounds_than_it_needs() -> None:
    assert [make_topology("base-2", size).period for size in (2, 32, 1024)] == [1, 5, 10]
    # 6 = 2 * 3 and 5 = 4 + 1, as in the paper.
    assert [make_topology("base-2", size).period for size in (3, 5, 6)] == [3, 5, 4]
    assert [make_topology("base-4", size).period for size in (4, 12, 64)] == [1, 2, 3]


@pytest.mark.parametrize("name", ["star", "torus", "hypercube", "bidirectional-ring", "complete"])
def test_undirected_graphs_have_symmetric_weights(name: str) -> None:
    matrix = make_topology(name, 16).mixing_matrix()
    assert np.array_equal(matrix, matrix.T)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.randoms())
def test_a_hierarchy_sends_one_message_a_rank_inside_a_node_and_one_a_node_between_nodes(
    sizes: list[int], random: Random
) -> None:
    """Nodes of any sizes, their ranks in any order, as some launchers place them."""
    where = [f"n{node}" for node, ranks in enumerate(sizes) for _ in range(ranks)]
    random.shuffle(where)
    topology = make_topology("hierarchical", len(where), where)
    several = len(sizes) > 1
    for update in range(1, topology.period + 1):
        sent, received = dict.fromkeys(where, 0), dict.fromkeys(where, 0)
        for rank in range(topology.size):
            targets = topology.targets(rank, update)
            away = [target for target in targets if where[target] != where[rank]]
            assert len(targets) - len(away) == (where.count(where[rank]) > 1)
            sent[where[rank]] += len(away)
            for target in away:
                received[where[target]] += 1
        assert set(sent.values()) == set(received.values()) == {int(several)}
    measures = measure(topology, where)
    assert measures.nodes == len(sizes) and measures.messages_between_nodes == several * len(sizes)
    for rank in range(topology.size):
        ranks = where.count(where[rank])
        most = math.ceil(math.log2(ranks)) + math.ceil(topology.period / ranks)
        assert len(topology.in_neighbours(rank)) <= max(most, math.ceil(math.log2(topology.size)))


@pytest.mark.parametrize("name", sorted(TOPOLOGIES))
def test_a_rank_asks_for_itself_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 4,096 ranks: rules are asked for this rank only, and answer no more than its degree in each round."""
    nodes = [f"n{rank // 64}" for rank in range(4096)]
    topology = make_topology(name, 4096, nodes)
    asked: set[int] = set()
    sources = topology.rule.sources

    def watched(rank: int, turn: int) -> dict[int, float]:
        asked.add(rank)
        return sources(rank, turn)

    topology = dataclasses.replace(topology, rule=dataclasses.replace(topology.rule, sources=watched))
    monkeypatch.setattr(Topology, "in_edges", property(lambda _: pytest.fail("the whole graph was asked for")))
    degree = len(topology.in_neighbours(7))
    assert len(topology.weights(7)[1]) == degree and len(topology.rounds(7)) == topology.period <= 24
    assert topology.out_neighbours(7) and topology.digest
    assert degree == 4095 if name == "complete" else degree <= 24
    assert asked == {7}


@pytest.mark.parametrize(
    ("nodes", "stands_for"),
    [
        (["a"], "ring"),
        (["a"] * 4 + ["b"] * 4, "ring"),
        (["a"] * 9, "one-peer-exponential"),
        (["a"] * 5 + ["b"] * 4, "hierarchical"),
        ([f"n{rank}" for rank in range(9)], "one-peer-exponential"),
    ],
)
def test_auto_chooses_by_size_and_placement(nodes: list[str], stands_for: str) -> None:
    topology = make_topology("auto", len(nodes), nodes)
    assert topology == dataclasses.replace(make_topology(stands_for, len(nodes), nodes), rule=topology.rule)


@pytest.mark.parametrize("ranks_per_node", [1, 8, 64, 4096])
@pytest.mark.parametrize("size", [4, 9, 32, 256])
def test_what_auto_chooses_is_worth_most_of_the_ranks_or_many_of_them(size: int, ranks_per_node: int) -> None:
    nodes = [f"n{rank // ranks_per_node}" for rank in range(size)]
    topology = make_topology("auto", size, nodes)
    assert effective_neighbours(topology) > min(2 / 3 * size, 40)
    assert len(topology.targets(0, 1)) <= 2


@settings(deadline=None)
@given(st.lists(topologies(largest=9), min_size=2, max_size=2))
def test_digests_are_alike_only_if_the_graphs_are(pair: list[Topology]) -> None:
    one, other = pair
    if one.digest == other.digest:
        assert [one.rounds(rank) for rank in range(one.size)] == [other.rounds(rank) for rank in range(other.size)]
    again = make_topology(one.name, one.size, ["x"] * one.size)
    assert again.digest == make_topology(one.name, one.size, ["y"] * one.size).digest


def plain_effective_neighbours(topology: Topology, gamma: float) -> float:
    """By its definition: noise, and a mix of what is kept with it, until nothing changes any more."""
    covariance = np.zeros((topology.size, topology.size))
    variances: list[float] = []
    matrices = [topology.mixing_matrix(update) for update in range(1, topology.period + 1)]
    for update in range(math.ceil(60 / (1 - gamma))):
        matrix = matrices[update % topology.period]
        covariance = matrix @ (gamma * covariance + np.eye(topology.size)) @ matrix.T
        variances.append(np.trace(covariance) / topology.size)
    return float(1 / (1 - gamma) / np.mean(variances[-topology.period :]))


@settings(deadline=None, max_examples=40)
@given(topologies(largest=17), st.sampled_from([0.0, 0.5, 0.9]))
def test_effective_neighbours_are_what_their_definition_says(topology: Topology, gamma: float) -> None:
    assert effective_neighbours(topology, gamma) == pytest.approx(plain_effective_neighbours(topology, gamma), rel=1e-5)


def test_effective_neighbours_of_an_edge_list(tmp_path: Path) -> None:
    """Also where mixing does not keep the mean."""
    topology = edge_list(tmp_path, "2 1 0.1\n0 1 0.25\n1 2 .5\n2 0 1e-1\n")
    assert effective_neighbours(topology, 0.9) == pytest.approx(plain_effective_neighbours(topology, 0.9), rel=1e-5)


def test_a_ring_is_worth_eleven_ranks_however_long_it_is() -> None:
    """Of an endless one g / (1 - g) over the mean of 1 / (1 - g cos^2) - 1, which is 1 / sqrt(1 - g) - 1."""
    assert 0.99 / 0.01 / (1 / math.sqrt(0.01) - 1) == pytest.approx(11)
    for size in (64, 1000, 4096):
        assert effective_neighbours(make_topology("ring", size)) == pytest.approx(11, rel=1e-3)
    assert effective_neighbours(make_topology("complete", 4096)) == pytest.approx(4096)
    assert warning_of(make_topology("ring", 16)) and not warning_of(make_topology("ring", 15))
    assert not warning_of(make_topology("one-peer-exponential", 16))


@pytest.mark.parametrize("name", ["hierarchical", "base-3", "star"])
def test_the_estimate_for_many_ranks_is_that_of_the_covariance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = make_topology(name, 100, [f"n{rank // 8}" for rank in range(100)])
    exact = effective_neighbours(topology, 0.9)
    monkeypatch.setattr(mixing, "EXACT_RANKS", 10)
    assert effective_neighbours(topology, 0.9) == pytest.approx(exact, rel=0.03)


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
    assert spectral_gap(make_topology("hierarchical", 2050, [f"n{rank // 64}" for rank in range(2050)])) is None
    assert diameter(make_topology("hierarchical", 4096, [f"n{rank // 64}" for rank in range(4096)])) == 20
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


def test_a_topology_that_is_a_function_of_the_update() -> None:
    text = (Path(__file__).parents[2] / "docs" / "library.md").read_text("utf-8")
    example = textwrap.dedent(text[text.index("    def edges(update):") :].partition("\n\nAn edge may")[0])
    told: dict[str, Any] = {"gala_mpi": gala_mpi}
    exec(example, told)
    assert told["topology"].period == 3 and told["topology"].out_neighbours(0) == (1, 2, 4)
    topology = make_changing_topology(lambda update: [(rank, (rank + update) % 4) for rank in range(4)], 4, 3)
    assert topology.rotating and topology.period == 3 and topology.name == "changing"
    assert [topology.targets(0, update) for update in (1, 2, 3, 4)] == [(1,), (2,), (3,), (1,)]
    assert topology.in_neighbours(0) == (1, 2, 3) and topology.weights(0, 2) == (0.5, (0.0, 0.5, 0.0))
    again = make_changing_topology(lambda update: [(rank, (rank + update) % 4) for rank in range(4)], 4, 3)
    other = make_changing_topology(lambda update: [(rank, (rank - update) % 4) for rank in range(4)], 4, 3)
    assert topology.digest == again.digest != other.digest
    weighted = make_changing_topology(lambda update: [(0, 1, 0.2)] if update == 1 else [(1, 0, 0.7)], 2, 2)
    assert weighted.weights(1, 1) == (0.8, (0.2,)) and weighted.weights(1, 2) == (1.0, (0.0,))
    assert weighted.targets(0, 2) == () and effective_neighbours(weighted) > 1


@pytest.mark.parametrize(
    ("edges", "complaint"),
    [
        ([(0, 0), (1, 0)], r"update 1: \(0, 0\).* two different ranks"),
        ([(0, 1), (0, 1)], r"update 1: \(0, 1\).* each edge once"),
        ([(0, 2)], r"ranks from 0 to 1"),
        ([(0, 1, 1.5)], r"a weight above 0 and below 1"),
        ([(0, 1, 0.5), (1, 0)], r"a weight on every edge, or on none"),
        ([(0.5, 1)], r"in numbers"),
        ([7], r"update 1: 7.* an edge `source target`"),
        ([(0, 1)], r"3 updates.* rank 1 cannot reach rank 0"),
    ],
)
def test_a_function_whose_edges_cannot_be_used_is_refused(edges: list[Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_changing_topology(lambda _: edges, 2, 3)


def test_a_changing_topology_has_ranks_and_updates() -> None:
    for size, period in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="expected 1 or more of both"):
            make_changing_topology(lambda _: [], size, period)
    assert make_changing_topology(lambda _: [], 1, 1).out_neighbours(0) == ()
