"""mpirun -n 3 python tests/gossip/programs/cluster_transfer.py --mbytes 4 --transfers 10

Rank 0 sends messages of `--mbytes` MB to every other rank in turn, `--transfers` times, and all check what they
received; then comes an Allreduce of the same size. Rank 0 prints, as one line of JSON, the host of each rank, the
ranks that it can share memory with, and the seconds of each part.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import socket
import time

import numpy as np
from mpi4py import MPI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbytes", type=float, default=4.0, help="size of a message")
    parser.add_argument("--transfers", type=int, default=1, help="messages to every other rank")
    parser.add_argument("--deadline-s", type=float, default=60.0)
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.deadline_s, exit=True)
    comm = MPI.COMM_WORLD
    neighbours = comm.Split_type(MPI.COMM_TYPE_SHARED).allgather(comm.rank)
    places = comm.gather((socket.gethostname(), neighbours))

    ordinals = np.arange(int(arguments.mbytes * 1e6) // 8, dtype=np.int64)
    buffer = np.empty_like(ordinals)
    comm.Barrier()
    begin = time.monotonic()
    for number in range(arguments.transfers):
        if comm.rank == 0:
            for target in range(1, comm.size):
                comm.Send(ordinals + number, target)
        else:
            comm.Recv(buffer, 0)
            assert np.array_equal(buffer, ordinals + number), f"message {number} differs"
    comm.Barrier()
    sent = time.monotonic()
    comm.Allreduce(ordinals + comm.rank, buffer)
    assert np.array_equal(buffer, ordinals * comm.size + sum(range(comm.size)))
    comm.Barrier()
    if comm.rank == 0:
        hosts, sharing = zip(*places, strict=True)
        seconds = {"send_s": sent - begin, "allreduce_s": time.monotonic() - sent}
        print(json.dumps({"hosts": hosts, "sharing": sharing, **seconds}))


if __name__ == "__main__":
    main()
