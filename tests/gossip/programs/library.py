"""mpirun -n 4 python -m mpi4py tests/gossip/programs/library.py [--sizes 1 2 3 4] [--raise]

What a user of gala_mpi.Gossip may rely on. For each of the sizes as many of the ranks, with a communicator of their
own, run all scenarios in turn, each an invariant under its name; rank 0 prints `ok SIZE NAME` when all of them have
come through. A failed assertion ends the job, by `-m mpi4py`.

With --raise the last rank raises in the middle of its loop, which has to end the others too.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

import gala_mpi
from gala_mpi.gossip.shared_rows import BEAT
from gala_mpi.gossip.topology import Topology, make_topology

# Those of the scenarios that run.
COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
LAST = SIZE - 1
# Far above what any wait takes here that ends by itself; a step that ran into the timeout is seen by its duration.
TIMEOUT_S = 30.0
SIZE_WITHIN_S = 900.0


def rank_model(seed: int = 0) -> nn.Sequential:
    """A model that differs from rank to rank."""
    torch.manual_seed(1000 * seed + RANK)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def vector(model: nn.Module) -> np.ndarray:
    """All parameters of the model, (n,) float64."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()


def on_all(model: nn.Module) -> np.ndarray:
    """Parameters of all ranks, (N, n). Collective."""
    return np.array(COMM.allgather(vector(model)))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One update on data of this rank's own."""
    optimizer.zero_grad(set_to_none=True)
    model(torch.randn(8, 7)).square().mean().backward()
    optimizer.step()


@contextmanager
def raises(kind: type[Exception], text: str) -> Iterator[None]:
    """The block raises such an error, which says `text`."""
    try:
        yield
    except kind as error:
        assert text in str(error), (text, str(error))
    else:
        raise AssertionError(f"no {kind.__name__} that says {text}")


def all_ranks_start_from_what_rank_0_has() -> None:
    model = rank_model()
    model[0].weight.requires_grad_(False)
    model.register_parameter("fixed", nn.Parameter(torch.full((2,), float(RANK)).half(), requires_grad=False))
    model[1].running_mean.fill_(RANK)
    expected = COMM.bcast(vector(model))
    with gala_mpi.Gossip(model, COMM) as gossip:
        assert (vector(model) == expected).all()
        assert model.fixed.dtype == torch.float16 and (model.fixed == 0).all()
        frozen = model[0].weight.clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            learn(model, optimizer)
            gossip.step()
        # What is frozen is not exchanged, so not even rounded; running statistics are each rank's own.
        assert torch.equal(model[0].weight, frozen)
    assert len({float(mean) for mean in COMM.allgather(model[1].running_mean[0])}) == SIZE


def an_optimiser_may_be_made_before_or_after() -> None:
    for before in (True, False):
        model = rank_model()
        objects = list(model.parameters())
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5) if before else None
        with gala_mpi.Gossip(model, COMM, max_staleness=0) as gossip:
            optimizer = optimizer or torch.optim.AdamW(model.parameters(), weight_decay=0.5)
            start = vector(model)
            for _ in range(10):
                learn(model, optimizer)
                gossip.step()
            assert all(old is new for old, new in zip(objects, list(model.parameters())[1:], strict=True))
            # No gradient was made for what has none: weight decay leaves it alone.
            assert (model.unused == 1).all() and model.unused.grad is None
            assert not np.array_equal(vector(model), start)
            assert (gossip.counters.messages_mixed > 0) == (SIZE > 1)


def nodes_of_two() -> Topology:
    """A hierarchy of as many nodes of two ranks as there are."""
    return make_topology("hierarchical", SIZE, [f"node{rank // 2}" for rank in range(SIZE)])


def shifting() -> Topology:
    """Each rank sends one further at each update."""

    def edges(update: int) -> list[tuple[int, int, float]]:
        return [(rank, (rank + update) % SIZE, 0.4) for rank in range(SIZE)] if SIZE > 1 else []

    return gala_mpi.make_changing_topology(edges, SIZE, max(LAST, 1))


