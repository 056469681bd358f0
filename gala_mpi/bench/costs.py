"""What `gala-mpi bench` times, by name, and how it is kept.

    memcpy      of a message, into shared memory of the kind that a window is made of
    average     the yardstick of `mix`: two reads and one write for each parameter, no checks
    pack        parameters into a narrow wire type
    post        one message to the first out-neighbour, its check that it is finite and its packing included
    take        one message from the first in-neighbour: two atomics, no byte of the payload
    mix         of that one message
    exchange    a whole `Gossip.step` that mixes: what the learner's thread pays for one update
    delivery    from `post` until the message has arrived, where a courier carries it
    Allreduce   MPI's, blocking, in place, on the parameters
    gloo        torch.distributed's all-reduce, on the parameters

`one`: one rank is at work. `all`: all ranks do the same at the same time. See `exchange_cost`, which measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

MEMCPY, AVERAGE, PACK, POST, TAKE, MIX = "memcpy", "average", "pack", "post", "take", "mix"
EXCHANGE, DELIVERY, ALLREDUCE, GLOO = "exchange", "delivery", "Allreduce", "gloo"
NAMES = (MEMCPY, AVERAGE, PACK, POST, TAKE, MIX, EXCHANGE, DELIVERY, ALLREDUCE, GLOO)
ONE, ALL = "one", "all"


@dataclass(frozen=True)
class Timing:
    """One round: seconds that the call took, and of processor time until all that it began was done.

    `preempted`: how often the calling thread had to leave its core to another process meanwhile.
    """

    wall_s: float
    cpu_s: float
    preempted: float


@dataclass(frozen=True)
class Costs:
    """Of one size: `timings[name, mode]` has one entry a round, the mean over the ranks that were timed.

    `mixed` is the share of the messages that the exchanges found and mixed: 1, or they were not whole ones.
    """

    parameters: int
    message_bytes: int
    ways: tuple[tuple[str, ...], ...]
    mixed: float | None
    timings: dict[tuple[str, str], list[Timing]]


def over_ranks(ranks: Sequence[Sequence[Timing]]) -> list[Timing]:
    """The mean over the ranks, round by round."""
    rounds = zip(*ranks, strict=True)
    return [
        Timing(mean(t.wall_s for t in timings), mean(t.cpu_s for t in timings), mean(t.preempted for t in timings))
        for timings in rounds
    ]
