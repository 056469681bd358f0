"""The board of ranks on pretended nodes: mpirun -n 8 python tests/train/programs/board_properties.py RANKS_PER_NODE

Ranks take steps at speeds of their own, one asks all to stop, and they end in different ways. In the moment in which a
rank sees that all are done, it must know all sums to the last step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from mpi4py import MPI

from gala_mpi.gossip.courier import Courier
from gala_mpi.learning.environments import Episode
from gala_mpi.mpi.waiting import wait_until
from gala_mpi.train.board import RECENT_EPISODES, Board

DEADLINE_S = 240
BEFORE = 1_000
UPDATES = 200
world = MPI.COMM_WORLD
size = world.size
per_node = int(sys.argv[1])


def steps_of(rank: int) -> int:
    return BEFORE + UPDATES * (rank + 1)


def returns_of(rank: int) -> list[float]:
    """Rank 0 has few episodes, all others enough."""
    return [100.0 * rank + number for number in range(5 if rank == 0 else UPDATES)]


def come_by_until(board: Board, done: Callable[[], bool]) -> None:
    def look() -> bool:
        board.come_by()
        return done()

    assert wait_until(look, DEADLINE_S), f"rank {world.rank}"


def check_the_end(board: Board) -> None:
    """All is known exactly."""
    kept = [returns_of(rank)[-math.ceil(RECENT_EPISODES / size) :] for rank in range(size)]
    overview = board.overview()
    assert board.total_steps == overview.agent_steps == sum(map(steps_of, range(size)))
    assert overview.episodes == sum(len(returns_of(rank)) for rank in range(size))
    assert overview.averaged == sum(map(len, kept))
    assert math.isclose(overview.mean_return, sum(map(sum, kept)) / overview.averaged)
    assert overview.staleness == size - 1
    assert (board.diverged, board.failed, board.unwritten) == ([1], [2, 3], [3])
    assert board.lost == [] and board.speaker == 0


courier = Courier(world, "inline")
courier.leaders = [rank - rank % per_node for rank in range(size)]
board = Board(world, courier, 60.0)
rank = world.rank
assert math.isnan(board.overview().mean_return) and board.overview().averaged == 0
board.go_on_from([BEFORE] * size, 7, 0)
assert board.total_steps == BEFORE * size
for update in range(1, UPDATES + 1):
    board.note_episodes([Episode(0, value, 1) for value in returns_of(rank)[update - 1 : update]])
    board.report(BEFORE + update * (rank + 1), update, rank)
assert not (rank == 4 and board.stop_requested)
if rank == 4:
    board.ask_all_to_stop()
come_by_until(board, lambda: board.stop_requested)
assert not board.all_done
board.finish(diverged=rank == 1, failed=rank in (2, 3), unwritten=rank == 3)
come_by_until(board, lambda: board.all_done)
check_the_end(board)
board.meet()
come_by_until(board, world.Ibarrier().Test)
check_the_end(board)
courier.free()
board.free()
if rank == 0:
    print("as promised")