def in_lockstep_a_mix_is_the_mixing_matrix_and_keeps_the_mean() -> None:
    topologies: list[str | Topology] = ["ring", "bidirectional-ring", "one-peer-exponential", "complete", "star"]
    topologies += ["base-2", "auto", shifting()]
    for topology in (*topologies, nodes_of_two()):
        for wire, relative in (("float32", 2**-22), ("bfloat16", 2**-8), ("float16", 2**-10)):
            model = rank_model()
            rng = np.random.default_rng(RANK)
            with gala_mpi.Gossip(model, COMM, topology, wire=wire, max_staleness=0) as gossip:
                for update in range(1, 6):
                    with torch.no_grad():
                        for parameter in model.parameters():
                            parameter += torch.from_numpy(rng.normal(size=parameter.shape)).float()
                    before = on_all(model)
                    gossip.step()
                    after = on_all(model)  # nobody posts again before everyone has mixed
                    matrix = gossip.topology.mixing_matrix(update)
                    error = relative * np.abs(before).max()
                    np.testing.assert_allclose(after, matrix @ before, rtol=0, atol=error)
                    np.testing.assert_allclose(after.mean(0), before.mean(0), rtol=0, atol=error)
                    assert SIZE == 1 or not np.allclose(after, before, rtol=0, atol=error)


def diverge_at(update: int, model: nn.Module, now: int) -> None:
    if RANK == LAST and now == update:
        model[0].weight.data[0, 0] = torch.nan


def a_rank_that_diverges_adopts_and_poisons_nobody() -> None:
    for topology in ("ring", "one-peer-exponential", "base-2", nodes_of_two()):
        model = rank_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        adopted = 0
        with gala_mpi.Gossip(model, COMM, topology, neighbour_timeout_s=TIMEOUT_S, max_staleness=2) as gossip:
            for update in range(1, 31):
                learn(model, optimizer)
                diverge_at(10, model, update)
                if SIZE == 1 and update == 10:
                    with raises(gala_mpi.DivergedError, "no neighbour"):
                        gossip.step()
                    break
                if gossip.step():
                    optimizer.state.clear()
                    adopted += 1
                assert np.isfinite(vector(model)).all()
            counters = gossip.counters
        assert counters.divergences == (RANK == LAST) and adopted == (counters.divergences if SIZE > 1 else 0)
        # Parameters that are not finite were not even sent; at size 1 there is nobody to send them to.
        assert counters.messages_rejected == 0


def a_silent_neighbour_keeps_nobody_from_mixing() -> None:
    if SIZE < 3:
        return
    with gala_mpi.Gossip(rank_model(), COMM, "complete", neighbour_timeout_s=TIMEOUT_S) as gossip:
        # The last rank is there, and takes no step.
        met = COMM.Ibarrier() if RANK == LAST else None
        while met is None or not met.Test():
            if RANK != LAST:
                gossip.step()
            if met is None and gossip.counters.messages_mixed >= 5:
                met = COMM.Ibarrier()
            time.sleep(0.002)
        # It was not for its being lost that the others mixed.
        assert not any(neighbour.lost for neighbour in gossip.in_neighbours)


def a_rank_that_diverges_while_it_is_waited_for_goes_on_at_once() -> None:
    if SIZE == 1:
        return
    model = rank_model()
    with gala_mpi.Gossip(model, COMM, neighbour_timeout_s=TIMEOUT_S, max_staleness=0) as gossip:
        longest_s = 0.0
        post, posted = gossip.post_and_mix, 0

        def post_and_fall_asleep(*args: Any) -> bool:
            nonlocal posted
            finite = post(*args)
            posted += finite
            time.sleep(0.2)
            return finite

        if RANK == LAST:
            # As if the system took the processor away: meanwhile the others mix this message and post once more,
            # so that this rank mixes now what they posted before the wait for its next message.
            gossip.post_and_mix = post_and_fall_asleep
        for update in range(1, 6):
            diverge_at(4, model, update)
            begin = time.monotonic()
            assert gossip.step() == (RANK == LAST and update == 4)
            longest_s = max(longest_s, time.monotonic() - begin)
            assert np.isfinite(vector(model)).all()
        assert longest_s < TIMEOUT_S / 3, longest_s
        assert posted == (4 if RANK == LAST else 0)


