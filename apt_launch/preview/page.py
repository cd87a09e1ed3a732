"""A preview as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from apt_launch.config.schedule_plot import Rates, Sheet, sheets
from apt_launch.escapes import visible
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.plan.tree import is_shared, saving, tree
from apt_model.schedule import Program
from apt_model.schedule.timeline import timeline

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
td.what { text-align: left; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""


def page(programs: Mapping[str, Program], plan: Plan | None = None, rates: Rates | None = None) -> str:
    """Return one HTML page with the curves and timelines of all ``programs``; it needs nothing from outside.

    Args:
        plan: of a sweep, whose tree is drawn if its jobs share first updates.
        rates: see :func:`sheets`.
    """
    drawn = sheets(programs, rates)
    names = dict.fromkeys(name for sheet in drawn for name in sheet.values)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Curriculum preview</title><style>{STYLE}</style></head><body><h1>Curriculum preview</h1>"
    ]
    if len(programs) > 1:
        keys = (
            f'<span class=key style="background:{COLORS[i % len(COLORS)]}"></span>{escape(label)}'
            for i, label in enumerate(programs)
        )
        parts.append(f"<p>{'<br>'.join(keys)}</p>")
    if plan is not None and is_shared(plan):
        parts.append(f"<h2>Updates trained once</h2><p>{escape(saving(plan))}</p>{_svg_of_tree(plan)}")
    for name in names:
        parts.append(f"<h2>{escape(name)}</h2>{_svg_of_values(drawn, name)}")
    parts.append(f"<h2>Modules</h2>{_svg_of_switches(drawn)}")
    for label, program in programs.items():
        parts.append(f"<h2>Timeline{': ' + escape(label) if label else ''}</h2><p>{escape(str(program.horizon))}</p>")
        parts.append(_html_table(program))
        parts += [f"<p>Note: {escape(note)}</p>" for note in program.notes()]
    return visible("".join(parts)) + "</body></html>\n"


def _html_table(program: Program) -> str:
    names = list(program.curriculum.all_anneals)
    heads = ["step", "epoch", "samples", "tokens", "run", "what", *names]
    rows = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for moment in timeline(program):
        clock = moment.clock
        numbers = (f"{clock.step:,}", str(clock.epoch), f"{clock.sample:,}", f"{clock.token:,}", f"{moment.share:.0%}")
        cells = [f"<td>{number}</td>" for number in numbers]
        cells.append(f"<td class=what>{'<br>'.join(escape(what) for what in moment.what)}</td>")
        cells += [f"<td>{moment.values[name]:.4g}</td>" for name in names]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"


WIDTH, HEIGHT, LEFT = 900, 130, 60


def _svg_of_tree(plan: Plan) -> str:
    """Draw each job as a line from the first update that it trains itself, hanging on the job that it begins with."""
    longest = max(job.steps for job in plan.jobs) or 1
    ordered = list(tree(plan))
    rows = {job.folder: 14 + 18 * number for number, job in enumerate(ordered)}

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - 10) * step / longest

    parts = []
    for number, job in enumerate(ordered):
        color, y = COLORS[number % len(COLORS)], rows[job.folder]
        inside = job.fork is not None and job.fork.job in rows
        if job.fork is not None:
            top = rows[job.fork.job] if inside else y - 9
            parts.append(
                f'<path d="M{x(job.begins):.1f} {top}V{y}" stroke="{color}" fill="none" stroke-dasharray="2 2"/>'
            )
        label = f"{job.number}: updates {job.begins:,} to {job.steps:,}  {job.label}"
        parts.append(
            f'<rect x="{x(job.begins):.1f}" y="{y - 4}" width="{max(1.0, x(job.steps) - x(job.begins)):.1f}" height="8" '
            f'fill="{color}"><title>{escape(label)}</title></rect><text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">'
            f"{job.number}</text>"
        )
    parts += [
        f'<text x="{x(step):.1f}" y="{32 + 18 * len(ordered)}" text-anchor="middle">{step:,}</text>'
        for step in sorted({0, longest, *(job.begins for job in ordered)})
    ]
    return f'<svg viewBox="0 0 {WIDTH} {40 + 18 * len(ordered)}" role="img">{"".join(parts)}</svg>'


def _svg_of_values(drawn: Sequence[Sheet], name: str) -> str:
    longest = max(sheet.num_steps for sheet in drawn)
    shown = [(number, sheet) for number, sheet in enumerate(drawn) if name in sheet.values]
    everything = [value for _, sheet in shown for value in sheet.values[name]]
    low, high = min(everything), max(everything)
    room = (high - low) or 1.0

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - 10) * step / longest

    def y(value: float) -> float:
        return 12 + (HEIGHT - 34) * (1 - (value - low) / room)

    lines = [
        f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#8884"/>'
        for value in ((low, high) if high > low else (low,))
    ]
    lines += [
        f'<text x="{x(step):.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">step {step:,}</text>'
        for step, anchor in ((0, "start"), (longest, "end"))
    ]
    for number, sheet in shown:
        values = sheet.values[name]
        ends = [*sheet.steps[1:], sheet.num_steps]
        path = f"M{x(0):.1f} {y(values[0]):.1f}" + "".join(
            f"H{x(end):.1f}V{y(after):.1f}" for end, after in zip(ends, [*values[1:], values[-1]], strict=True)
        )
        lines.append(f'<path d="{path}" fill="none" stroke="{COLORS[number % len(COLORS)]}" stroke-width="1.6"/>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{"".join(lines)}</svg>'


def _svg_of_switches(drawn: Sequence[Sheet]) -> str:
    scale = (WIDTH - LEFT - 10) / max(sheet.num_steps for sheet in drawn)
    bars, y = [], 4
    for module in drawn[0].stretches:
        bars.append(f'<text x="{LEFT - 6}" y="{y + 11}" text-anchor="end">{escape(module)}</text>')
        for number, sheet in enumerate(drawn):
            bars += [
                f'<rect x="{LEFT + begin * scale:.1f}" y="{y}" width="{(end - begin) * scale:.1f}" height="13" '
                f'fill="{COLORS[number % len(COLORS)]}" fill-opacity=".45"/>'
                for begin, end in sheet.stretches[module]
            ]
            first = sheet.stretches[module][0][0] if sheet.stretches[module] else 0
            bars.append(f'<text x="{LEFT + 4 + first * scale:.1f}" y="{y + 11}">{escape(sheet.notes[module])}</text>')
            y += 16
        y += 5
    return f'<svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="modules">{"".join(bars)}</svg>'
