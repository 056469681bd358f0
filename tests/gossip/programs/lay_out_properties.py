"""python tests/gossip/programs/lay_out_properties.py

However many mailboxes, of whatever capacities: payloads are page-aligned, no header or payload shares a byte with
anything else, each control word or answer has a cache line of its own, and all lies inside the window, which has no
gap that is longer than two pages. The same of mailboxes in the background.
"""

from __future__ import annotations

from itertools import pairwise

import mpi4py
from hypothesis import example, given
from hypothesis import strategies as st

mpi4py.rc.initialize = False

from gala_mpi.gossip import background  # noqa: E402
from gala_mpi.gossip.mailbox import CACHE_LINE_BYTES, HEADER, SLOTS, lay_out  # noqa: E402
from gala_mpi.mpi.window import PAGE_BYTES, WORD_BYTES  # noqa: E402

EDGES = (0, 1, 64, 4032, 4033, 4095, 4096, 4097, 8192)


@given(st.lists(st.sampled_from(EDGES) | st.integers(0, 10**10), max_size=200))
@example([])
@example(list(EDGES))
@example([4097] * 1000)
def check(capacities: list[int]) -> None:
    places, nbytes = lay_out(capacities)
    assert [place.capacity for place in places] == capacities
    lines = [place.control // CACHE_LINE_BYTES for place in places]
    assert len(set(lines)) == len(places)
    used = []
    for place in places:
        assert place.control % WORD_BYTES == 0
        assert len(set(place.slots)) == SLOTS
        # The whole line, so that no header or payload lies beside a control word either.
        line = place.control // CACHE_LINE_BYTES * CACHE_LINE_BYTES
        used.append((line, line + CACHE_LINE_BYTES))
        for slot in place.slots:
            assert slot % PAGE_BYTES == 0
            used.append((slot - HEADER.itemsize, slot + place.capacity))
    check_gaps(used, nbytes)


@given(st.lists(st.sampled_from(EDGES) | st.integers(0, 10**10), max_size=200), st.integers(0, 200))
@example([], 0)
@example(list(EDGES), 0)
@example([], 65)
def check_background(capacities: list[int], receivers: int) -> None:
    slots, answers, nbytes = background.lay_out(capacities, receivers)
    assert len(slots) == len(capacities) and len(answers) == receivers
    used = []
    for answer in answers:
        assert answer % CACHE_LINE_BYTES == 0
        used.append((answer, answer + CACHE_LINE_BYTES))
    for slot, capacity in zip(slots, capacities, strict=True):
        assert (slot + HEADER.itemsize) % PAGE_BYTES == 0
        used.append((slot, slot + background.slot_bytes(capacity)))
    check_gaps(used, nbytes)


def check_gaps(used: list[tuple[int, int]], nbytes: int) -> None:
    used = [(0, 0), *sorted(used), (nbytes, nbytes)]
    for (_, end), (begin, _) in pairwise(used):
        assert 0 <= begin - end <= 2 * PAGE_BYTES, (end, begin)


if __name__ == "__main__":
    check()
    check_background()