def a_message_that_is_not_finite_is_not_mixed() -> None:
    """No rank of this library sends one; a broken one might."""
    if SIZE == 1:
        return
    model = rank_model()
    for wire in ("float32", "bfloat16"):
        with gala_mpi.Gossip(model, COMM, wire=wire) as gossip:
            if RANK == LAST:
                payload = np.ones(gossip._flat.size, np.float32 if wire == "float32" else np.uint16)
                payload.view(np.uint8)[-4:] = 0xFF
                (outbox,) = gossip.outboxes.values()
                outbox.post(payload, update=1, time_s=time.time(), agent_steps=0, wire=int(wire == "bfloat16"))
            COMM.Barrier()
            before = vector(model)
            if RANK == (LAST + 1) % SIZE:
                gossip.step()
                assert gossip.counters.messages_rejected == 1 and gossip.counters.messages_mixed == 0
                assert gossip.counters.staleness == 1 and gossip.in_neighbours[0].held is None
                assert np.array_equal(vector(model), before)
            # What the sender says at its end would replace its message.
            COMM.Barrier()


def a_rank_may_stop_when_it_diverges_and_its_last_message_is_never_mixed() -> None:
    model = rank_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gala_mpi.Gossip(model, COMM, on_divergence="stop") as gossip:
        for update in range(1, 11):
            learn(model, optimizer)
            diverge_at(10, model, update)
            if RANK == LAST and update == 10:
                with raises(gala_mpi.DivergedError, "after update 10"):
                    gossip.step()
            else:
                gossip.step()
        if RANK == LAST:
            gossip.finish()  # says that no other message will come, and sends none of its parameters
        COMM.Barrier()
        if SIZE > 1 and RANK == (LAST + 1) % SIZE:
            deadline = time.monotonic() + TIMEOUT_S
            while not gossip.in_neighbours[0].finished and time.monotonic() < deadline:
                gossip.step()
            assert gossip.in_neighbours[0].finished and not gossip.counters.messages_rejected
        assert gossip.counters.divergences == (RANK == LAST)
        assert np.isfinite(vector(model)).all() == (RANK != LAST)


def a_rank_that_ends_early_waits_for_the_others_and_holds_none_up() -> None:
    for topology in ("ring", "one-peer-exponential", "base-2", "base-3", "complete"):
        model = rank_model()
        gossip = gala_mpi.Gossip(model, COMM, topology, max_staleness=0, neighbour_timeout_s=TIMEOUT_S)
        for _ in range(5 if RANK == LAST else 40):
            begin = time.monotonic()
            gossip.step()
            assert time.monotonic() - begin < TIMEOUT_S / 3
            time.sleep(0.002)
        ended = time.time()
        gossip.close()
        closed = time.time()
        # All ranks of this program share a clock.
        assert closed >= max(COMM.allgather(ended)) - 0.001


def what_cannot_be_used_is_refused_on_all_ranks() -> None:
    def refused(text: str, make: Callable[[], gala_mpi.Gossip]) -> None:
        with raises(ValueError, text):
            make()

    def only_last(bad: object, good: object) -> object:
        return bad if RANK == LAST else good

    lazy, frozen = nn.LazyLinear(3), nn.Linear(2, 2).requires_grad_(False)
    twice = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twice[1].weight = nn.Parameter(twice[0].weight.detach().t())
    for text, model in (
        ("complex64", nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])),
        ("no parameters", nn.ReLU()),
        ("no parameters to train", frozen),
        ("without a shape", lazy),
        ("shared", twice),
        ("meta", nn.Linear(2, 2, device="meta")),
    ):
        refused(text, lambda model=model: gala_mpi.Gossip(only_last(model, nn.Linear(2, 2)), COMM))
    for name, value, good in (
        ("topology", "triangle", "ring"),
        ("make_changing_topology", lambda update: [], "ring"),
        ("topology", None, "ring"),
        ("topology", make_topology("ring", SIZE + 1), "ring"),
        ("wire", "float8", "float32"),
        ("delivery", "pigeon", "auto"),
        ("on_divergence", "ignore", "stop"),
        ("max_staleness", -1, 3),
        ("neighbour_timeout_s", 0.0, 60.0),
    ):
        options = {"topology" if callable(value) else name: only_last(value, good)}
        refused(name, lambda options=options: gala_mpi.Gossip(nn.Linear(2, 2), COMM, **options))
    refused("has no attribute", lambda: gala_mpi.Gossip(only_last(None, nn.Linear(2, 2)), COMM))


