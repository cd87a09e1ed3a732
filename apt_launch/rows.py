"""What the names of metrics say in rows of a record, whatever the application.

``schedule/NAME`` is a scheduled value; ``schedule/PART_enabled`` (0 or 1) says whether a part of the program is enabled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

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


class Stretch(NamedTuple):
    """Rows between which a part was enabled."""

    first: Row
    off: Row | None
    """The first one that says that it no longer is; None: it stayed enabled."""


def stretches(rows: Sequence[Row]) -> dict[str, list[Stretch]]:
    """Return, for each part that was ever enabled, when it was, in the order of ``rows``."""
    found: dict[str, list[Stretch]] = {}
    for row in rows:
        on = enabled(row)
        for part in {*found, *on}:
            own = found.setdefault(part, [])
            is_on = bool(own) and own[-1].off is None
            if part in on and not is_on:
                own.append(Stretch(row, None))
            elif is_on and row.get(f"{PREFIX}{part}{SWITCH}") == 0:
                own[-1] = own[-1]._replace(off=row)
    return found


def phase_of(row: Mapping[str, float]) -> str:
    """Return the parts that ``row`` says are enabled, as the name of a phase."""
    return "+".join(enabled(row)) or "dense"


class Speed(NamedTuple):
    """How fast a phase was trained."""

    tokens_per_second: float
    mfu: float | None  # model FLOPs utilisation, where the rows have it


class Speeds:
    """How fast each phase of a run was, by its rows in their order.

    A phase's first row tells of the updates before it, too, and of what was compiled for it: it counts where there is no other.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # by phase: tokens, seconds, seconds with a utilisation, those times it
        self._first: dict[str, list[float]] = {}
        self._before: tuple[str, float] = ("", 0.0)

    def add(self, row: Mapping[str, float]) -> None:
        """Take up a row; those without a speed say nothing."""
        speed, tokens = row.get("tokens_per_second"), row.get("tokens")
        if not (is_number(speed) and is_number(tokens) and speed and tokens):
            return
        phase, (before, begin) = phase_of(row), self._before
        self._before = (phase, tokens)
        seconds, mfu = max(0.0, tokens - begin) / speed, row.get("mfu")
        found = [tokens - begin, seconds, *((seconds, seconds * mfu) if mfu is not None else (0.0, 0.0))]
        if phase != before:
            self._first.setdefault(phase, found)
            return
        sums = self._sums.setdefault(phase, [0.0] * 4)
        self._sums[phase] = [one + other for one, other in zip(sums, found, strict=True)]

    def by_phase(self) -> dict[str, Speed]:
        """Return what is known, in the order of the phases."""
        sums = {phase: self._sums.get(phase, first) for phase, first in self._first.items()}
        return {
            phase: Speed(tokens / seconds, with_mfu / known if known else None)
            for phase, (tokens, seconds, known, with_mfu) in sums.items()
            if seconds > 0
        }


def as_speed(speed: Speed) -> str:
    """Return a speed as text."""
    mfu = "" if speed.mfu is None else f" ({speed.mfu:.1%} MFU)"
    return f"{speed.tokens_per_second:,.0f} tokens/s{mfu}"


def rank(value: float, direction: str) -> float:
    """Return what is less for a better value, ``minimize`` or ``maximize`` it; what is not a number is worst."""
    return math.inf if math.isnan(value) else -value if direction == "maximize" else value


def is_number(value: Any) -> bool:
    """Return whether ``value`` can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)
