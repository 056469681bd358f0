"""The C kernels agree with their NumPy twins, to the bit where a result is stored, and refuse what they cannot take."""

from __future__ import annotations

import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import native_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gala_mpi import _native

WIRES = ("float32", "bfloat16", "float16")
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 65504.0, 65519.9, 65520.0]
SPECIAL += [5.9604645e-08, 2.9802322e-08, 2.98023259e-08, 6.1035156e-05, 0.33325195, 1 + 2**-8, 1 + 3 * 2**-9]
NON_FINITE = [math.nan, math.inf, -math.inf]

EDGES = [0, 1, 2, 3, 15, 16, 17, 31, 127, 128, 129, 255, 256, 257, 383, 1023, 1024, 1025, 2047, 2049]
sizes = st.one_of(st.sampled_from(EDGES), st.integers(0, 5000))
seeds = st.integers(0, 2**32 - 1)
wires = st.sampled_from(WIRES)
skews = st.integers(0, 7)


def draw_values(rng: np.random.Generator, size: int, special: float = 0.2) -> np.ndarray:
    values = rng.normal(size=size) * 10.0 ** rng.integers(-8, 5, size=size)
    chosen = rng.random(size) < special
    values[chosen] = rng.choice(SPECIAL, size=int(chosen.sum()))
    return values.astype(np.float32)