def what_differs_between_ranks_is_refused_on_all() -> None:
    if SIZE == 1:
        return
    narrow, wide = nn.Linear(2, 3), nn.Linear(3, 2)
    convolution = nn.Conv2d(3, 4, 2)
    wires = "float16" if RANK else "float32"
    for text, model, options in (
        ("number of trained parameters", narrow if RANK else wide, {}),
        ("layout", nn.Sequential(narrow) if RANK else narrow, {}),
        ("layout", convolution.to(memory_format=torch.channels_last) if RANK else nn.Conv2d(3, 4, 2), {}),
        ("topology", narrow, {"topology": "complete" if RANK else "ring"}),
        ("edges of the topology", narrow, {"topology": nodes_of_two() if RANK else "hierarchical"}),
        ("wire", narrow, {"wire": wires}),
        ("max_staleness", narrow, {"max_staleness": RANK}),
        ("neighbour_timeout_s", narrow, {"neighbour_timeout_s": 10.0 + RANK}),
        ("delivery", narrow, {"delivery": "inline" if RANK else "background"}),
        ("on_divergence", narrow, {"on_divergence": "adopt" if RANK else "stop"}),
    ):
        if text.startswith("edges") and SIZE == 2:
            continue  # one node of two ranks is what "hierarchical" finds too
        with raises(gala_mpi.DisagreementError, text):
            gala_mpi.Gossip(model, COMM, **options)
    # Nothing is left behind: the next one works.
    with gala_mpi.Gossip(narrow, COMM) as gossip:
        gossip.step()


def a_model_that_is_changed_afterwards_is_found_at_the_next_step() -> None:
    def replace(model: nn.Sequential) -> None:
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())

    def assign(model: nn.Sequential) -> None:
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)

    changes: list[Callable[[nn.Sequential], object]] = [
        lambda model: model.double(),
        lambda model: model.half(),
        lambda model: model[2].to("meta"),
        replace,
        assign,
        lambda model: model.append(nn.Linear(3, 3)),
        lambda model: model[1].requires_grad_(True),
        lambda model: gala_mpi.Gossip(model, COMM).close(),
    ]
    for change in changes:
        model = rank_model()
        model[1].requires_grad_(False)
        with gala_mpi.Gossip(model, COMM) as gossip:
            gossip.step()
            change(model)
            with raises(RuntimeError, "is not where it is exchanged"):
                gossip.step()
    model = rank_model()
    with gala_mpi.Gossip(model, COMM) as gossip:
        model.load_state_dict(rank_model(1).state_dict())
        model.eval().train().float().cpu()
        model[0].requires_grad_(False)
        model.register_parameter("nothing", None)
        gossip.step()


def tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with gala_mpi.Gossip(model, COMM, "complete", max_staleness=0) as gossip:
        with torch.no_grad():
            model[1].weight.fill_(float(RANK))
        gossip.step()
        COMM.Barrier()  # a rank that closes earlier posts what it has mixed, in place of what it posted before
        assert model[1].weight is model[0].weight
        torch.testing.assert_close(model[0].weight.detach(), torch.full((4, 4), LAST / 2))


def two_models_can_be_gossiped_at_once() -> None:
    first, second = rank_model(), nn.Linear(2, 2)
    with gala_mpi.Gossip(first, COMM) as one, gala_mpi.Gossip(second, COMM, "complete") as other:
        for _ in range(20):
            one.step()
            other.step()


def closing_is_done_once_and_ends_the_exchange() -> None:
    with gala_mpi.Gossip(rank_model(), COMM) as gossip:
        gossip.step()
        gossip.close()
        gossip.close()
        with raises(RuntimeError, "closed"):
            gossip.step()


def a_close_that_timed_out_leaves_the_communicator_alone_and_may_be_called_again() -> None:
    if SIZE == 1:
        return
    with gala_mpi.Gossip(rank_model(), COMM) as gossip:
        gossip.step()
        if RANK != LAST:
            with raises(TimeoutError, "some rank has not come"):
                gossip.close(timeout_s=0.1)
        # A message of the user's own says that they have come so far, without the library's barrier.
        barrier = COMM.Ibarrier() if RANK == LAST else None
        if barrier is not None:
            time.sleep(0.3)
            # The others begin this one only after the message.
            assert not barrier.Test()
            for rank in range(LAST):
                COMM.send(None, rank)
        else:
            COMM.recv(source=LAST)
            barrier = COMM.Ibarrier()
        barrier.Wait()
        assert COMM.allreduce(RANK) == SIZE * LAST // 2
    with raises(RuntimeError, "closed"):
        gossip.step()


