"""The table of a sweep's jobs, in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apt_launch.commands import command
from apt_launch.escapes import console
from apt_launch.sweep.application import load
from apt_launch.sweep.control.ledger import Status
from apt_launch.sweep.plan.jobs import short_key
from apt_launch.sweep.plan.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

HEADS = {"tokens_per_second": "tokens/s"}
"""Metrics that a table calls otherwise."""

STYLES = {
    "done": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "stopped": "yellow",
    "dropped": "dim",
    "running": "cyan",
    "unknown": "magenta",
}


def show(plan: Plan, statuses: Sequence[Status], folder: Path) -> None:
    """Print the table of the jobs, and the causes of those that failed."""
    screen = console()
    screen.print(f"sweep {plan.id}: {plan.summary}, {plan.launcher}", style="bold", highlight=False)
    screen.print(table(plan, statuses, screen.width))
    screen.print(counted(statuses), highlight=False)
    for one in statuses:
        if one.state in ("failed", "unknown") or (one.state in ("cancelled", "stopped", "planned") and one.cause):
            log = one.folder / "log.txt"
            where = f" Log: {log}" if log.exists() and one.state != "stopped" else ""
            screen.print(
                f"job {one.job.number} ({one.job.label}) {one.state}: {one.cause}{where}",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )
        if one.remark is not None:
            screen.print(f"job {one.job.number}: {one.remark}", highlight=False, soft_wrap=True, markup=False)
    if any(one.state in ("failed", "cancelled") for one in statuses):
        screen.print(
            f"Run them again, from their checkpoints: {command('apt_launch.sweep', 'resume', folder)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def table(plan: Plan, statuses: Sequence[Status], width: int, more: Mapping[str, Sequence[str]] | None = None) -> Table:
    """Return the table of the jobs; with ``more`` columns, a cell for each of ``statuses``, every job takes one line.

    Narrow terminals get the columns that matter most, and keys without what they have in common.
    """
    from rich.table import Table
    from rich.text import Text

    program = load(plan.application, plan.program)
    metrics = program.columns([one.row for one in statuses])
    columns: dict[str, Sequence[str | Text]] = {
        "job": [str(one.job.number) for one in statuses],
        "what differs": [Text(" ".join(_short(override) for override in one.job.overrides)) for one in statuses],
        "state": [
            Text.assemble(
                (one.state, STYLES.get(one.state, "none")), f" (attempt {one.restarts + 1})" if one.restarts else ""
            )
            for one in statuses
        ],
        "epoch": [_number(one.row, "epoch", ".0f") for one in statuses],
        "step": [_steps(one) for one in statuses],
        "phase": [one.phase or "" for one in statuses],
        **{HEADS.get(name, name): [_number(one.row, name, form) for one in statuses] for name, form in metrics},
        **(more or {}),
        "last seen": [_ago(one.age) if one.age is not None and one.state != "planned" else "" for one in statuses],
    }
    for name in ("epoch", "phase"):
        if plan.program is not None and not any(columns[name]):
            del columns[name]
    widths = {name: 2 + max(map(len, [name, *cells])) for name, cells in columns.items()}
    label = widths["what differs"]
    if more:
        widths["what differs"] = min(label, 32)
    for name in ("epoch", "train/loss", "tokens/s", *(("last seen", "phase", *more) if more else ())):
        if name in columns and sum(widths.values()) > width:  # it can be spared, until the rest fits
            del columns[name], widths[name]
    room = width - sum(widths.values()) + widths["what differs"]
    shown = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in columns:
        left = name in ("what differs", "state", "phase", *(more or {}))
        if name == "what differs" and more:
            shown.add_column(name, overflow="ellipsis", no_wrap=True, max_width=max(4, room - 2))
        else:
            shown.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name != "what differs")
    for row in zip(*columns.values(), strict=True):
        shown.add_row(*row)
    return shown


def counted(statuses: Sequence[Status]) -> str:
    """Return how many jobs are in which state, as text."""
    return ", ".join(f"{number} {state}" for state, number in Counter(one.state for one in statuses).items())


def _short(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{short_key(key)}={value}"


def _steps(one: Status) -> str:
    if not one.row:
        return ""
    total = one.job.steps or int(one.row.get("total", 0))
    return f"{int(one.row['step']) + 1}/{total}" if total else str(int(one.row["step"]) + 1)


def _number(row: Mapping[str, float], name: str, form: str) -> str:
    return format(row[name], form) if name in row else ""


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
