"""``python -m apt_launch.preview [overrides]``: the curriculum before anything runs.

The timeline and the curves come from the very functions that training calls. An override with several values, such as
``schedule.route_temp.end=0.6,0.8``, lays the curricula over each other. Torch is loaded only for ``--sizes``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apt_launch.config.ending import ending
from apt_launch.preview.painter import Painter, Sheet, sheets
from apt_launch.sweep.command import parsed
from apt_launch.sweep.sparkline import blocks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from apt_launch.config.load import RunConfig
    from apt_launch.sweep.plan.jobs import Job
    from apt_launch.sweep.plan.plan import Plan
    from apt_model.schedule import Program

MOST_OVERLAID = 16
"""Above this many jobs curves are no longer told apart: the first ones are drawn, and all are listed."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 config or command line wrong, 130 interrupted."""
    with ending():
        arguments, overrides = parsed(parser())
        painter = Painter()  # first of all: it loads its library while this process loads Hydra
        try:
            _preview(arguments, overrides, painter)
        finally:
            painter.close()


def _preview(arguments: argparse.Namespace, overrides: list[str], painter: Painter) -> None:
    from rich.console import Console

    from apt_launch.config.profile_file import with_profile_file
    from apt_launch.preview.jobs import gather
    from apt_model.files import refuse_place

    plan = gather(with_profile_file(overrides), arguments.config_dir)
    jobs = plan.jobs[:MOST_OVERLAID]
    folder: Path = arguments.out
    refuse_place(folder, "--out")
    tables = _size_tables(jobs, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    programs = {job.label if len(jobs) > 1 else "": config_of(job).program for job in jobs}
    painter.draw(sheets(programs), folder / "preview.png")
    show(plan, Console())
    (folder / "preview.html").write_text(page(programs), encoding="utf-8")
    painter.wait()
    for label, table in tables:
        Console().print(*([f"\n{label}"] if label else []), table)
    Console().print(f"pictures  {folder}/preview.png  {folder}/preview.html", highlight=False, soft_wrap=True)


def _size_tables(jobs: Sequence[Job], arguments: argparse.Namespace) -> list[tuple[str, object]]:
    """Return a table of sizes for each job, where they are asked for.

    Raises:
        ConfigError: a kind or number of GPUs that means nothing.
    """
    if not (arguments.sizes or arguments.gpu is not None or arguments.gpus is not None):
        return []
    from apt_launch.preview.gpus import table
    from apt_launch.preview.sizes import sizes

    num_gpus = 1 if arguments.gpus is None else arguments.gpus
    return [
        (job.label, table(sizes(config_of(job)), config_of(job), gpu=arguments.gpu, num_gpus=num_gpus)) for job in jobs
    ]


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m apt_launch.preview",
        usage="%(prog)s [OPTION ...] [OVERRIDE ...]",
        description="""\
Show a curriculum before it runs: its timeline and its curves, here and as
pictures. Overrides are those of python -m apt_launch; several values of a key
(a=1,2) lay the curricula over each other. Nothing is trained or sent.""",
        epilog="""\
examples:
  python -m apt_launch.preview schedule.route_temp.end=0.6,0.8
  python -m apt_launch.preview schedule.enable_moe_at_epoch=1 trainer.max_epochs=20
  python -m apt_launch.preview --sizes --gpu h100 --gpus 8 model.d_model=1024""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/preview"), metavar="DIR", help="of the pictures (outputs/preview)")
    add("--sizes", action="store_true", help="tell parameters, memory and FLOPs, too (loads torch)")
    add("--gpu", metavar="KIND", help="sizes, with hours and what fits on a kind of GPU: a100, h100, ...")
    add("--gpus", type=int, metavar="N", help="sizes, with what each of N GPUs needs that share the model")
    add("--config-dir", "-cd", type=Path, metavar="DIR", help="a folder of your own groups and options")
    add("--multirun", "-m", action="store_true", help="taken for granted: several values always expand")
    add("--dry-run", action="store_true", help="taken for granted")
    return parser


def show(plan: Plan, console: Console) -> None:
    """Print the plan of a sweep, the timeline of each job, its values as lines of blocks, and what is hardly meant."""
    jobs = plan.jobs[:MOST_OVERLAID]
    if plan.asked > 1:
        console.print(plan.summary, highlight=False)
        console.print(_plan_table(plan))
        if plan.gpu_hours:
            console.print(f"at most {plan.gpu_hours:g} GPU-hours", highlight=False)
        if len(plan.jobs) > len(jobs):
            console.print(f"Timelines and curves of the first {len(jobs)} of {len(plan.jobs)} jobs:", highlight=False)
    for job in jobs:
        program = config_of(job).program
        title = job.label or f"{job.identity[:8]}: {program.horizon}"
        console.print(_timeline_table(program, title, console.width))
        for line in _sparklines(program, width=max(20, min(72, console.width - 36))):
            console.print(line, highlight=False)
        for note in program.notes():
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
    for note in unread_sweeps(jobs):
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def config_of(job: Job) -> RunConfig:
    """Return the config of a job that was planned by this process."""
    config: RunConfig | None = job.config
    assert config is not None
    return config


def _plan_table(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name, justify in (
        ("job", "right"),
        ("identity", "left"),
        ("what differs", "left"),
        ("steps", "right"),
        ("gets", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for job in plan.jobs:
        table.add_row(str(job.number), job.identity[:8], job.label, str(job.steps), str(job.resources))
    return table


def _timeline_table(program: Program, title: str, width: int) -> Table:
    """Values stand in columns where ``width`` has room for them, else below what happens."""
    from rich.table import Table

    from apt_model.schedule.timeline import timeline

    names = list(program.curriculum.all_anneals)
    columns = width >= 52 + 10 * len(names)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), pad_edge=False)
    for column in ("step", "epoch", "samples", "tokens", "run"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what", overflow="fold", min_width=12)
    for name in names if columns else []:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for moment in timeline(program):
        clock = moment.clock
        values = [(name, f"{moment.values[name]:.3g}") for name in names]
        below = [] if columns or not values else [", ".join(f"{name} {value}" for name, value in values)]
        table.add_row(
            str(clock.step),
            str(clock.epoch),
            _short(clock.sample),
            _short(clock.token),
            f"{moment.share:.0%}",
            "\n".join([*moment.what, *below]),
            *(value for _, value in values if columns),
        )
    return table


def _short(number: int) -> str:
    """Return ``number`` in at most five characters."""
    for size, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size * 10 or (number >= size and suffix != "k"):
            return f"{number / size:.3g}{suffix}"
    return str(number)


def _sparklines(program: Program, width: int) -> list[str]:
    """Return a line for each switch and anneal, over the run from left to right."""
    from apt_model.schedule.timeline import series

    steps, states = series(program, points=width * 8)
    columns = [states[max(0, _last_at(steps, column * program.horizon.steps // width))] for column in range(width)]
    lines = []
    latched = {subject.name for subject in program.latches}
    for name in states[0]:
        values = [state[name] for state in columns]
        if isinstance(values[0], bool):
            module = name.rsplit("_", 1)[0]
            drawn = "?" * width if module in latched else "".join("█" if value else "·" for value in values)
            lines.append(f"{name:>20}         {drawn}")
            continue
        numbers = [float(value) for value in values[:-1]] + [float(states[-1][name])]
        lines.append(f"{name:>20} {numbers[0]:>7.4g} {blocks(numbers)} {numbers[-1]:.4g}")
    return lines


def _last_at(steps: list[int], step: int) -> int:
    from bisect import bisect_right

    return bisect_right(steps, step) - 1


def unread_sweeps(jobs: Sequence[Job]) -> list[str]:
    """Name the curriculum's keys that vary between jobs without a model noticing."""
    from apt_launch.sweep.values import changed_keys
    from apt_model.schedule.timeline import effect

    noticed: dict[str, bool] = {}
    for first, job in enumerate(jobs):
        for other in jobs[first + 1 :]:
            changed = changed_keys(config_of(job).result_values, config_of(other).result_values)
            if len(changed) == 1 and changed[0].startswith("schedule."):
                same = effect(config_of(job).program) == effect(config_of(other).program)
                noticed[changed[0]] = noticed.get(changed[0], False) or not same
    return [
        f"{key} is swept, but nothing reads it: all its values give the same run."
        for key, was in noticed.items()
        if not was
    ]


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


def page(programs: Mapping[str, Program]) -> str:
    """Return one HTML page with the curves and timelines of all ``programs``; it needs nothing from outside."""
    from html import escape

    drawn = sheets(programs)
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
    for name in names:
        parts.append(f"<h2>{escape(name)}</h2>{_svg_of_values(drawn, name)}")
    parts.append(f"<h2>Modules</h2>{_svg_of_switches(drawn)}")
    for label, program in programs.items():
        parts.append(f"<h2>Timeline{': ' + escape(label) if label else ''}</h2><p>{escape(str(program.horizon))}</p>")
        parts.append(_html_table(program))
        parts += [f"<p>Note: {escape(note)}</p>" for note in program.notes()]
    return "".join(parts) + "</body></html>\n"


def _html_table(program: Program) -> str:
    from html import escape

    from apt_model.schedule.timeline import timeline

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


def _svg_of_values(drawn: list[Sheet], name: str) -> str:
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
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(lines)}</svg>'


def _svg_of_switches(drawn: list[Sheet]) -> str:
    scale = (WIDTH - LEFT - 10) / max(sheet.num_steps for sheet in drawn)
    bars, y = [], 4
    for module in drawn[0].stretches:
        bars.append(f'<text x="{LEFT - 6}" y="{y + 11}" text-anchor="end">{module}</text>')
        for number, sheet in enumerate(drawn):
            bars += [
                f'<rect x="{LEFT + begin * scale:.1f}" y="{y}" width="{(end - begin) * scale:.1f}" height="13" '
                f'fill="{COLORS[number % len(COLORS)]}" fill-opacity=".45"/>'
                for begin, end in sheet.stretches[module]
            ]
            first = sheet.stretches[module][0][0] if sheet.stretches[module] else 0
            bars.append(f'<text x="{LEFT + 4 + first * scale:.1f}" y="{y + 11}">{sheet.notes[module]}</text>')
            y += 16
        y += 5
    return f'<svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="modules">{"".join(bars)}</svg>'


if __name__ == "__main__":
    main()