def a_restart_goes_on_from_what_each_rank_had() -> None:
    model = rank_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gala_mpi.Gossip(model, COMM) as gossip:
        for _ in range(5):
            learn(model, optimizer)
            gossip.step()
        saved = json.loads(json.dumps(gossip.state_dict()))
    before = vector(model)
    # Ranks have parameters of their own, and so they stay.
    assert SIZE == 1 or not (on_all(model) == before).all()
    again = rank_model(seed=1)
    again.load_state_dict(model.state_dict())
    with gala_mpi.Gossip(again, COMM, broadcast=False) as gossip:
        gossip.load_state_dict(saved)
        assert (vector(again) == before).all()
        assert json.dumps(gossip.state_dict()) == json.dumps(saved)
        assert (gossip.counters.messages_sent > 0) == (SIZE > 1)
        gossip.step()
        assert gossip.state_dict()["update"] == 6
        before = json.dumps(gossip.state_dict())
        for wrong in ({}, {**saved, "heard": None}, {**saved, "update": "soon"}):
            with raises(ValueError, "no state of an exchange"):
                gossip.load_state_dict(wrong)
        assert json.dumps(gossip.state_dict()) == before
        # What a later version counts is no hindrance.
        gossip.load_state_dict({**saved, "counters": {**saved["counters"], "messages_read_aloud": 3}})
    with raises(gala_mpi.DisagreementError, "broadcast") if SIZE > 1 else nullcontext():
        gala_mpi.Gossip(rank_model(), COMM, broadcast=RANK == 0).close()


def the_mean_of_all_ranks_is_the_mean_and_they_are_apart_from_it_by_the_distance() -> None:
    for wire in ("float32", "bfloat16"):
        model = rank_model()
        expected = on_all(model)
        with gala_mpi.Gossip(model, COMM, wire=wire, broadcast=False) as gossip:
            apart = np.sqrt(np.square(expected - expected.mean(0)).sum(1).mean())
            assert np.isclose(gossip.consensus_distance(), apart, rtol=1e-5)
            gossip.average()
            assert np.allclose(vector(model), expected.mean(0), rtol=0, atol=1e-6)
            assert (on_all(model) == vector(model)).all()
            assert gossip.consensus_distance() < 1e-5


def who_has_diverged_is_left_out_of_the_mean_and_gets_it() -> None:
    model = rank_model()
    expected = on_all(model)[: max(LAST, 1)]
    with gala_mpi.Gossip(model, COMM, broadcast=False) as gossip:
        if SIZE > 1:
            model[1].running_mean.fill_(torch.inf if RANK == LAST else RANK)
            if RANK == LAST:
                with torch.no_grad():
                    model[0].weight[0, 0] = torch.nan
            apart = np.sqrt(np.square(expected - expected.mean(0)).sum(1).mean())
            assert np.isclose(gossip.consensus_distance(), apart, rtol=1e-5)
            assert gossip.average(buffers=True) == (RANK == LAST)
            torch.testing.assert_close(model[1].running_mean, torch.full((5,), (LAST - 1) / 2))
        assert np.allclose(on_all(model), expected.mean(0), rtol=0, atol=1e-6)
        # Where all agree on it, it is no accident: a mask, say.
        model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        assert not gossip.average(buffers=True)
        assert model.mask.tolist() == [0.0, -torch.inf]
        with torch.no_grad():
            model[0].weight[0, 0] = torch.nan
        for call in (gossip.average, gossip.consensus_distance):
            with raises(gala_mpi.DivergedError, "no rank has parameters that are finite"):
                call()


def who_waits_for_the_mean_is_there_for_the_others() -> None:
    if SIZE == 1:
        return
    model = rank_model()
    with gala_mpi.Gossip(model, COMM) as gossip:
        rows, deadline = gossip._own_roster.rows, time.monotonic() + TIMEOUT_S
        heard = [neighbour for neighbour in gossip.in_neighbours if neighbour.rank == LAST]
        if RANK != LAST:
            seen = set()
            while len(seen) < 5 or not all(neighbour.finished for neighbour in heard):
                gossip.step()
                seen.add(int(rows[LAST, BEAT]))
                assert time.monotonic() < deadline
                time.sleep(0.01)
        gossip.average()
        # And goes on after it.
        while True:
            gossip.step()
            if COMM.allreduce(int(any(neighbour.finished for neighbour in heard))) == 0:
                break
            assert time.monotonic() < deadline


