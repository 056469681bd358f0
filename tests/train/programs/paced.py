"""gala-mpi train at a set pace: mpirun -n 3 python tests/train/programs/paced.py 0.02 --preset cartpole

The first argument is the pause after each update, in seconds, so that runs last as long on any machine. With
NAN_AT=RANK:UPDATE in the environment the parameters of that rank (or of all) turn NaN at that update, by its
learner's hand. With TELL_SHARES each rank says at the end for what shares of all ranks it has learned.
"""

from __future__ import annotations

import math
import os
import sys
import time

from mpi4py import MPI

from gala_mpi import cli
from gala_mpi.learning import learner
from gala_mpi.train import agent

pause_s, args = float(sys.argv[1]), sys.argv[2:]
train, update = agent.Agent.train, learner.Learner.update
rank, _, when = os.environ.get("NAN_AT", "-1:0").partition(":")
calls, shares = [], set()


def paced(self, stop):
    summary = train(self, stop, on_update=lambda _: time.sleep(pause_s))
    if "TELL_SHARES" in os.environ:
        sys.stderr.write(f"[{MPI.COMM_WORLD.rank}] shares {sorted(shares)}\n")
    return summary


def breaking(self, *args, **kwargs):
    losses = update(self, *args, **kwargs)
    calls.append(1)
    shares.add(round(self.share, 2))
    if rank in ("all", str(MPI.COMM_WORLD.rank)) and len(calls) == int(when):
        self._flat.data[3] = math.nan
    return losses


agent.Agent.train, learner.Learner.update = paced, breaking
sys.exit(cli.train(args))
