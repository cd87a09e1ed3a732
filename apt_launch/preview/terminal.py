"""A preview in the terminal: the plan, timelines, values as lines of blocks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from apt_launch.config.run_config import RunConfig
from apt_launch.sparkline import blocks
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.plan.tree import outline
from apt_launch.values import changed_keys
from apt_model.schedule import Program
from apt_model.schedule.timeline import effect, series, timeline

MOST_OVERLAID = 16
"""Above this many jobs curves cannot be distinguished: the first ones are drawn, and all are listed."""


def show(plan: Plan, console: Console) -> None:
    """Print the plan of a sweep, the timeline of each job, its values as lines of blocks, and what may be a mistake."""
    jobs = plan.jobs[:MOST_OVERLAID]
    if plan.asked > 1:
        console.print(plan.summary, highlight=False)
        console.print(_plan_table(plan))
        for line in outline(plan):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if plan.gpu_hours:
            console.print(f"at most {plan.gpu_hours:g} GPU-hours", highlight=False)
        if len(plan.jobs) > len(jobs):
            console.print(f"Timelines and curves of the first {len(jobs)} of {len(plan.jobs)} jobs:", highlight=False)
    for job in jobs:
        program = config_of(job).program
        title = job.label or f"{job.identity[:8]}: {program.horizon}"
        console.print(_timeline_table(program, title, console.width))
        width = max(20, min(72, console.width - 36))
        for line in [*_sparklines(program, width), *(_rate(config_of(job), width) if moves(job) else [])]:
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
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name, justify in (
        ("job", "right"),
        ("identity", "left"),
        ("what differs", "left"),
        ("steps", "right"),
        ("resources", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for job in plan.jobs:
        table.add_row(str(job.number), job.identity[:8], job.label, str(job.steps), str(job.resources))
    return table


def _timeline_table(program: Program, title: str, width: int) -> Table:
    """Values stand in columns where ``width`` has room for them, else below what happens."""
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


def moves(job: Job) -> bool:
    """Return whether the learning rate of a job has a schedule of its own."""
    return config_of(job).trainer.lr_schedule is not None


def _rate(config: RunConfig, width: int) -> list[str]:
    """Return a line for the learning rate."""
    horizon, last = config.horizon, config.horizon.steps - 1
    steps = [column * horizon.steps // width for column in range(width - 1)] + [last]
    values = [config.course.lr(horizon.clock_at(step)) for step in steps]
    return [f"{'lr':>20} {values[0]:>7.4g} {blocks(values)} {values[-1]:.3g}"]


def _last_at(steps: list[int], step: int) -> int:
    return bisect_right(steps, step) - 1


def unread_sweeps(jobs: Sequence[Job]) -> list[str]:
    """Name the curriculum's keys that vary between jobs without a model noticing."""
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
