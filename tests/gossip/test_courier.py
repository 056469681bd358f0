"""The courier without a network: what it sends and takes is never mixed up, and an error stays where it belongs.

A program of its own checks this, since the courier imports MPI, which the pytest process never does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Mpi

PROGRAM = str(Path(__file__).parent / "programs" / "courier_properties.py")


@pytest.mark.parametrize(
    "check",
    [
        "any_order",
        "edges_that_turn",
        "three_threads",
        "a_lost_rank_costs_its_own_messages_alone",
        "an_unexpected_error_ends_the_thread_and_is_raised",
        "drain_waits_no_longer_than_its_deadline",
        "nothing_is_started_before_the_peer_has_answered",
    ],
)
def test_the_courier_keeps_its_promises(one_mpi: Mpi, check: str) -> None:
    done = one_mpi.run(1, PROGRAM, check, timeout_s=120)
    assert done.returncode == 0, done.stderr


BROKEN = {
    # A wrong end of a mailbox, and what the check finds.
    "ReusesTheSnapshotInFlight": "assert len|a buffer was changed in flight",
    "SendsTheBufferItself": "a torn message|a buffer was changed in flight",
    "KeepsTheOldestWaiting": "called arrived before it was|assert self.mailbox.taken == self.posted",
    "SendsTheReplacedOneLater": "assert len|a message has not arrived",
    "CallsItDoneInFlight": "called arrived before it was|a message has not arrived",
    "CallsItDoneWhenTheNetworkHasIt": "called arrived before it was|a message has not arrived",
    "GivesOutTheSlot": "a message changed while held",
    "TakesWithoutACheck": "a torn message|an older message after a newer one",
    "AnswersBeforeItHasTaken": "called arrived before it was|a message has not arrived",
    "NeverAnswersAgain": "a message has not arrived",
}


WRONG = "a torn message|a message of another rank|an older message after a newer one|a message has not arrived"
BROKEN_TURNS = {
    "NeverAnswersAgain": "a message has not arrived",
    "TakesFromAnybody": WRONG,
    "TakesWithoutACheck": WRONG,
    "GivesOutTheSlot": WRONG,
    "CallsItDoneInFlight": "called arrived before it was|a message has not arrived",
}


@pytest.mark.parametrize("broken", BROKEN_TURNS)
def test_the_check_of_edges_that_turn_catches_a_broken_end(one_mpi: Mpi, broken: str) -> None:
    done = one_mpi.run(1, PROGRAM, "edges_that_turn", "--broken", broken, timeout_s=120)
    assert done.returncode != 0
    assert any(text in done.stderr for text in BROKEN_TURNS[broken].split("|")), done.stderr


@pytest.mark.parametrize("broken", BROKEN)
def test_the_check_catches_a_broken_end(one_mpi: Mpi, broken: str) -> None:
    done = one_mpi.run(1, PROGRAM, "any_order", "--broken", broken, timeout_s=120)
    assert done.returncode != 0
    assert "AssertionError" in done.stderr
    assert any(text in done.stderr for text in BROKEN[broken].split("|")), done.stderr