def who_waits_for_the_mean_looks_after_what_the_user_does() -> None:
    if SIZE == 1:
        return
    calls = []
    with gala_mpi.Gossip(rank_model(), COMM, while_waiting=lambda: calls.append(1)) as gossip:
        if RANK != LAST:
            gossip.average()
            assert calls
        else:
            time.sleep(0.1)
            gossip.average()


def after_a_mean_that_nobody_came_to_the_rest_goes_on() -> None:
    if SIZE == 1:
        return
    model = rank_model()
    with gala_mpi.Gossip(model, COMM) as gossip:
        before = vector(model)
        if RANK != LAST:
            with raises(TimeoutError, "some rank has not come to this mean"):
                gossip.average(timeout_s=0.1)
            assert (vector(model) == before).all()
            for call in (gossip.average, gossip.consensus_distance):
                with raises(RuntimeError, "out of step"):
                    call()
        COMM.Barrier()
        gossip.step()


def the_mean_is_taken_of_what_is_exchanged_alone() -> None:
    model = rank_model()
    gossip = gala_mpi.Gossip(model, COMM)
    model.half()
    for call in (gossip.average, gossip.consensus_distance):
        with raises(RuntimeError, "is not where it is exchanged"):
            call()
    gossip.close()
    for call in (gossip.average, gossip.consensus_distance):
        with raises(RuntimeError, "closed"):
            call()


def other_types_have_one_mean_to_the_last_digit_and_are_restored_to_it() -> None:
    for kind in (gala_mpi.Gossip, gala_mpi.NodeGossip):
        for dtype in (torch.float64, torch.bfloat16):
            model = nn.ParameterList([nn.Parameter(torch.full((3,), RANK + 1 / 3, dtype=dtype))])
            with kind(model, COMM, broadcast=False) as gossip:
                assert (model[0] == torch.tensor(RANK + 1 / 3, dtype=dtype)).all()
                saved = gossip.state_dict()
                gossip.average()
                expected = torch.full((3,), LAST / 2 + 1 / 3, dtype=torch.float64)
                error = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
                if kind is gala_mpi.Gossip:
                    torch.testing.assert_close(model[0].detach().double(), expected, rtol=error, atol=0)
                values = COMM.allgather(model[0].detach().double().numpy())
                assert all((other == values[0]).all() for other in values)
                assert gossip.consensus_distance() < 1e-6
                gossip.load_state_dict(saved)
                gossip.step()


def parameters_of_other_types_are_averaged_in_their_own() -> None:
    types = (torch.float64, torch.bfloat16, torch.float16, torch.float32)
    model = nn.ParameterList([nn.Parameter(torch.full((3, 2), RANK + 1 / 3, dtype=dtype)) for dtype in types])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with gala_mpi.Gossip(model, COMM, "complete", max_staleness=0, neighbour_timeout_s=TIMEOUT_S) as gossip:
        # As rank 0's, to the last digit.
        assert all((parameter == torch.tensor(1 / 3, dtype=parameter.dtype)).all() for parameter in model)
        for parameter in model:
            parameter.grad = torch.full_like(parameter, -RANK)
        optimizer.step()
        alone = [parameter.clone() for parameter in model]
        gossip.step()
        COMM.Barrier()  # a rank that closes earlier posts what it has mixed, in place of what it posted before
        for parameter, before, dtype in zip(model, alone, types, strict=True):
            assert parameter.dtype == dtype
            expected = torch.full((3, 2), LAST / 2 + 1 / 3, dtype=torch.float64)
            error = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * SIZE
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=error)
            assert SIZE > 1 or torch.equal(parameter, before)
        model.double()
        with raises(RuntimeError, "is not where it is exchanged"):
            gossip.step()
    with gala_mpi.Gossip(model, COMM, "complete") as gossip:
        if RANK != LAST:
            gossip.step()
        COMM.Barrier()
        if RANK == LAST and SIZE > 1:
            # Beyond float32 is as good as infinite: this rank goes on with a neighbour's.
            with torch.no_grad():
                model[0].fill_(1e300)
            assert gossip.step() and (model[0].abs() < 10).all()


