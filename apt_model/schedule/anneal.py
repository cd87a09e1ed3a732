"""An anneal as it stands in YAML: its grammar, and the curve that it is in a run."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from apt_model.errors import ConfigError
from apt_model.schedule.clock import Clock, Horizon, Unit
from apt_model.schedule.curves import SAME_SIGN, SHAPES, Curve, Piece, Shape, linear, polynomial, root_of_time, stairs
from apt_model.schedule.fields import Length, Number, Pattern, Positive, PositiveNumber, Span, Strict, span
from apt_model.schedule.targets import Domain
from apt_model.schedule.times import Time

ShapeName = Literal["linear", "cosine", "exponential", "polynomial", "sqrt", "inverse_sqrt", "step", "one_cycle"]


class Segment(Strict):
    """A part of a curve: a ``ramp`` to a value, a ``hold`` for a length, or a ``jump`` to a value."""

    ramp: Number | None = None  # go to this value
    hold: Span | None = None  # keep the value for this length
    jump: Number | None = None  # have this value at once
    over: Span | None = None  # length of a ramp; null: an equal part of what other segments leave
    type: Literal["linear", "cosine", "exponential", "sqrt", "inverse_sqrt"] = "linear"  # shape of a ramp

    def contradictions(self, key: str) -> list[str]:
        """Return what does not go together."""
        kinds = [name for name in ("ramp", "hold", "jump") if getattr(self, name) is not None]
        if len(kinds) != 1:
            return [f"{key}: give one of ramp, hold and jump, not {' and '.join(kinds) or 'none'}."]
        if self.over is not None and self.ramp is None:
            return [f"{key}.over: only a ramp goes over a length."]
        return []


class Anneal(Strict):
    """A value that moves: from ``start`` to ``end``, through ``points``, or along ``segments``.

    Indices count in ``by`` from the begin of the window (``from`` to ``until``, or ``over`` a length; the whole run unless
    said otherwise), whose last update has the last value. ``warmup`` ramps from 0 to ``start`` first, ``cooldown`` from
    ``end`` to 0 last; an ``inverse_sqrt`` without ``end`` goes by its warmup, however long the run is. Lengths are counts of
    ``by``, times in other units, or shares of the window (``10%``).
    """

    target: Pattern | None = None  # what it writes: a path, or a pattern with *; only below anneals
    start: Number | None = None  # the first value
    end: Number | None = None  # the last value; inverse_sqrt after a warmup needs none: start x sqrt(warmup / index)
    by: Unit = "epoch"  # what the value moves with
    type: ShapeName = "linear"  # shape from start to end, and between points
    warmup: Span = 0  # from 0 to start over this length first
    cooldown: Span = 0  # from end to 0 over this length last
    power: PositiveNumber | None = None  # of polynomial: the way left shrinks as (1 - t)^power
    steps: Positive | None = None  # of step: how many equal ones
    peak: Number | None = None  # of one_cycle: the value on the way
    peak_at: Span = "30%"  # of one_cycle: when the peak is reached
    points: dict[int | str, Number] | None = None  # values at times, instead of start and end
    segments: list[Segment] | None = None  # ramps, holds and jumps, one after the other, instead of end
    repeat: Positive = 1  # how often segments are gone through
    begin: Length = Field(default=0, alias="from")  # where the window begins; before it the first value holds
    until: Length | None = None  # where the window ends; after it the last value holds; null: the run's end
    over: Span | None = None  # the window's length, instead of until

    def contradictions(self, key: str) -> list[str]:
        """Return what is missing or does not go together, before any run is known."""
        problems = []
        ways = [name for name in ("end", "points", "segments") if getattr(self, name) is not None]
        if len(ways) != 1 and not (not ways and self._goes_by_warmup):
            problems.append(
                f"{key}.end: missing. Give it a value, for instance on the command line: {key}.end=..."
                + (f" Or give {key}.warmup: it goes as start x sqrt(warmup / index)." * (self.type == "inverse_sqrt"))
                if not ways
                else f"{key}: {' and '.join(ways)} each say where the value goes; give one of them."
            )
        if self.start is None and self.points is None:
            problems.append(f"{key}.start: missing. Give it a value, for instance on the command line: {key}.start=...")
        if self.until is not None and self.over is not None:
            problems.append(f"{key}.until and {key}.over are both set; set one of them to null.")
        for name, kind in (("power", "polynomial"), ("steps", "step"), ("peak", "one_cycle")):
            if self.type == kind and getattr(self, name) is None:
                problems.append(f"{key}.{name}: missing; type: {kind} needs it.")
            if self.type != kind and getattr(self, name) is not None:
                problems.append(f"{key}.{name}: only type: {kind} reads it, and the type is {self.type}.")
        if self.segments is None and self.repeat != 1:
            problems.append(f"{key}.repeat: only segments can be repeated.")
        for at in self.points or {}:
            try:
                span(at)
            except ValueError as error:
                problems.append(f"{key}.points: {error}")
        for name in ("points", "segments"):
            if getattr(self, name) is not None and not getattr(self, name):
                problems.append(f"{key}.{name}: empty. Give at least one, or set it to null.")
        for number, segment in enumerate(self.segments or []):
            problems += segment.contradictions(f"{key}.segments[{number}]")
        if self.type in SAME_SIGN and self.start is not None and self.end is not None and self.start * self.end <= 0:
            problems.append(
                f"{key}: type: {self.type} goes from start to end by factors, so both must be of one sign and not 0; they "
                f"are {self.start:g} and {self.end:g}."
            )
        return problems

    @property
    def _goes_by_warmup(self) -> bool:
        """Whether the warmup says where the value goes, and not an end."""
        return self.type == "inverse_sqrt" and self.end is None and Time.parse(self.warmup, by=self.by).amount > 0

    def anchors(self) -> list[str]:
        """Return the events that the window waits for."""
        times = [Time.parse(value, by=self.by) for value in (self.begin, self.until) if value is not None]
        return [time.anchor for time in times if time.anchor is not None]

    def _window(self, horizon: Horizon, fired: Mapping[str, Clock]) -> tuple[float, float, float] | None:
        """Return where the window begins, its length and its last index, in ``by``; None: it waits for an event."""
        begin = self._position(self.begin, horizon, fired)
        whole = float(horizon.length(self.by))
        finish = whole if self.until is None else self._position(self.until, horizon, fired)
        if begin is None or finish is None:
            return None
        if self.over is not None:
            finish = begin + float(Time.parse(self.over, by=self.by).count(self.by, horizon))
        per_update = {"epoch": 1, "step": 1, "sample": horizon.samples_per_update or 1}.get(
            self.by, (horizon.samples_per_update or 1) * (horizon.tokens_per_sample or 1)
        )
        last = float(horizon.last(self.by)) if finish >= whole else finish - per_update
        return begin, finish - begin, max(last, begin)

    def _position(self, value: Any, horizon: Horizon, fired: Mapping[str, Clock]) -> float | None:
        time = Time.parse(value, by=self.by)
        if time.anchor is None:
            return float(time.count(self.by, horizon))
        if time.anchor not in fired:
            return None
        origin: int = getattr(fired[time.anchor], self.by)
        return origin + float(Time(time.amount, time.unit).count(self.by, horizon))

    def length(self, value: Any, window: float, horizon: Horizon) -> Fraction:
        """Return a length in ``by``; a share is one of ``window`` and rounded to the nearest whole index, halves up."""
        time = Time.parse(value, by=self.by)
        if time.unit == "run":
            return Fraction(int(time.amount * Fraction(window) + Fraction(1, 2)))
        return time.count(self.by, horizon)

    def curve(self, horizon: Horizon, fired: Mapping[str, Clock] | None = None) -> Curve:
        """Return the value as a function of the index in ``by``.

        Args:
            fired: when events happened; while one that the window waits for has not, the first value holds.
        """
        window = self._window(horizon, fired or {})
        if window is None:
            first = self._first_value()
            return Curve([Piece(0.0, 0.0, first, first, linear)])
        begin, length, last = window
        if self.points is not None:
            return Curve(self._through_points(horizon, last))
        if self.segments is not None:
            return Curve(self._along_segments(begin, length, last, horizon))
        return Curve(self._start_to_end(begin, length, last, horizon))

    def _first_value(self) -> float:
        if self.points is not None:
            return next(iter(self.points.values()))
        return 0.0 if self.warmup else float(self.start or 0.0)

    def _start_to_end(self, begin: float, length: float, last: float, horizon: Horizon) -> list[Piece]:
        assert self.start is not None
        up = begin + float(self.length(self.warmup, length, horizon))
        down = last - float(self.length(self.cooldown, length, horizon))
        pieces = [Piece(begin, up, 0.0, self.start, linear)] if up > begin else []
        if self._goes_by_warmup:
            over = max(up - begin, 1.0)  # a share of a short window may be no index at all
            end = root_of_time((down - up) / over, self.start, 0.0)
            pieces.append(Piece(up, down, self.start, end, root_of_time, over))
            return [*pieces, Piece(down, last, end, 0.0, linear)] if down < last else pieces
        assert self.end is not None
        if self.type == "one_cycle":
            assert self.peak is not None
            top = up + float(self.length(self.peak_at, length, horizon))
            pieces += [
                Piece(up, top, self.start, self.peak, SHAPES["cosine"]),
                Piece(top, down, self.peak, self.end, SHAPES["cosine"]),
            ]
        else:
            pieces.append(Piece(up, down, self.start, self.end, self._shape()))
        if down < last:
            pieces.append(Piece(down, last, self.end, 0.0, linear))
        return pieces

    def _shape(self) -> Shape:
        if self.type == "polynomial":
            return polynomial(self.power or 1.0)
        if self.type == "step":
            return stairs(self.steps or 1)
        return SHAPES[self.type]

    def _through_points(self, horizon: Horizon, last: float) -> list[Piece]:
        knots = [
            (min(float(Time.parse(at, by=self.by).count(self.by, horizon)), last), value)
            for at, value in (self.points or {}).items()
        ]
        shape = self._shape()
        pieces = [Piece(here, there, value, following, shape) for (here, value), (there, following) in pairwise(knots)]
        return pieces or [Piece(knots[0][0], knots[0][0], knots[0][1], knots[0][1], shape)]

    def _along_segments(self, begin: float, length: float, last: float, horizon: Horizon) -> list[Piece]:
        assert self.start is not None
        span = length / self.repeat
        pieces = []
        for cycle in range(self.repeat):
            at, value = begin + cycle * span, self.start
            pieces.append(Piece(at, at, value, value, linear))
            for segment, over in zip(self.segments or [], self._overs(span, horizon), strict=True):
                finish = at + over if at + over < begin + length else last
                if segment.jump is not None:
                    value = segment.jump
                    pieces.append(Piece(at, at, value, value, linear))
                elif segment.ramp is not None:
                    pieces.append(Piece(at, finish, value, segment.ramp, SHAPES[segment.type]))
                    value = segment.ramp
                at += over
        return pieces

    def _overs(self, span: float, horizon: Horizon) -> list[float]:
        """Return the length of each segment in one cycle; a ramp that does not say takes what is left."""
        overs: list[float | None] = []
        for segment in self.segments or []:
            given = segment.hold if segment.hold is not None else segment.over
            if segment.jump is not None:
                overs.append(0.0)
            else:
                overs.append(None if given is None else float(self.length(given, span, horizon)))
        rest = span - sum(over for over in overs if over is not None)
        open_ended = max(1, sum(over is None for over in overs))
        return [rest / open_ended if over is None else over for over in overs]

    def problems(
        self, key: str, horizon: Horizon, domain: Domain | None = None, fired: Mapping[str, Clock] | None = None
    ) -> list[str]:
        """Return what keeps this anneal from running over ``horizon`` within ``domain``."""
        if problems := self.contradictions(key):
            return problems
        try:
            window = self._window(horizon, fired or {})
            return [] if window is None else self._misfits(key, horizon, window, domain or Domain())
        except ConfigError as error:
            return [f"{key}: {problem}" for problem in error.problems]

    def _misfits(self, key: str, horizon: Horizon, window: tuple[float, float, float], domain: Domain) -> list[str]:
        begin, length, _ = window
        room = f"the run has only {length:g} {self.by}s ({horizon})"
        if begin or self.until is not None or self.over is not None:
            room = f"its window has only {length:g} {self.by}s"
        if length <= 0 or begin >= horizon.length(self.by):
            return [
                f"{key}: its window ends before it begins, or begins after the run ({horizon}). Mend from and until."
            ]
        problems: list[str] = []
        if begin + length > horizon.length(self.by):
            end = "over" if self.over is not None else "until"
            problems.append(
                f"{key}.{end} = {getattr(self, end)} ends after the run: at {begin + length:g} {self.by}s, and there are "
                f"{horizon.length(self.by)} ({horizon}). Set it earlier."
            )
        if self.points is None and self.segments is None:
            for name, value in (("warmup", self.warmup), ("cooldown", self.cooldown)):
                count = self.length(value, length, horizon)
                if count.denominator != 1:
                    problems.append(
                        f"{key}.{name} = {value} is no whole number of {self.by}s, and the value moves by {self.by}. Set "
                        f"{key}.by=step or another length."
                    )
                elif count and count >= length:
                    problems.append(
                        f"{key}.{name} is {value} = {count} {self.by}s, but {room}, so the anneal would never begin. Set "
                        f"{key}.{name} below {length:g} (a share such as 10% fits any run), or make the run longer with "
                        "trainer.max_epochs."
                    )
            both = self.length(self.warmup, length, horizon) + self.length(self.cooldown, length, horizon)
            if not problems and both and both >= length:
                problems.append(f"{key}: warmup and cooldown take {both} {self.by}s together, but {room}.")
            up = self.length(self.peak_at, length, horizon)
            if not problems and self.type == "one_cycle" and not 0 < up < length - 1 - both:
                problems.append(
                    f"{key}.peak_at is {self.peak_at} = {up} {self.by}s after the start, which must leave a way up and a way "
                    f"down, but {room}. Set {key}.peak_at between 1 and {max(1, int(length - 2 - both))} {self.by}s."
                )
        elif self.points is not None:
            at = [Time.parse(point, by=self.by).count(self.by, horizon) for point in self.points]
            if any(later <= earlier for earlier, later in pairwise(at)):
                problems.append(f"{key}.points: {', '.join(map(str, self.points))} are not in the order of time.")
            if at and at[-1] > horizon.length(self.by):
                problems.append(f"{key}.points: {list(self.points)[-1]} is after the end: the run has {horizon}.")
        elif min(self._overs(length / self.repeat, horizon), default=0.0) < 0 or (
            sum(self._overs(length / self.repeat, horizon)) > length / self.repeat + 1e-9
        ):
            problems.append(
                f"{key}.segments take {sum(max(0.0, o) for o in self._overs(length / self.repeat, horizon)):g} {self.by}s, "
                f"but there are only {length / self.repeat:g} for one round ({room})."
            )
        if problems:
            return problems
        return self._strays(key, horizon, domain)

    def _strays(self, key: str, horizon: Horizon, domain: Domain) -> list[str]:
        """Return which values are outside the domain."""
        problems = [
            f"{key}.{name} = {value:g} is outside its domain: it must be {domain}."
            for name, value in (("start", self.start), ("end", self.end), ("peak", self.peak))
            if value is not None and value not in domain
        ]
        if not problems and 0.0 not in domain:
            problems = [
                f"{key}.{name} = {value} ramps {'up from' if name == 'warmup' else 'down to'} 0, which is outside the "
                f"domain: the value must be {domain}. Set {key}.{name}=0."
                for name, value in (("warmup", self.warmup), ("cooldown", self.cooldown))
                if value and self.points is None and self.segments is None
            ]
        if not problems:
            strays = sorted({value for value in self.curve(horizon).ends if value not in domain})
            if strays:
                problems.append(
                    f"{key}: {', '.join(f'{value:g}' for value in strays)} outside its domain: it must be {domain}."
                )
        return problems
