"""What a curriculum will do, in order: the moments at which something begins, ends, or switches."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from apt_model.schedule.clock import Clock
from apt_model.schedule.program import Program, reader_of


@dataclass(frozen=True)
class Moment:
    """A planned update, what happens at it, and the scheduled values during it."""

    clock: Clock
    share: float  # of the run's updates, 0 to 1
    what: tuple[str, ...]
    values: dict[str, float]


def timeline(program: Program) -> list[Moment]:
    """Return the moments of ``program`` in their order, from the first update to the last."""
    horizon = program.horizon
    happens: dict[int, list[str]] = {0: ["begin"]}

    def add(step: int | None, what: str) -> None:
        if step is not None and step < horizon.steps:
            happens.setdefault(step, []).append(what)

    for subject, switches in program.switches.items():
        for switch in switches:
            step = switch.at.step(horizon, program.fired)
            event = subject.words(switch.on)
            if step is None:
                add(0, f"{event}: {switch.at}, whenever that is")
            add(step, event)
    for subject, when in program.latches.items():
        sign, threshold = (">", when.above) if when.above is not None else ("<", when.below)
        condition = f"{subject.name} is enabled when {when.metric} {sign} {threshold:g}"
        add(when.not_before.step(horizon, program.fired), f"from here on {condition}")
        if when.deadline is not None:
            add(when.deadline.step(horizon, program.fired), f"{subject.name} enabled at the latest")
    for name, spec in program.curriculum.all_anneals.items():
        pieces = [piece for piece in spec.curve(horizon, program.fired).pieces if piece.finish > piece.begin]
        begins = {piece.begin for piece in pieces}
        for piece in pieces:
            if piece.begin > 0:
                add(horizon.first_step(Fraction(piece.begin), spec.by), f"{name} leaves {piece.start:g}")
            if piece.finish < horizon.last(spec.by) and piece.finish not in begins:
                add(horizon.first_step(Fraction(piece.finish), spec.by), f"{name} stays {piece.end:g}")
    happens.setdefault(horizon.steps - 1, []).append("last update")
    moments = []
    for step, what in sorted(happens.items()):
        clock = horizon.clock_at(step)
        values = {name: float(value) for name, value in program.at(clock).items() if not isinstance(value, bool)}
        moments.append(Moment(clock, step / horizon.steps, tuple(dict.fromkeys(what)), values))
    return moments


def series(program: Program, points: int = 512) -> tuple[list[int], list[dict[str, bool | float]]]:
    """Return planned steps, ``points`` or so, every epoch's first and all events among them, and the scheduled values at each."""
    horizon = program.horizon
    stride = max(1, horizon.steps // points)
    epochs = range(0, horizon.steps, horizon.updates_per_epoch * max(1, horizon.epochs // points))
    events = [clock.step for clock in program.fired.values() if clock.step < horizon.steps]
    steps = sorted({*range(0, horizon.steps, stride), *epochs, *events, horizon.steps - 1})
    return steps, [program.at(horizon.clock_at(step)) for step in steps]


def effect(program: Program, points: int = 128) -> list[dict[str, bool | float | None]]:
    """Return what has an effect on a model: values count only while the module that reads them is enabled."""
    noticed = []
    for state in series(program, points)[1]:
        read: dict[str, bool | float | None] = {}
        for name, value in state.items():
            module = None if isinstance(value, bool) else reader_of(program.curriculum, name)
            off = module in program.modules and module not in _latched(program) and not state[f"{module}_enabled"]
            read[name] = None if off else value
        noticed.append(read)
    return noticed


def _latched(program: Program) -> set[str]:
    return {subject.name for subject in program.latches}
