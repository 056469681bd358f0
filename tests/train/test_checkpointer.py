"""When ranks write their checkpoints: spread where all come at the same time."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import Mpi

from gala_mpi.storage.turns import TOGETHER_BYTES_PER_S, turn_s

PONG_BYTES = 7_000_000
# Notes each turn, without the wait, and what was written by then.
PROGRAM = """
import sys
from gala_mpi import cli
from gala_mpi.storage import turns
from gala_mpi.train import agent, checkpointer
turn_s, save = checkpointer.Checkpointer.turn_s, checkpointer.Checkpointer.save
turns.TOGETHER_BYTES_PER_S = 1e5
def turn(self, longest_s):
    sys.stdout.write(f"rank {self._identity.rank} turn {turn_s(self, longest_s):.6f}\\n")
    return 0
def saved(self, update, *args):
    save(self, update, *args)
    sys.stdout.write(f"rank {self._identity.rank} saved {update}\\n")
checkpointer.Checkpointer.turn_s, checkpointer.Checkpointer.save = turn, saved
sys.exit(cli.train(sys.argv[1:]))
"""


@pytest.mark.parametrize("size", [1, 4, 1024, 16_384])
def test_ranks_that_come_at_once_write_one_after_the_other(size: int) -> None:
    turns = [turn_s(rank, size, PONG_BYTES, 5.0) for rank in range(size)]
    assert turns[0] == 0 and turns == sorted(turns) and turns[-1] < 5.0
    # So many bytes a second, or all of them within the longest wait.
    apart_s = min(PONG_BYTES / TOGETHER_BYTES_PER_S, 5.0 / size)
    assert all(later - earlier == pytest.approx(apart_s) for earlier, later in pairwise(turns))


def test_a_few_ranks_do_not_notice() -> None:
    """A launcher may leave a quarter of a second for the last checkpoint."""
    assert turn_s(3, 4, PONG_BYTES, 5.0) < 0.02


@pytest.mark.parametrize("exchange", ["gossip", "allreduce"])
def test_the_first_checkpoint_and_the_last_are_written_in_turn(one_mpi: Mpi, exchange: str, tmp_path: Path) -> None:
    args = ("--preset", "cartpole", "--total-steps", "2_000", "--exchange", exchange, "--neighbour-timeout-s", "16")
    done = one_mpi.run(3, "-c", PROGRAM, *args, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    first = []
    for rank in range(3):
        said = re.findall(rf"^rank {rank} (turn|saved) (.*)$", done.stdout, re.M)
        assert [what for what, _ in said] == ["turn", "saved"] * 2
        assert int(said[1][1]) == 0 < int(said[3][1]) and said[0][1] == said[2][1]
        first.append(float(said[0][1]))
    # An eighth of the timeout for three ranks.
    assert first == pytest.approx([0, 2 / 3, 4 / 3], abs=0.01)