def the_mean_of_buffers_is_taken_on_request() -> None:
    model = rank_model()
    model[1].running_mean.fill_(RANK)
    model[1].num_batches_tracked.fill_(RANK)
    with gala_mpi.Gossip(model, COMM) as gossip:
        gossip.average()
        assert (model[1].running_mean == RANK).all()
        gossip.average(buffers=True)
        torch.testing.assert_close(model[1].running_mean, torch.full((5,), LAST / 2))
        assert int(model[1].num_batches_tracked) == RANK
        if SIZE > 1:
            model.register_buffer("own", torch.zeros(1 + RANK))
            before = vector(model)
            with raises(gala_mpi.DisagreementError, "buffers must be the same on all ranks"):
                gossip.average(buffers=True)
            assert (vector(model) == before).all()
    with gala_mpi.Gossip(np.zeros(3, np.float32), COMM) as gossip, raises(ValueError, "buffers are those of a model"):
        gossip.average(buffers=True)


def ranks_of_a_node_go_on_as_one() -> None:
    node = COMM.Split(RANK // 2)
    nodes = (SIZE + 1) // 2
    options: dict[str, Any] = {"node": node, "neighbour_timeout_s": TIMEOUT_S, "node_timeout_s": 4 * TIMEOUT_S}
    model = rank_model()
    with gala_mpi.NodeGossip(model, COMM, "complete", max_staleness=0, **options) as gossip:
        assert (on_all(model) == vector(model)).all() and (gossip.gossip is None) == bool(RANK % 2)
        with torch.no_grad():
            model[2].bias.fill_(RANK)
        assert not gossip.step()
        COMM.Barrier()
        expected = np.mean([np.mean([rank for rank in range(SIZE) if rank // 2 == place]) for place in range(nodes)])
        torch.testing.assert_close(model[2].bias.detach(), torch.full((3,), float(expected)))
        assert gossip.consensus_distance() < 1e-6
        with torch.no_grad():
            model[2].bias.fill_(RANK)
        # Which changes nothing.
        assert (gossip.consensus_distance() > 0) == (nodes > 1) and (model[2].bias == RANK).all()
        model[1].running_mean.fill_(RANK)
        gossip.average()
        assert (model[1].running_mean == RANK).all()
        gossip.average(buffers=True)
        torch.testing.assert_close(model[1].running_mean, torch.full((5,), float(expected)))
        torch.testing.assert_close(model[2].bias.detach(), torch.full((3,), float(expected)))
        with torch.no_grad():
            model[2].bias.fill_(RANK)
        # Of nodes, whatever their number of ranks.
        gossip.average()
        torch.testing.assert_close(model[2].bias.detach(), torch.full((3,), float(expected)))
        saved = gossip.state_dict()
        assert bool(saved) == (gossip.gossip is not None)
        gossip.load_state_dict(saved)
    with raises(RuntimeError, "closed"):
        gossip.step()
    with raises(gala_mpi.DisagreementError, "wire"):
        gala_mpi.NodeGossip(rank_model(), COMM, node=node, wire="float8")
    with raises(gala_mpi.DisagreementError, "colour: no option"):
        gala_mpi.NodeGossip(rank_model(), COMM, node=node, **({"colour": "red"} if RANK == LAST else {}))
    if SIZE > 1:
        with gala_mpi.NodeGossip(rank_model(), COMM, node=node) as gossip:
            if RANK != LAST:
                with raises(TimeoutError, "some rank has not come"):
                    gossip.close(timeout_s=0.1)
            COMM.Barrier()
    with gala_mpi.NodeGossip(model, COMM, "complete", **options) as gossip:
        spoilt = RANK // 2 == LAST // 2
        if not spoilt:
            gossip.step()
        COMM.Barrier()
        if spoilt:
            # By one of its ranks: the node goes on with another's, or ends.
            if RANK == LAST:
                model[0].weight.data[0, 0] = torch.nan
            if nodes > 1:
                assert gossip.step() and np.isfinite(vector(model)).all()
            else:
                with raises(gala_mpi.DivergedError, "not finite"):
                    gossip.step()
    mine = {**options, "node_timeout_s": 0.1}
    with gala_mpi.NodeGossip(model, COMM, "complete", **mine) as gossip:
        if node.size > 1 and node.rank == 0:
            with raises(TimeoutError, "some rank has not come to this step of this node"):
                gossip.step()
            with raises(RuntimeError, "out of step"):
                gossip.step()
        COMM.Barrier()
    node.Free()
    # All ranks of this program share memory.
    with gala_mpi.NodeGossip(rank_model(), COMM) as gossip:
        assert (gossip.gossip is None) == (RANK > 0)
        gossip.step()


def an_array_is_gossiped_as_it_is() -> None:
    values = np.full((3, 5), RANK, np.float32)
    with gala_mpi.Gossip(values, COMM, "complete", max_staleness=0, broadcast=False) as gossip:
        gossip.step()
        assert np.allclose(COMM.allgather(values), LAST / 2)
    for wrong in (values.astype(float), np.zeros(0, np.float32), values.T):
        with raises(gala_mpi.DisagreementError, "expected float32, not empty, contiguous and writable"):
            gala_mpi.Gossip(wrong, COMM)


SCENARIOS: tuple[Callable[[], None], ...] = (
    all_ranks_start_from_what_rank_0_has,
    an_optimiser_may_be_made_before_or_after,
    in_lockstep_a_mix_is_the_mixing_matrix_and_keeps_the_mean,
    a_rank_that_diverges_adopts_and_poisons_nobody,
    a_silent_neighbour_keeps_nobody_from_mixing,
    a_rank_that_diverges_while_it_is_waited_for_goes_on_at_once,
    a_message_that_is_not_finite_is_not_mixed,
    a_rank_may_stop_when_it_diverges_and_its_last_message_is_never_mixed,
    a_rank_that_ends_early_waits_for_the_others_and_holds_none_up,
    what_cannot_be_used_is_refused_on_all_ranks,
    what_differs_between_ranks_is_refused_on_all,
    a_model_that_is_changed_afterwards_is_found_at_the_next_step,
    tied_parameters_stay_tied,
    two_models_can_be_gossiped_at_once,
    closing_is_done_once_and_ends_the_exchange,
    a_close_that_timed_out_leaves_the_communicator_alone_and_may_be_called_again,
    a_restart_goes_on_from_what_each_rank_had,
    the_mean_of_all_ranks_is_the_mean_and_they_are_apart_from_it_by_the_distance,
    who_has_diverged_is_left_out_of_the_mean_and_gets_it,
    who_waits_for_the_mean_is_there_for_the_others,
    who_waits_for_the_mean_looks_after_what_the_user_does,
    after_a_mean_that_nobody_came_to_the_rest_goes_on,
    the_mean_is_taken_of_what_is_exchanged_alone,
    other_types_have_one_mean_to_the_last_digit_and_are_restored_to_it,
    parameters_of_other_types_are_averaged_in_their_own,
    the_mean_of_buffers_is_taken_on_request,
    ranks_of_a_node_go_on_as_one,
    an_array_is_gossiped_as_it_is,
)


def run_scenarios(size: int, only: str) -> None:
    """Run them on the first `size` ranks; the others wait. Collective."""
    global COMM, RANK, SIZE, LAST
    COMM = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank < size)
    RANK, SIZE = COMM.rank, COMM.size
    LAST = SIZE - 1
    if MPI.COMM_WORLD.rank < size:
        for scenario in SCENARIOS:
            if only in scenario.__name__:
                begin = time.monotonic()
                scenario()
                COMM.Barrier()
                if RANK == 0:
                    print(f"ok {size} {scenario.__name__} {time.monotonic() - begin:.2f} s", flush=True)
    # Long sleeps: those that wait leave the cores to those that work.
    deadline, all_here = time.monotonic() + SIZE_WITHIN_S, MPI.COMM_WORLD.Ibarrier()
    while not all_here.Test():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all scenarios on {size} ranks within {SIZE_WITHIN_S} s")
        time.sleep(0.05)
    COMM.Free()


def raise_in_the_loop() -> None:
    """The last rank fails; the others would go on for ever."""
    with gala_mpi.Gossip(rank_model(), COMM, max_staleness=0) as gossip:
        for update in range(10**9):
            gossip.step()
            if RANK == LAST and update == 10:
                raise ZeroDivisionError("the user's own mistake")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--raise", action="store_true", dest="raise_")
    parser.add_argument("--only", default="")
    parser.add_argument("--sizes", type=int, nargs="+", default=[MPI.COMM_WORLD.size])
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if args.raise_:
        raise_in_the_loop()
    for size in args.sizes:
        run_scenarios(size, args.only)


if __name__ == "__main__":
    main()
