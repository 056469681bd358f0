"""The mailbox on real MPI libraries and transports: nothing torn, nothing out of order, always the newest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Mpi

PROGRAMS = Path(__file__).parent / "programs"
PROGRAM = str(PROGRAMS / "stress_mailbox.py")
# UCX would find shared memory between ranks of one host, whatever MPIR_CVAR_NOLOCAL says.
TCP = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}

# An exchange is a message taken and verified whole. Over its sizes each transport makes 20,000 or more.
IN_SHARED_MEMORY = {2: 7000, 3: 7000, 5: 7000}
OVER_TCP = {2: 10_000, 3: 5000, 5: 5000}
assert min(sum(IN_SHARED_MEMORY.values()), sum(OVER_TCP.values())) >= 20_000


def exchange(
    mpi: Mpi, size: int, exchanges: int, *arguments: str, env: dict[str, str] | None = None
) -> dict[str, float]:
    """Totals of a run of the program, which checks every message itself."""
    # Beside other work an exchange over a network, which waits for the other rank, takes many times as long.
    limit = ("--deadline-s", "900")
    done = mpi.run(size, PROGRAM, "--exchanges", str(exchanges), *limit, *arguments, timeout_s=240, env=env)
    assert done.returncode == 0, done.stderr
    totals: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    assert totals["posted"] > totals["taken"] >= exchanges
    # The case that a triple buffer is for, and that a queue would not have, did occur.
    assert totals["overwritten"] > 100 and totals["most_skipped"] > 1
    return totals


@pytest.mark.parametrize("size", IN_SHARED_MEMORY)
def test_every_message_in_shared_memory_is_whole_in_order_and_the_newest(mpi: Mpi, size: int) -> None:
    totals = exchange(mpi, size, IN_SHARED_MEMORY[size])
    assert totals["tcp_bytes"] < totals["bytes_posted"] / 100


@pytest.mark.check
@pytest.mark.parametrize("size", IN_SHARED_MEMORY)
def test_every_message_that_its_sender_stores_itself_is_whole_in_order_and_the_newest(mpi: Mpi, size: int) -> None:
    totals = exchange(mpi, size, IN_SHARED_MEMORY[size], "--shared")
    assert totals["streamed"] > totals["posted"] / 10


@pytest.mark.parametrize("size", OVER_TCP)
def test_every_message_over_tcp_is_whole_in_order_and_the_newest(mpich: Mpi, size: int) -> None:
    totals = exchange(mpich, size, OVER_TCP[size], env=TCP)
    # By the kernel's count for the ranks' own sockets, all that was posted did go through them.
    assert totals["tcp_bytes"] > totals["bytes_posted"]


# The courier sleeps while it carries, so these exchanges take longer.
IN_BACKGROUND = {2: 2000, 3: 4000}


@pytest.mark.parametrize("size", IN_BACKGROUND)
def test_every_message_in_the_background_is_whole_in_order_and_the_newest(mpi: Mpi, size: int) -> None:
    totals = exchange(mpi, size, IN_BACKGROUND[size], "--delivery", "background")
    # Posts did go out while the one before was still on its way, and replaced each other there.
    assert totals["overtaking"] > 1000 and totals["streamed"] > totals["posted"] / 10


@pytest.mark.parametrize("size", IN_BACKGROUND)
def test_every_message_in_the_background_over_tcp_is_whole_in_order_and_the_newest(mpich: Mpi, size: int) -> None:
    totals = exchange(mpich, size, IN_BACKGROUND[size], "--delivery", "background", env=TCP)
    assert totals["overtaking"] > 1000
    # Less than was posted, since much is replaced before it is sent.
    assert totals["tcp_bytes"] > totals["bytes_posted"] / 10


BROKEN = {
    # A wrong end of the mailbox, and the promises of which the program may find one broken first.
    "KeepsItsSlot": (2, "held|whole|ordered|newest"),
    "PublishesFirst": (2, "held|whole|ordered|sender|newest"),
    "PublishesHalf": (2, "held|whole"),
    "KeepsTheOldest": (2, "newest"),
    "ReadsInPlace": (2, "held|whole|ordered|newest"),
    "PostsToAnother": (3, "sender|newest"),
}


@pytest.mark.parametrize("memory", [(), ("--shared",)], ids=["put", "stored"])
@pytest.mark.parametrize("broken", BROKEN)
def test_the_stress_catches_a_broken_mailbox(mpi: Mpi, broken: str, memory: tuple[str, ...]) -> None:
    size, promises = BROKEN[broken]
    done = mpi.run(size, PROGRAM, "--exchanges", "7000", "--broken", broken, *memory, timeout_s=60)
    assert done.returncode != 0
    assert re.search(rf"violated: ({promises}): ", done.stderr), done.stderr


BROKEN_IN_BACKGROUND = {
    "SendsTheBufferItself": "whole",
    "KeepsTheOldestWaiting": "newest",
    "WaitsInPost": "wait-free",
    "CallsItDoneInFlight": "newest",
    "GivesOutTheSlot": "held|whole",
}


@pytest.mark.parametrize("broken", BROKEN_IN_BACKGROUND)
def test_the_stress_catches_a_broken_end_in_the_background(mpi: Mpi, broken: str) -> None:
    arguments = ("--exchanges", "7000", "--delivery", "background", "--broken", broken)
    done = mpi.run(2, PROGRAM, *arguments, timeout_s=60)
    assert done.returncode != 0
    assert re.search(rf"violated: ({BROKEN_IN_BACKGROUND[broken]}): ", done.stderr), done.stderr


def test_messages_that_are_sent_again_all_the_time_break_nothing(mpi: Mpi) -> None:
    """A repetition may land over the next message: that is sent again then, too."""
    exchange(mpi, 2, 2000, "--delivery", "background", "--unanswered", "0")


def test_mailboxes_share_no_byte_and_their_words_no_cache_line(one_mpi: Mpi) -> None:
    # A program of its own, since the mailbox imports MPI, which the pytest process never does.
    done = one_mpi.run(1, str(PROGRAMS / "lay_out_properties.py"), timeout_s=60)
    assert done.returncode == 0, done.stderr
