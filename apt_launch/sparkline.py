"""A curve in a line of text."""

from __future__ import annotations

from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def blocks(numbers: Sequence[float]) -> str:
    """Return ``numbers`` as blocks, one each, the lowest number as the lowest one."""
    low, high = min(numbers), max(numbers)
    levels = [round((number - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 0 for number in numbers]
    return "".join(BLOCKS[level] for level in levels)
