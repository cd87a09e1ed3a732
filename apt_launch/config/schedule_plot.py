"""Pictures of a config's curriculum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apt_launch.drawing import Drawing, new_figure
from apt_launch.escapes import label as plain

if TYPE_CHECKING:  # the process that draws needs none of it
    from apt_model.schedule import Clock, Program

Rates = Mapping[str, "Callable[[Clock], float]"]
"""The learning rate at a clock, by label."""


@dataclass(frozen=True)
class Sheet:
    """One curriculum as plain values, ready to be drawn, also by another process."""

    label: str
    horizon: str
    num_steps: int
    steps: list[int]
    values: dict[str, list[float]]  # anneals: the scheduled value at each of steps
    stretches: dict[str, list[tuple[int, int]]]  # modules: where they are enabled, in steps
    notes: dict[str, str]  # modules: what is written beside


def sheets(programs: Mapping[str, Program], rates: Rates | None = None) -> list[Sheet]:
    """Evaluate ``programs``, by label, with the functions that training calls; ``rates`` are drawn as ``lr``."""
    return [_sheet(label, program, (rates or {}).get(label)) for label, program in programs.items()]


def _sheet(label: str, program: Program, rate: Callable[[Clock], float] | None) -> Sheet:
    from apt_model.schedule.timeline import series

    steps, states = series(program)
    horizon = program.horizon
    notes = {}
    for module in program.modules:
        first = program.first_step(module)
        notes[module] = (
            f"enabled from epoch {first // horizon.updates_per_epoch}, step {first}" if first is not None else "off"
        )
        if any(subject.name == module for subject in program.latches):
            notes[module] = "when its metric says so"
    values = {name: [float(state[name]) for state in states] for name in program.curriculum.all_anneals}
    if rate is not None:
        values["lr"] = [rate(horizon.clock_at(step)) for step in steps]
    return Sheet(
        label=label,
        horizon=str(horizon),
        num_steps=horizon.steps,
        steps=steps,
        values=values,
        stretches={
            m: _stretches(steps, [bool(state[f"{m}_enabled"]) for state in states], horizon.steps)
            for m in program.modules
        },
        notes=notes,
    )


def _stretches(steps: list[int], on: list[bool], end: int) -> list[tuple[int, int]]:
    """Return where ``on`` holds, as (begin, end) in steps."""
    found: list[tuple[int, int]] = []
    begin: int | None = None
    for step, value in [*zip(steps, on, strict=True), (end, False)]:
        if value and begin is None:
            begin = step
        elif not value and begin is not None:
            found.append((begin, step))
            begin = None
    return found


def draw_schedule(drawn: Sequence[Sheet], path: Path) -> None:
    """Draw the anneals and switches of one curriculum, or of several laid over each other, into a PNG at ``path``.

    A picture that fails is a warning.
    """
    with Drawing(path):
        _draw(drawn, path)


def _draw(drawn: Sequence[Sheet], path: Path) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    names = list(dict.fromkeys(name for sheet in drawn for name in sheet.values))
    longest = max(sheet.num_steps for sheet in drawn)
    modules = list(drawn[0].stretches)
    switches_height = 0.28 * max(1, len(modules)) * len(drawn)
    height = 0.85 + 1.5 * len(names) + switches_height
    figure = new_figure(9, height)
    grid = {"color": "#b0b0b0", "alpha": 0.3, "linewidth": 0.8}
    ratios = [1.2] * len(names) + [switches_height]
    axes = figure.subplots(len(names) + 1, 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    figure.subplots_adjust(left=0.08, right=0.98, top=1 - 0.35 / height, bottom=0.5 / height, hspace=0.35)
    # a tick is five objects to matplotlib: those of the curves' steps would be half of the picture's time
    ticks = [
        tick
        for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True).tick_values(0, longest)
        if tick <= longest
    ]
    for axis, name in zip(axes, names, strict=False):
        for number, sheet in enumerate(drawn):
            if name not in sheet.values:
                continue
            values, end = sheet.values[name], sheet.num_steps
            steps = [*sheet.steps, end]
            axis.step(
                steps, [*values, values[-1]], where="post", color=f"C{number}", label=plain(sheet.label), linewidth=1.4
            )
            for step, value, side in ((0, values[0], "left"), (end, values[-1], "right")):
                axis.annotate(
                    f"{value:.4g}", (step, value), textcoords="offset points", xytext=(0, 3), ha=side, fontsize=8
                )
        # with a height of its own: matplotlib would look for one, which takes a third of the time
        axis.set_title(plain(name), loc="left", fontsize=10, y=1.0)
        axis.margins(x=0, y=0.2)
        axis.set_xlim(0, longest)
        axis.xaxis.set_major_locator(NullLocator())
        axis.yaxis.set_major_locator(MaxNLocator(3))
        axis.vlines(ticks, 0, 1, transform=axis.get_xaxis_transform(), **grid)
        axis.grid(**grid)
    if len(drawn) > 1 and names:
        axes[0].legend(fontsize=8, loc="lower left")

    switches = axes[-1]
    rows = [(module, number) for module in reversed(modules) for number in reversed(range(len(drawn)))]
    for row, (module, number) in enumerate(rows):
        sheet = drawn[number]
        for begin, end in sheet.stretches[module]:
            switches.barh(row, end - begin, left=begin, height=0.7, color=f"C{number}", alpha=0.6)
        first = sheet.stretches[module][0][0] if sheet.stretches[module] else 0
        late = first > 0.7 * longest  # there is no room to the right of its begin
        place = {"x": first - 0.005 * longest, "ha": "right"} if late else {"x": first + 0.005 * longest, "ha": "left"}
        switches.text(y=row, s=plain(sheet.notes[module]), va="center", fontsize=8, **place)
    switches.set_yticks(range(len(rows)), [plain(module) for module, _ in rows])
    switches.set_ylim(-0.6, max(1, len(rows)) - 0.4)
    switches.set_xlim(0, longest)
    switches.set_xticks(ticks)
    switches.set_xlabel(f"step ({'; '.join(dict.fromkeys(plain(sheet.horizon) for sheet in drawn))})")
    figure.savefig(path, dpi=100, pil_kwargs={"compress_level": 1})
