"""Points in time as users write them: ``3``, ``2ep``, ``500st``, ``10Mtok``, ``10%``, ``moe.enabled + 500st``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from apt_model.schedule.clock import Clock, Horizon, Unit

UNITS: dict[str, Unit | Literal["run"]] = {
    "ep": "epoch",
    "epoch": "epoch",
    "epochs": "epoch",
    "st": "step",
    "step": "step",
    "steps": "step",
    "sa": "sample",
    "sample": "sample",
    "samples": "sample",
    "tok": "token",
    "token": "token",
    "tokens": "token",
    "%": "run",
}
MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
GRAMMAR = "a whole number, or a time such as 2ep, 500st, 32ksa, 10Mtok, 10% or moe.enabled + 500st"

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)\s*([a-z]+|%)")
_ANCHORED = re.compile(r"([A-Za-z_][\w.*]*)\.(enabled|disabled|frozen|unfrozen|grown\d+)\s*(?:\+\s*(.+))?")


@dataclass(frozen=True)
class Time:
    """A point in time: ``amount`` of ``unit`` after the run's begin, or after the event that ``anchor`` names.

    ``run`` is a share of the planned updates. An event has the name ``SUBJECT.enabled`` (or disabled, frozen,
    unfrozen, grown16).
    """

    amount: Fraction
    unit: Unit | Literal["run"]
    anchor: str | None = None

    @classmethod
    def parse(cls, value: Any, *, by: Unit) -> Time:
        """Read a time; a bare number counts in the unit ``by``.

        Raises:
            ValueError: it is not a time; the message shows the grammar.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise ValueError(f"{value} is negative")
            return cls(Fraction(value), by)
        text = value.strip() if isinstance(value, str) else ""
        if match := _ANCHORED.fullmatch(text):
            subject, event, offset = match.groups()
            after = cls.parse(int(offset) if offset and offset.strip().isdigit() else offset or 0, by=by)
            if after.anchor is not None:
                raise ValueError(f"{value!r} names two events; a time comes after one")
            return cls(after.amount, after.unit, f"{subject}.{event}")
        match = _AMOUNT.fullmatch(text)
        if match is None or match.group(3) not in UNITS:
            raise ValueError(f"{value!r} is not {GRAMMAR}")
        number, multiple, unit = match.groups()
        amount = Fraction(number) * MULTIPLES[multiple]
        if unit == "%":
            if amount > 100 or multiple:
                raise ValueError(f"{value!r} is more than the whole run")
            amount /= 100
        return cls(amount, UNITS[unit])

    def reached(self, clock: Clock, horizon: Horizon, fired: Mapping[str, Clock]) -> bool:
        """Return whether ``clock`` is at this time or past it; ``fired``: when events happened."""
        origin = Clock()
        if self.anchor is not None:
            if self.anchor not in fired:
                return False
            origin = fired[self.anchor]
        if self.unit == "run":
            return clock.step - origin.step >= self.amount * horizon.steps
        if self.unit == "epoch" and (self.amount.denominator != 1 or self.anchor is not None):
            return clock.step - origin.step >= self.amount * horizon.updates_per_epoch
        elapsed: int = getattr(clock, self.unit) - getattr(origin, self.unit)
        return elapsed >= self.amount

    def step(self, horizon: Horizon, fired: Mapping[str, Clock]) -> int | None:
        """Return the first planned update at this time or past it; None: the event has not happened.

        Raises:
            ConfigError: samples or tokens, and the horizon does not know them.
        """
        origin = 0
        if self.anchor is not None:
            if self.anchor not in fired:
                return None
            origin = fired[self.anchor].step
        if self.unit == "run":
            return origin + horizon.first_step(self.amount * horizon.steps, "step")
        if origin and self.unit in ("sample", "token"):
            horizon.length(self.unit)
            start: int = getattr(fired[self.anchor or ""], self.unit)
            return horizon.first_step(start + self.amount, self.unit)
        return origin + horizon.first_step(self.amount, self.unit)

    def count(self, unit: Unit, horizon: Horizon) -> Fraction:
        """Return this length in ``unit``: the same unit as it is, others by the planned updates; shares are exact.

        Raises:
            ConfigError: samples or tokens, and the horizon does not know them.
        """
        if self.unit == unit:
            return self.amount
        if self.unit == "run":
            return self.amount * horizon.length(unit)
        steps = self.amount if self.unit == "step" else Fraction(horizon.first_step(self.amount, self.unit))
        if unit == "step":
            return steps
        return steps * horizon.length(unit) / horizon.steps

    def __str__(self) -> str:
        amount = self.amount * 100 if self.unit == "run" else self.amount
        number = str(amount.numerator) if amount.denominator == 1 else f"{float(amount):g}"
        text = {"run": f"{number}%", "epoch": f"{number}ep", "step": f"{number}st", "sample": f"{number}sa"}.get(
            self.unit, f"{number}tok"
        )
        if self.anchor is None:
            return text
        return f"{self.anchor} + {text}" if self.amount else self.anchor
