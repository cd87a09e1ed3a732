"""What the names of metrics say in rows of a record, whatever the application.

``schedule/NAME`` is a scheduled value; ``schedule/PART_enabled`` (0 or 1) says whether a part of the program is enabled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from apt_launch.record import Row

PREFIX: Final = "schedule/"
SWITCH: Final = "_enabled"
GROWN: Final = re.compile(r"_grown\d+$")


def is_scheduled_value(name: str) -> bool:
    """Return whether the metric ``name`` is a scheduled value."""
    return name.startswith(PREFIX) and not name.endswith((SWITCH, "_frozen")) and not GROWN.search(name)


def scheduled_values(row: Mapping[str, float]) -> dict[str, float]:
    """Return the scheduled values in ``row``, by the names of their anneals."""
    return {name.removeprefix(PREFIX): value for name, value in row.items() if is_scheduled_value(name)}


def enabled(row: Mapping[str, float]) -> list[str]:
    """Return the parts that ``row`` says are enabled."""
    return [
        name[len(PREFIX) : -len(SWITCH)]
        for name, value in row.items()
        if name.startswith(PREFIX) and name.endswith(SWITCH) and value
    ]


def first_enabled(rows: Sequence[Row]) -> dict[str, Row]:
    """Return, for each part that was ever enabled, the first of ``rows`` that says so."""
    found: dict[str, Row] = {}
    for row in rows:
        for part in enabled(row):
            found.setdefault(part, row)
    return found


def rank(value: float, direction: str) -> float:
    """Return what is less for a better value, ``minimize`` or ``maximize`` it; what is not a number is worst."""
    return math.inf if math.isnan(value) else -value if direction == "maximize" else value


def is_number(value: Any) -> bool:
    """Return whether ``value`` can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)