def skewed(data: np.ndarray, skew: int) -> np.ndarray:
    """A copy of the bytes at an address of any alignment."""
    memory = np.zeros(data.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 8 + skew
    memory[start : start + data.nbytes] = data.view(np.uint8)
    return memory[start : start + data.nbytes]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


@settings(deadline=None)
@given(seeds, st.lists(sizes, max_size=4), wires, skews)
def test_pack_gathers_and_rounds_as_the_twin(seed: int, counts: list[int], wire: str, skew: int) -> None:
    rng = np.random.default_rng(seed)
    sources = [draw_values(rng, count) for count in counts]
    expected = np.concatenate([np.zeros(0, np.uint8), *(reference.encode(source, wire) for source in sources)])
    out = skewed(np.full(expected.nbytes, 0xAA, np.uint8), skew)
    _native.pack(sources, out, wire)
    assert same_bits(out, expected)


def test_every_half_survives_a_round_trip() -> None:
    """All 2**16 patterns of both 16-bit types decode as the twin says, and encode back to themselves."""
    patterns = np.arange(2**16, dtype=np.uint16)
    for wire in ("bfloat16", "float16"):
        values = reference.decode(patterns.view(np.uint8), wire)
        finite = np.isfinite(values)
        state = np.zeros(int(finite.sum()), np.float32)
        message = np.ascontiguousarray(patterns[finite]).view(np.uint8)
        assert _native.mix(state, 0.0, [message], [1.0], wire)[1] == [True]
        np.testing.assert_array_equal(state, values[finite])
        back = np.zeros(2**16, np.uint16)
        _native.pack([values], back, wire)
        number = ~np.isnan(values)
        np.testing.assert_array_equal(back[number], patterns[number])
        assert np.isnan(reference.decode(back[~number].copy().view(np.uint8), wire)).all()


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_rounding_is_to_nearest_even_at_every_boundary(wire: str) -> None:
    """Half way between any two neighbouring halves, and one float32 to either side of it."""
    patterns = np.arange(2**15, dtype=np.uint16)
    halves = reference.decode(patterns.view(np.uint8), wire)
    halves = halves[np.isfinite(halves)].astype(float)
    middles = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    bits = middles.view(np.uint32)
    values = np.concatenate([middles, (bits - np.uint32(1)).view(np.float32), (bits + np.uint32(1)).view(np.float32)])
    values = np.concatenate([values, -values])
    out = np.zeros(2 * len(values), np.uint8)
    _native.pack([values], out, wire)
    assert same_bits(out, reference.encode(values, wire))


@pytest.mark.parametrize("wire", WIRES)
def test_what_is_not_finite_stays_so_in_every_wire(wire: str) -> None:
    values = np.array(NON_FINITE, np.float32)
    payloads = np.array([0x7F800001, 0xFFFFFFFF, 0x7F80FFFF, 0xFF802000], np.uint32).view(np.float32)
    for source in (values, payloads):
        out = np.zeros(len(source) * _native.WIRE_ITEMSIZE[wire], np.uint8)
        _native.pack([source], out, wire)
        back = reference.decode(out, wire)
        np.testing.assert_array_equal(np.isnan(back), np.isnan(source))
        assert not np.isfinite(back).any()


@settings(deadline=None)
@given(seeds, sizes, st.integers(0, 4), wires, skews)
def test_mix_agrees_with_the_twin(seed: int, size: int, count: int, wire: str, skew: int) -> None:
    rng = np.random.default_rng(seed)
    state = draw_values(rng, size, special=0.05)
    messages = [skewed(reference.encode(draw_values(rng, size, special=0.0), wire), skew) for _ in range(count)]
    for message in messages:
        if size and rng.random() < 0.3:
            values = reference.decode(message.copy(), wire)
            values[rng.integers(size)] = rng.choice(NON_FINITE)
            message[:] = reference.encode(values, wire)
    raw = rng.random(count + 1)
    self_weight, *weights = (raw / raw.sum()).tolist()
    expected, squared, accepted = reference.mix(state, self_weight, [m.copy() for m in messages], weights, wire)
    found_squared, found_accepted = _native.mix(state, self_weight, messages, weights, wire)
    assert found_accepted == accepted
    np.testing.assert_allclose(found_squared, squared, rtol=1e-6)
    assert same_bits(state, expected)


@settings(deadline=None)
@given(seeds, sizes, st.integers(0, 4), st.integers(1, 3), skews, skews)
def test_exchange_is_a_copy_and_a_mix(seed: int, size: int, count: int, copies: int, skew: int, out_skew: int) -> None:
    """To the bit, also where messages are found in the middle of the pass not to be finite."""
    rng = np.random.default_rng(seed)
    state = draw_values(rng, size, special=0.05)
    values = [draw_values(rng, size, special=0.01) for _ in range(count)]
    for value in values:
        if size and rng.random() < 0.4:
            value[rng.integers(size)] = rng.choice(NON_FINITE)
    messages = [skewed(value.view(np.uint8), skew) for value in values]
    raw = rng.random(count + 1)
    self_weight, *weights = (raw / raw.sum()).tolist()
    before, expected = state.copy(), state.copy()
    squared, accepted = _native.mix(expected, self_weight, messages, weights)
    outs = [skewed(np.full(state.nbytes, 0xAA, np.uint8), out_skew) for _ in range(copies)]
    finite, found_squared, found_accepted = _native.exchange(state, outs, self_weight, messages, weights)
    assert finite and found_accepted == accepted
    np.testing.assert_array_equal(found_squared, squared)
    assert same_bits(state, expected)
    assert all(same_bits(out, before) for out in outs)


@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 128, 300, 1025])
def test_exchange_finds_a_state_that_is_not_finite(size: int, count: int, bad: float) -> None:
    messages = [np.ones(size, np.float32), np.full(size, math.inf, np.float32)][:count]
    for place in {0, size // 2, size - 1}:
        state = np.zeros(size, np.float32)
        state[place] = bad
        finite, _, _ = _native.exchange(state, [np.zeros(size, np.float32)], 0.5, messages, [0.25] * count)
        assert not finite


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("size", [1, 16, 1025, 4096])
def test_one_value_that_is_not_finite_leaves_the_state_to_the_bit(size: int, bad: float, wire: str) -> None:
    rng = np.random.default_rng(size)
    state = draw_values(rng, size)
    before = state.copy()
    for place in {0, size // 2, size - 1}:
        values = np.ones(size, np.float32)
        values[place] = bad
        squared, accepted = _native.mix(state, 0.5, [reference.encode(values, wire)], [0.5], wire)
        assert accepted == [False] and math.isnan(squared[0])
        assert same_bits(state, before)


def test_the_largest_numbers_are_finite_and_mixed() -> None:
    state = np.full(33, 3e38, np.float32)
    squared, accepted = _native.mix(state, 0.5, [np.full(33, -3e38, np.float32)], [0.5])
    assert accepted == [True] and squared[0] == pytest.approx(33 * 3.6e77, rel=1e-6)
    np.testing.assert_array_equal(state, 0)


@settings(deadline=None)
@given(seeds, sizes, st.integers(-45, 38), st.floats(0, 1), skews)
def test_distances_are_right_at_every_scale(seed: int, size: int, scale: int, equal: float, skew: int) -> None:
    """Also where squares overflow a float32, or are denormal or zero in one; with some or all values equal."""
    rng = np.random.default_rng(seed)
    state, values = (np.float64(10) ** scale * rng.uniform(-3, 3, (2, size))).astype(np.float32)
    same = rng.random(size) < equal
    values[same] = state[same]
    expected = float(np.square(state.astype(float) - values).sum())
    squared, accepted = _native.mix(state, 0.5, [skewed(values, skew)], [0.5])
    assert accepted == [True]
    np.testing.assert_allclose(squared, [expected], rtol=1e-6)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("difference", [3e38, 2e19, 1e-19, 1e-25, 1e-45])
def test_one_square_outside_float32_counts_wherever_it_is(size: int, difference: float) -> None:
    values = np.zeros(size, np.float32)
    for place in {0, size // 2, size - 1}:
        state = np.zeros(size, np.float32)
        state[place] = difference
        expected = float(state[place]) ** 2
        squared, _ = _native.mix(state, 0.5, [values], [0.5])
        assert squared[0] == pytest.approx(expected, rel=1e-6, abs=0)


@settings(deadline=None)
@given(seeds, sizes, st.integers(1, 4), wires, st.sampled_from([-30, -18, 0, 0, 0, 4, 18]), skews)
def test_distances_are_the_twin_s_to_the_bit(
    seed: int, size: int, count: int, wire: str, scale: int, skew: int
) -> None:
    """So are those of two instruction sets, of which the sanitized build runs the smallest."""
    rng = np.random.default_rng(seed)
    state = (10.0**scale * rng.normal(size=size)).astype(np.float32)
    state[rng.random(size) < 0.001] *= np.float32(1e19)
    values = [np.clip(10.0**scale * rng.normal(size=size), -6e4, 6e4).astype(np.float32) for _ in range(count)]
    messages = [skewed(reference.encode(value, wire), skew) for value in values]
    expected = [reference.tiled_distance(state, reference.decode(message.copy(), wire)) for message in messages]
    assert _native.mix(state, 0.5, messages, [0.5 / count] * count, wire) == (expected, [True] * count)


@settings(deadline=None)
@given(seeds, sizes, wires, st.integers(0, 2), skews)
def test_all_finite_agrees_with_the_twin(seed: int, size: int, wire: str, bad: int, skew: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.clip(draw_values(rng, size), -65504, 65504)
    values[rng.integers(size, size=bad if size else 0)] = rng.choice(NON_FINITE)
    message = reference.encode(values, wire)
    assert reference.all_finite(message, wire) is (size == 0 or bad == 0)
    assert _native.all_finite(skewed(message, skew), wire) is reference.all_finite(message, wire)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("bad", NON_FINITE)
def test_one_value_that_is_not_finite_is_found_in_every_place(bad: float, wire: str) -> None:
    for size in (1, 2, 7, 16, 63, 130):
        for place in range(size):
            values = np.full(size, 1.5, np.float32)
            values[place] = bad
            assert not _native.all_finite(reference.encode(values, wire), wire)


def test_all_finite_knows_every_half_and_the_ends_of_float32() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for wire in ("bfloat16", "float16"):
        finite = np.isfinite(reference.decode(patterns.view(np.uint8), wire))
        found = [_native.all_finite(patterns[i : i + 1], wire) for i in range(2**16)]
        np.testing.assert_array_equal(found, finite)
    for bits, finite in ((0x7F7FFFFF, True), (0x7F800000, False), (0x7F800001, False), (0xFFFFFFFF, False)):
        assert _native.all_finite(np.array([bits], np.uint32).view(np.float32)) is finite
        assert _native.all_finite(np.array([bits], np.uint32).view(np.uint8)) is finite


@settings(deadline=None)
@given(seeds, sizes, skews)
def test_average_is_mix_without_its_checks(seed: int, size: int, skew: int) -> None:
    rng = np.random.default_rng(seed)
    state, message = draw_values(rng, size), draw_values(rng, size)
    mixed, expected = state.copy(), reference.average(state, message)
    _native.mix(mixed, 0.5, [message], [0.5])
    assert _native.average(state, skewed(message, skew)) is None
    assert same_bits(state, expected) and same_bits(state, mixed)


def test_average_does_not_look_at_what_it_reads() -> None:
    state = np.ones(3, np.float32)
    _native.average(state, np.array([math.inf, math.nan, 3], np.float32))
    np.testing.assert_array_equal(state, np.array([math.inf, math.nan, 2], np.float32))


def test_a_large_mix_keeps_the_mean() -> None:
    size = 1_000_003
    rng = np.random.default_rng(3)
    first, second = (rng.normal(size=size).astype(np.float32) for _ in range(2))
    mean = (first.astype(float) + second) / 2
    squared, _ = _native.mix(first, 0.5, [second], [0.5])
    np.testing.assert_allclose(first, mean, atol=1e-6)
    assert squared[0] == pytest.approx(2 * size, rel=0.01)


def test_no_message_leaves_the_state() -> None:
    state = np.arange(5, dtype=np.float32)
    assert _native.mix(state, 0.25, [], []) == ([], [])
    np.testing.assert_array_equal(state, np.arange(5))


@settings(deadline=None)
@given(seeds, sizes, st.sampled_from([2, 8, 1024]), st.integers(0, 2**64 - 1))
def test_sketch_agrees_with_the_twin(seed: int, size: int, buckets: int, hash_seed: int) -> None:
    state = draw_values(np.random.default_rng(seed), size, special=0.0)
    out = np.full(buckets, np.nan, np.float32)
    squared = _native.sketch(state, out, hash_seed)
    assert squared == pytest.approx(float(np.square(state.astype(float)).sum()), rel=1e-9)
    np.testing.assert_allclose(out, reference.sketch(state, buckets, hash_seed), rtol=1e-6, atol=1e-30)


def test_sketches_are_linear() -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.integers(-100, 100, 3000).astype(np.float32) for _ in range(2))
    outs = np.zeros((3, 64), np.float32)
    for values, out in zip((first, second, first - second), outs, strict=True):
        _native.sketch(values, out, 7)
    np.testing.assert_array_equal(outs[0] - outs[1], outs[2])


def floats(count: int = 4) -> np.ndarray:
    return np.zeros(count, np.float32)


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def misaligned(count: int = 4) -> np.ndarray:
    return skewed(floats(count), 2).view(np.float32)


SHARED = np.zeros(12, np.float32)

REFUSED: dict[str, tuple[type[Exception], str, Any]] = {
    "state of doubles": (TypeError, "state", lambda: _native.mix(np.zeros(4), 1, [], [])),
    "state that is no buffer": (TypeError, "state", lambda: _native.mix([1.0], 1, [], [])),
    "strided state": (ValueError, "state.*contiguous", lambda: _native.mix(floats(8)[::2], 1, [], [])),
    "read-only state": (ValueError, "state.*read-only", lambda: _native.mix(read_only(floats()), 1, [], [])),
    "misaligned state": (ValueError, "state.*multiple of 4", lambda: _native.mix(misaligned(), 1, [], [])),
    "short message": (ValueError, "messages.*16 bytes.*got 12", lambda: _native.mix(floats(), 1, [floats(3)], [1])),
    "message of doubles": (TypeError, "messages", lambda: _native.mix(floats(), 1, [np.zeros(2)], [1])),
    "strided message": (
        ValueError,
        "messages.*contiguous",
        lambda: _native.mix(floats(), 1, [np.zeros(32, np.uint8)[::2]], [1]),
    ),
    "overlapping message": (
        ValueError,
        "state: overlaps messages",
        lambda: _native.mix(SHARED[:4], 1, [SHARED[3:7]], [1]),
    ),
    "too few weights": (ValueError, "weights.*1 messages, got 0", lambda: _native.mix(floats(), 1, [floats()], [])),
    "weight that is not finite": (ValueError, "weights", lambda: _native.mix(floats(), 1, [floats()], [math.nan])),
    "weight too large for float32": (ValueError, "self_weight", lambda: _native.mix(floats(), 1e300, [], [])),
    "weight that is no number": (TypeError, "real number", lambda: _native.mix(floats(), "1", [], [])),
    "unknown wire": (ValueError, "wire.*'int8'.*float16", lambda: _native.mix(floats(), 1, [], [], "int8")),
    "wire of another type": (TypeError, "messages", lambda: _native.mix(floats(), 1, [floats(2)], [1], "float16")),
    "exchange without a copy": (ValueError, "copies: expected one", lambda: _native.exchange(floats(), [], 1, [], [])),
    "exchange of doubles": (TypeError, "state", lambda: _native.exchange(np.zeros(4), [floats()], 1, [], [])),
    "read-only copy": (
        ValueError,
        "copies.*read-only",
        lambda: _native.exchange(floats(), [read_only(floats())], 1, [], []),
    ),
    "short copy": (ValueError, "copies.*got 12", lambda: _native.exchange(floats(), [floats(3)], 1, [], [])),
    "strided copy": (ValueError, "copies.*contiguous", lambda: _native.exchange(floats(), [floats(8)[::2]], 1, [], [])),
    "copy onto the state": (
        ValueError,
        "copies: overlaps state",
        lambda: _native.exchange(SHARED[:4], [floats(), SHARED[3:7]], 1, [], []),
    ),
    "copy onto a message": (
        ValueError,
        "copies: overlaps messages",
        lambda: _native.exchange(floats(), [SHARED[:4]], 0.5, [SHARED[2:6]], [0.5]),
    ),
    "two copies in one place": (
        ValueError,
        "copies: overlaps copies",
        lambda: _native.exchange(floats(), [SHARED[:4], SHARED[2:6]], 1, [], []),
    ),
    "exchange of a short message": (
        ValueError,
        "messages.*got 12",
        lambda: _native.exchange(floats(), [floats()], 0.5, [floats(3)], [0.5]),
    ),
    "exchange without weights": (
        ValueError,
        "weights.*1 messages, got 0",
        lambda: _native.exchange(floats(), [floats()], 0.5, [floats()], []),
    ),
    "exchange with an infinite weight": (
        ValueError,
        "self_weight",
        lambda: _native.exchange(floats(), [floats()], math.inf, [], []),
    ),
    "source of doubles": (TypeError, "sources", lambda: _native.pack([np.zeros(4)], floats())),
    "strided source": (ValueError, "sources.*contiguous", lambda: _native.pack([floats(8)[::2]], floats())),
    "misaligned source": (ValueError, "sources.*multiple of 4", lambda: _native.pack([misaligned()], floats())),
    "read-only out": (ValueError, "out.*read-only", lambda: _native.pack([floats()], read_only(floats()))),
    "short out": (ValueError, "out.*got 8", lambda: _native.pack([floats()], floats(2))),
    "overlapping out": (ValueError, "out: overlaps sources", lambda: _native.pack([SHARED[:4]], SHARED[2:6])),
    "ragged buffer": (ValueError, "buffer.*float16.*got 5 bytes", lambda: _native.all_finite(bytearray(5), "float16")),
    "ragged float32": (ValueError, "buffer.*4 bytes each.*got 6", lambda: _native.all_finite(np.zeros(6, np.uint8))),
    "buffer of doubles": (TypeError, "buffer", lambda: _native.all_finite(np.zeros(4))),
    "buffer of another wire": (TypeError, "buffer", lambda: _native.all_finite(floats(), "bfloat16")),
    "strided buffer": (ValueError, "buffer.*contiguous", lambda: _native.all_finite(floats(8)[::2])),
    "buffer of unknown wire": (ValueError, "wire.*'int8'", lambda: _native.all_finite(floats(), "int8")),
    "no buffer": (TypeError, "buffer", lambda: _native.all_finite([1.0])),
    "average of doubles": (TypeError, "state", lambda: _native.average(np.zeros(4), floats())),
    "average of a narrow message": (TypeError, "message", lambda: _native.average(floats(), np.zeros(8, np.uint16))),
    "average of a short message": (ValueError, "message.*got 12", lambda: _native.average(floats(), floats(3))),
    "average of a strided message": (
        ValueError,
        "message.*contiguous",
        lambda: _native.average(floats(), floats(8)[::2]),
    ),
    "average onto the message": (
        ValueError,
        "state: overlaps message",
        lambda: _native.average(SHARED[:4], SHARED[2:6]),
    ),
    "read-only average": (ValueError, "state.*read-only", lambda: _native.average(read_only(floats()), floats())),
    "misaligned average": (ValueError, "state.*multiple of 4", lambda: _native.average(misaligned(), floats())),
    "sketch onto the state": (ValueError, "out: overlaps state", lambda: _native.sketch(SHARED, SHARED[:4], 1)),
    "sketch of three buckets": (ValueError, "out.*power of two", lambda: _native.sketch(floats(), floats(3), 1)),
    "sketch of one bucket": (ValueError, "out.*power of two", lambda: _native.sketch(floats(), floats(1), 1)),
    "read-only sketch": (ValueError, "out.*read-only", lambda: _native.sketch(floats(), read_only(floats()), 1)),
    "negative seed": (ValueError, "seed", lambda: _native.sketch(floats(), floats(), -1)),
    "seed too large": (ValueError, "seed", lambda: _native.sketch(floats(), floats(), 2**64)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_binding_refuses(case: str) -> None:
    kind, said, call = REFUSED[case]
    with pytest.raises(kind, match=said):
        call()


def test_a_refusal_holds_no_buffer() -> None:
    """An array can be resized in place only while nobody holds a view of its memory."""
    state, message = bytearray(16), bytearray(12)
    with pytest.raises(TypeError):
        _native.mix(state, 1.0, [message], [1.0])
    with pytest.raises(ValueError, match="messages"):
        _native.mix(floats(), 1.0, [message], [1.0])
    with pytest.raises(ValueError, match="out"):
        _native.pack([floats()], message)
    with pytest.raises(TypeError, match="state"):
        _native.average(state, floats())
    with pytest.raises(ValueError, match="message"):
        _native.average(floats(), message)
    with pytest.raises(ValueError, match="buffer"):
        _native.all_finite(state[:-1])
    assert _native.all_finite(message)
    with pytest.raises(ValueError, match="copies"):
        _native.exchange(floats(), [np.zeros(16, np.uint8), message], 1, [], [])
    with pytest.raises(ValueError, match="copies: overlaps copies"):
        _native.exchange(floats(3), [message, message], 1, [], [])
    state.append(1)
    message.append(1)


def test_a_call_takes_any_number_of_buffers() -> None:
    """All are given back too, after a refusal of the last one as well."""
    buffers = [bytearray(np.full(3, k, np.float32).tobytes()) for k in range(40)]
    arrays = [np.frombuffer(buffer, np.float32).copy() for buffer in buffers]
    out, state = np.zeros(120, np.float32), np.zeros(3, np.float32)
    _native.pack(arrays, out)
    np.testing.assert_array_equal(out, np.concatenate(arrays))
    finite, _, accepted = _native.exchange(arrays[7], buffers[:20], 0.0, buffers[20:], [0.05] * 20)
    assert finite and accepted == [True] * 20 and set(map(bytes, buffers[:20])) == {bytes(buffers[0])}
    np.testing.assert_array_equal(np.frombuffer(bytes(buffers[0]), np.float32), 7)
    np.testing.assert_allclose(arrays[7], np.mean(range(20, 40)), rtol=1e-6)
    with pytest.raises(ValueError, match=r"messages.*got 8"):
        _native.mix(state, 0.0, [*buffers, bytearray(8)], [0.0] * 41)
    with pytest.raises(ValueError, match="copies: overlaps copies"):
        _native.exchange(state, [*buffers, buffers[-1]], 1.0, [], [])
    for buffer in buffers:
        buffer.append(1)


@settings(deadline=None)
@given(seeds, sizes, skews, skews, st.integers(0, 2**64 - 1))
def test_checksum_agrees_with_its_twin(number: int, size: int, skew: int, out_skew: int, seed: int) -> None:
    memory = skewed(np.random.default_rng(number).integers(0, 256, size, np.uint8), skew)
    out = skewed(np.zeros(size, np.uint8), out_skew)
    expected = reference.checksum(memory, seed)
    assert _native.checksum(memory, seed) == _native.checked_copy(memory, out, seed) == expected
    np.testing.assert_array_equal(out, memory)


def test_checksum_tells_what_arrived_in_part() -> None:
    """A page or a word of the message before, in place of one of the new, shows wherever it lies."""
    rng = np.random.default_rng(1)
    before, whole = (rng.normal(size=50_000).astype(np.float32).view(np.uint8) for _ in range(2))
    expected = _native.checksum(whole)
    for length, step in ((4096, 4096), (8, 1016)):
        for begin in range(0, len(whole) - length, step):
            torn = whole.copy()
            torn[begin : begin + length] = before[begin : begin + length]
            assert _native.checksum(torn) != expected


def test_checksum_tells_changes_that_would_cancel_in_a_sum() -> None:
    values = np.arange(64, dtype=np.uint64)
    other = values.copy()
    # In words of one lane, and of two.
    for one, two in ((0, 8), (3, 4)):
        other[:] = values
        other[one] += 1
        other[two] -= 1
        assert _native.checksum(other.view(np.uint8)) != _native.checksum(values.view(np.uint8))
    assert len({_native.checksum(np.zeros(length, np.uint8)) for length in range(200)}) == 200


def test_checksum_refuses_what_is_not_bytes_and_copies_that_do_not_fit() -> None:
    memory = np.zeros(8, np.uint8)
    with pytest.raises(TypeError):
        _native.checksum(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="contiguous"):
        _native.checksum(memory[::2])
    for seed in (-1, 2**64):
        with pytest.raises(OverflowError):
            _native.checksum(memory, seed)
    with pytest.raises(ValueError, match="out: expected 8 bytes, got 7"):
        _native.checked_copy(memory, np.zeros(7, np.uint8))
    with pytest.raises(ValueError, match="out: overlaps source"):
        _native.checked_copy(memory, memory)
    with pytest.raises(ValueError, match="out: expected a writable buffer"):
        _native.checked_copy(memory, bytes(8))


def test_swap_and_load_of_a_word() -> None:
    memory = np.zeros(24, np.uint8)
    memory[8:16].view(np.int64)[0] = 41
    assert _native.swap(memory[8:16], -(2**63)) == 41
    assert _native.load(memory[8:16]) == -(2**63)
    assert _native.swap(memory[8:16].view(np.int64), 2**63 - 1) == -(2**63)
    assert not memory[:8].any() and not memory[16:].any()


def swap_in(name: str, place: int, values: range) -> list[int]:
    """Swap the values into the word that shared memory begins with, at the same time as another; what came out."""
    memory = SharedMemory(name)
    word, *flags = np.frombuffer(memory.buf, np.int64, 3).reshape(3, 1)
    _native.swap(flags[place], 1)
    deadline = time.monotonic() + 240
    while not _native.load(flags[1 - place]):
        assert time.monotonic() < deadline, "the other process has not come"
    got = [_native.swap(word, value) for value in values]
    del word, flags
    memory.close()
    return got


def test_swap_loses_nothing_between_processes() -> None:
    """Each of the values that processes swap in comes out once, or is left."""
    memory = SharedMemory(create=True, size=24)
    try:
        parts = [range(first, 1 + 1_000_000, 2) for first in (1, 2)]
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            started = [pool.submit(swap_in, memory.name, place, part) for place, part in enumerate(parts)]
            got = [process.result() for process in started]
        left = _native.load(memory.buf[:8])
    finally:
        memory.unlink()
    assert sorted([*got[0], *got[1], left]) == list(range(1 + 1_000_000))


@pytest.mark.parametrize(
    ("word", "error"),
    [
        (np.zeros(8, np.float32), TypeError),
        (np.zeros(2, np.int64), ValueError),
        (np.zeros(4, np.uint8), ValueError),
        (np.zeros(16, np.uint8)[4:12], ValueError),
        (3, TypeError),
    ],
)
def test_swap_and_load_refuse_what_is_no_word(word: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="word"):
        _native.swap(word, 1)
    with pytest.raises(error, match="word"):
        _native.load(word)


def test_swap_refuses_read_only_memory_and_wide_values() -> None:
    word = np.zeros(1, np.int64)
    with pytest.raises(OverflowError):
        _native.swap(word, 2**63)
    word.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _native.swap(word, 1)
    assert _native.load(word) == 0


@pytest.mark.parametrize("planes", [1, 3, 4, 5])
@pytest.mark.parametrize("side", [1, 7, 8, 84])
def test_frames_are_scaled_and_their_planes_put_side_by_side(planes: int, side: int) -> None:
    frames = np.random.default_rng(planes).integers(0, 256, (3, planes, side, side), np.uint8)
    frames.flat[:256] = np.arange(frames.size)[:256]
    out = np.full((3, side, side, planes), np.nan, np.float32)
    _native.scale_frames(frames, out)
    np.testing.assert_array_equal(out, frames.transpose(0, 2, 3, 1).astype(np.float32) / np.float32(255))
    narrow = np.zeros(out.shape, np.uint16)
    _native.scale_frames(frames, narrow)
    np.testing.assert_array_equal(narrow.ravel(), reference.encode(out.ravel(), "bfloat16").view(np.uint16))


def test_scale_frames_refuses_what_it_cannot_take() -> None:
    frames, out = np.zeros((2, 4, 6, 5), np.uint8), np.zeros((2, 6, 5, 4), np.float32)
    _native.scale_frames(frames[:0], out[:0])
    for wrong in (out[:1], out.reshape(2, 5, 6, 4), out.reshape(2, 4, 6, 5), out.ravel()):
        with pytest.raises(ValueError, match="shape"):
            _native.scale_frames(frames, wrong)
    with pytest.raises(ValueError, match="contiguous"):
        _native.scale_frames(frames, out.transpose(0, 2, 1, 3))
    with pytest.raises(ValueError, match="overlaps"):
        _native.scale_frames(out.view(np.uint8).reshape(-1)[:240].reshape(2, 4, 6, 5), out)
    with pytest.raises(TypeError):
        _native.scale_frames(frames.astype(np.float32), out)
    with pytest.raises(TypeError):
        _native.scale_frames(frames, out.astype(np.float64))


@settings(deadline=None)
@given(seeds, sizes)
def test_rmsprop_agrees_with_its_twin(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    data, grad = draw_values(rng, size), draw_values(rng, size)
    square = np.abs(draw_values(rng, size))
    scale, learning_rate, epsilon = np.float32([rng.random(), 10 ** rng.uniform(-4, 0), 1e-5])
    alpha = rng.uniform(0.9, 1)
    with np.errstate(all="ignore"):
        taken = grad * scale
        expected_square = np.float32(alpha) * square + np.float32(1 - alpha) * taken * taken
        expected = data - learning_rate * taken / (np.sqrt(expected_square) + epsilon)
    _native.rmsprop(data, grad, square, scale, learning_rate, alpha, epsilon)
    np.testing.assert_array_equal(square, expected_square)
    np.testing.assert_array_equal(data, expected)


def test_rmsprop_refuses_what_it_cannot_take() -> None:
    data, grad, square = (np.zeros(8, np.float32) for _ in range(3))
    numbers = (1.0, 0.1, 0.99, 1e-5)
    with pytest.raises(ValueError, match="grad: expected 32 bytes"):
        _native.rmsprop(data, grad[:7], square, *numbers)
    with pytest.raises(ValueError, match="square: overlaps grad"):
        _native.rmsprop(data, grad, grad, *numbers)
    with pytest.raises(TypeError):
        _native.rmsprop(data, grad.astype(np.float64), square, *numbers)
    square.flags.writeable = False
    with pytest.raises(ValueError, match="square: expected a writable"):
        _native.rmsprop(data, grad, square, *numbers)


@pytest.mark.parametrize("seconds", [-1.0, 1.1e7, np.nan, np.inf])
def test_a_watch_takes_a_time_that_it_can_count(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        _native.watch(seconds, "")
    _native.watch(1e7, "never")
    _native.watch(0, "x" * 1000)


@pytest.mark.parametrize("code", [-2, 256])
def test_a_watch_ends_with_what_is_an_exit_code(code: int) -> None:
    with pytest.raises(ValueError, match="exit_code must be from -1 to 255"):
        _native.watch(0, "", code)


def test_the_time_that_a_process_has_run_is_counted_in_quarters() -> None:
    before = _native.running_s()
    time.sleep(1.1)
    assert _native.running_s() - before in (0.75, 1.0, 1.25) and before * 4 == int(before * 4)
