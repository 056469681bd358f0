"""mpirun -n 8 python tests/gossip/programs/survivors.py --silent 3 4 --topology ring

Some ranks fall silent in the middle of gossip, and come back later. Each rank marks an element of the parameters that
is its own, another one in each act; whoever has a mark above zero has heard of that rank, by whatever way:

    1  all ranks step                   until each has heard of all
    2  some are silent                  until each of the others has heard of all others, and knows what share they are
    3  all step again                   until each has heard of all, and the ring of survivors is given up

Rank 0, which is never silent, prints the acts. A wait that is too long ends the job.
"""

from __future__ import annotations

import argparse
import faulthandler
import time
from collections.abc import Callable

import torch
from mpi4py import MPI
from torch import nn

import gala_mpi

DEADLINE_S = 400.0
COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size


class Marks(nn.Module):
    """An element for each rank in each act."""

    def __init__(self) -> None:
        super().__init__()
        self.marks = nn.Parameter(torch.zeros(4, SIZE))


def gossip_until(gossip: gala_mpi.Gossip, model: Marks, act: int, done: Callable[[], bool]) -> None:
    """Step, with this rank's mark of the act, until all that step are done."""
    members = COMM.Create_group(COMM.group.Incl(stepping[act]))
    met: MPI.Request | None = None
    while met is None or not met.Test():
        with torch.no_grad():
            model.marks[act, RANK] = 1.0
        gossip.step()
        if met is None and done():
            met = members.Ibarrier()
        time.sleep(0.002)
    members.Free()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--silent", type=int, nargs="+", required=True)
parser.add_argument("--topology", default="ring")
parser.add_argument("--timeout-s", type=float, default=2.0)
arguments = parser.parse_args()
faulthandler.dump_traceback_later(DEADLINE_S, exit=True)
everyone = list(range(SIZE))
survivors = [rank for rank in everyone if rank not in arguments.silent]
stepping = {1: everyone, 2: survivors, 3: everyone}

model = Marks()
with gala_mpi.Gossip(model, COMM, arguments.topology, neighbour_timeout_s=arguments.timeout_s) as gossip:

    def heard(act: int) -> bool:
        return bool((model.marks[act, stepping[act]] > 0).all())

    gossip_until(gossip, model, 1, lambda: heard(1) and gossip.share == 1)
    if RANK in survivors:
        gossip_until(gossip, model, 2, lambda: heard(2) and gossip.share == len(survivors) / SIZE)
        if RANK == 0:
            print("survivors are one graph", flush=True)
            for rank in arguments.silent:
                COMM.send(None, rank)
    else:
        request = COMM.irecv(source=0)
        while not request.test()[0]:
            time.sleep(0.01)
    gossip_until(gossip, model, 3, lambda: heard(3) and gossip.share == 1 and gossip.detour == (None, None))
    if RANK == 0:
        print("all are back", flush=True)
