"""Base-(k+1) graphs: in each round a rank mixes with at most k others, and after one period all hold the exact mean.

They do so for any number of ranks, in about 2 log_{k+1} N rounds; one-peer exponential graphs do it for powers of two
only. Source: Takezawa et al. 2023, Beyond Exponential Graph, arXiv:2305.11420.

Written from three parts. All edges go both ways, so each round is symmetric and doubly stochastic.

    digits      a block of f_1 * f_2 * ... members, every f at most k + 1, is a grid. In the round of f_i those that
                differ in coordinate i alone average: after all rounds the whole block has its mean.
    any size    N in base k + 1 is a sum of a_l (k + 1)^p_l, largest first: part l has a_l blocks of (k + 1)^p_l ranks.
                Each part averages by its digits. Then parts 1, 2, ... in turn hand over: the R ranks behind the part
                are fewer than a block has, so each of them mixes with one rank of each block, a different one. With
                the weight s / S, where s is the size of a block and S = a_l s + R, the mean of those behind is that
                of all S, and so is that of each block. Then each block averages by its digits once more, while those
                behind go on in the same way among themselves.
    factors     N = p q, where p has no prime factor above k + 1, and q no other: p groups of q ranks average inside,
                then the members of the same number do by their digits. Taken where it has fewer rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gala_mpi.gossip.rules import Rule, Weights

Round: TypeAlias = Callable[[int], Weights]
"""Whom a member mixes with in a round, and the weight of each."""


@dataclass(frozen=True)
class _Piece:
    """What the members from `begin` to `end` - 1 do in a round; those that no piece has, rest."""

    begin: int
    end: int
    round: Round


def base_graph(size: int, base: int) -> Rule:
    """The Base-`base` graph over `size` ranks, of degree base - 1 at most."""
    whole = _any_size(size, base)
    smooth, factors = _smooth(size, base)
    part = size // smooth
    factored = [_inside(turn, part) for turn in _any_size(part, base)] + _grid(factors, part)
    rounds = min(whole, factored, key=len) or [lambda _rank: {}]
    return Rule(lambda rank, turn: rounds[turn](rank), lambda rank, turn: list(rounds[turn](rank)), len(rounds))


def _grid(factors: Sequence[int], stride: int = 1, begin: int = 0) -> list[Round]:
    """One round for each factor: the members from `begin` on whose coordinate alone differs, average."""

    def along(stride: int, factor: int) -> Round:
        def average(member: int) -> Weights:
            first = member - ((member - begin) // stride % factor) * stride
            line = range(first, first + factor * stride, stride)
            return {other: 1 / factor for other in line if other != member}

        return average

    rounds = []
    for factor in factors:
        rounds.append(along(stride, factor))
        stride *= factor
    return rounds


def _any_size(size: int, base: int) -> list[Round]:
    """Rounds that bring `size` members to their mean, whatever their number."""
    parts = _parts(size, base)
    first = max((power + (blocks > 1) for blocks, power in parts), default=0)
    timeline: dict[int, list[_Piece]] = {}
    begin = 0
    for number, (blocks, power) in enumerate(parts):
        block, digits = base**power, [base] * power
        end = begin + blocks * block
        own = digits + [blocks] * (blocks > 1)
        for turn, average in enumerate(_grid(own, begin=begin)):
            timeline.setdefault(turn, []).append(_Piece(begin, end, average))
        if end < size:
            turn = first + number
            timeline.setdefault(turn, []).append(_Piece(begin, size, _hand_over(begin, blocks, block, size)))
            for later, average in enumerate(_grid(digits, begin=begin), start=turn + 1):
                timeline.setdefault(later, []).append(_Piece(begin, end, average))
        begin = end
    return [_all_of(timeline[turn]) for turn in range(len(timeline))]


def _parts(size: int, base: int) -> list[tuple[int, int]]:
    """The digits of `size` that are not 0, the highest first: (digit, its power of the base)."""
    digits = []
    power = 0
    while size:
        size, digit = divmod(size, base)
        if digit:
            digits.append((digit, power))
        power += 1
    return digits[::-1]


def _hand_over(begin: int, blocks: int, block: int, size: int) -> Round:
    """The members behind the blocks mix with one of each block."""
    end = begin + blocks * block
    weight = block / (size - begin)

    def mix(member: int) -> Weights:
        if member >= end:
            return {begin + number * block + member - end: weight for number in range(blocks)}
        partner = end + (member - begin) % block
        return {partner: weight} if partner < size else {}

    return mix


def _all_of(pieces: Sequence[_Piece]) -> Round:
    def mix(member: int) -> Weights:
        return next((piece.round(member) for piece in pieces if piece.begin <= member < piece.end), {})

    return mix


def _inside(turn: Round, part: int) -> Round:
    """The round within each group of `part` consecutive members."""

    def mix(member: int) -> Weights:
        begin = member - member % part
        return {begin + other: weight for other, weight in turn(member - begin).items()}

    return mix


def _smooth(size: int, base: int) -> tuple[int, list[int]]:
    """The largest divisor of `size` without a prime factor above `base`, and factors of it of at most `base`."""
    smooth, factors = 1, []
    while factor := next((factor for factor in range(base, 1, -1) if size % factor == 0), 0):
        factors.append(factor)
        smooth, size = smooth * factor, size // factor
    return smooth, factors
