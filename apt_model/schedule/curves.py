"""Shapes of a curve: progress in [0, 1] to the fraction of the way from ``start`` to ``end``."""

from __future__ import annotations

import math
from collections.abc import Callable


def linear(progress: float) -> float:
    """Equal parts of the way in equal times."""
    return progress


def cosine(progress: float) -> float:
    """Half a cosine wave: slow at both ends. Source: SGDR, arXiv:1608.03983, one cycle without restarts."""
    return (1.0 - math.cos(math.pi * progress)) / 2.0


SHAPES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine}


def anneal(index: int, *, length: int, warmup: int, start: float, end: float, shape: str) -> float:
    """Return the value in force at ``index`` of a run of ``length`` indices.

    Over the first ``warmup`` indices the value ramps from 0 towards ``start``; index ``warmup`` has ``start``, index
    ``length - 1`` has ``end``, both exactly. A range of one point has ``end``; past the run the value stays ``end``.
    """
    if index < warmup:
        return start * index / warmup
    span = length - 1 - warmup
    if index - warmup >= span:
        return end
    fraction = SHAPES[shape]((index - warmup) / span)
    return start * (1.0 - fraction) + end * fraction
