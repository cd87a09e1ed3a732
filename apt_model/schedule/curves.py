"""Curves: a value over an index, made of pieces that each go from one value to another in some shape."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

Shape = Callable[[float, float, float], float]
"""Maps progress in (0, 1), start and end to the value in between; the ends themselves are exact without it."""


def linear(t: float, start: float, end: float) -> float:
    """Equal parts of the way in equal times."""
    return start * (1.0 - t) + end * t


def cosine(t: float, start: float, end: float) -> float:
    """Half a cosine wave: slow at both ends. Source: SGDR, arXiv:1608.03983, one cycle without restarts."""
    return linear((1.0 - math.cos(math.pi * t)) / 2.0, start, end)


def exponential(t: float, start: float, end: float) -> float:
    """Equal factors in equal times: start x (end / start)^t; both ends are of one sign, not 0."""
    return start * math.pow(end / start, t)


def sqrt(t: float, start: float, end: float) -> float:
    """The way gone grows with the root of time: fast first. Source: the 1-sqrt cooldown of arXiv:2405.18392."""
    return linear(math.sqrt(t), start, end)


def inverse_sqrt(t: float, start: float, end: float) -> float:
    """Start / sqrt(1 + c t), with c such that the end is met; both ends are of one sign, not 0 (arXiv:1706.03762)."""
    ratio = (start / end) ** 2
    return start / math.sqrt(1.0 + (ratio - 1.0) * t)


def root_of_time(t: float, start: float, end: float) -> float:
    """Start / sqrt(1 + t), wherever that leads: with t in lengths of the warmup, the rate of arXiv:1706.03762."""
    return start / math.sqrt(1.0 + t)


def polynomial(power: float) -> Shape:
    """The way left shrinks as (1 - t)^power: power 1 is linear, above 1 fast first."""
    return lambda t, start, end: linear(1.0 - (1.0 - t) ** power, start, end)


def stairs(steps: int) -> Shape:
    """``steps`` equal steps: the first is taken after 1/(steps + 1) of the time, the last before its last part."""
    return lambda t, start, end: linear(math.floor(t * (steps + 1)) / steps, start, end)


SHAPES: dict[str, Shape] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "sqrt": sqrt,
    "inverse_sqrt": inverse_sqrt,
}
"""Shapes without parameters of their own. Curricula also know polynomial, step and one_cycle."""

SAME_SIGN = ("exponential", "inverse_sqrt")
"""Shapes whose start and end must be of one sign and not 0."""


class Piece(NamedTuple):
    """From ``start`` at index ``begin`` to ``end`` at index ``finish``, in ``shape``.

    ``shape`` is asked in parts of ``over``; None: of the piece's length.
    """

    begin: float
    finish: float
    start: float
    end: float
    shape: Shape
    over: float | None = None


class Curve:
    """Pieces in their order: each holds its end until the next begins; before the first its start holds."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self.at: Callable[[float], float] = _single(self.pieces[0]) if len(pieces) == 1 else _several(self.pieces)

    def __call__(self, index: float) -> float:
        """Return the value at ``index``; ends of pieces are met exactly."""
        return self.at(index)

    @property
    def ends(self) -> list[float]:
        """The values at the ends of all pieces: no value lies outside their range."""
        return [value for piece in self.pieces for value in (piece.start, piece.end)]


def _single(piece: Piece) -> Callable[[float], float]:
    begin, finish, start, end, shape, over = piece
    if start == end:  # exactly, whatever shape and length round to: runs that keep one value are then equal
        return lambda index: end
    length = finish - begin if over is None else over

    def at(index: float) -> float:
        if index >= finish:
            return end
        if index <= begin:
            return start
        return shape((index - begin) / length, start, end)

    return at


def _several(pieces: tuple[Piece, ...]) -> Callable[[float], float]:
    begins = [piece.begin for piece in pieces]
    singles = [_single(piece) for piece in pieces]

    def at(index: float) -> float:
        return singles[max(bisect_right(begins, index) - 1, 0)](index)

    return at
