"""``python -m apt_launch.sweep status|watch|wait|resume|cancel|report DIR``: a sweep after its launch, from any terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_launch.config.guard import keep_private
from apt_launch.sweep.command import ending
from apt_launch.sweep.control.ledger import Ledger, Status, phase
from apt_launch.sweep.plan.plan import Plan, short_key

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"done": "green", "failed": "bold red", "cancelled": "yellow", "running": "cyan", "unknown": "magenta"}


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a job failed, 2 the command line or the folder is wrong, 130 interrupted."""
    arguments = parser().parse_args()
    keep_private()
    with ending():
        sys.exit(COMMANDS[arguments.command](arguments))


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m apt_launch.sweep",
        description="Look after a sweep that python -m apt_launch --multirun has sent; from any terminal, any day.",
        epilog="Each command has a --help of its own. Example: python -m apt_launch.sweep status multirun/DATE/TIME",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, told in (
        ("status", "show every job: state, progress, loss, age of its last sign of life"),
        (
            "watch",
            "follow it live: a page with curves and schedules, on this machine alone, and a table in the terminal",
        ),
        ("wait", "wait until all jobs have ended"),
        ("resume", "send again what failed, was cancelled or is missing; overrides such as launch.hours=48 may follow"),
        ("cancel", "stop all jobs, with a checkpoint of each"),
        ("report", "write tables, plots and a page that say which job won"),
    ):
        command = commands.add_parser(name, help=told, description=told.capitalize() + ".", allow_abbrev=False)
        command.add_argument("folder", metavar="DIR", type=Path, help="the sweep's folder, as its launch told it")
        if name == "status":
            command.add_argument("--json", action="store_true", help="for programs: one JSON object a job and line")
        if name == "watch":
            command.add_argument("--port", type=int, help="of the page; a free one unless said otherwise")
            command.add_argument("--terminal", action="store_true", help="no page; ends with the sweep")
        if name == "resume":
            command.add_argument("overrides", nargs="*", help="of keys that cannot change a result")
        if name in ("wait", "resume"):
            command.add_argument(
                "--wait", action="store_true", help=argparse.SUPPRESS if name == "wait" else "wait for them, too"
            )
        if name == "report":
            command.add_argument(
                "--metric", default="val/loss", metavar="NAME", help="what decides, the lowest wins (val/loss)"
            )
            command.add_argument(
                "--against", metavar="WHAT", help="whom others are compared with, seed by seed, such as study=dense"
            )
    return parser


def status(arguments: argparse.Namespace) -> int:
    """Show the jobs."""
    book = Ledger(arguments.folder)
    statuses = book.statuses()
    if arguments.json:
        for one in statuses:
            sys.stdout.write(json.dumps(_as_json(one)) + "\n")
    else:
        show(book.plan, statuses, arguments.folder)
    return 1 if any(one.state == "failed" for one in statuses) else 0


def watch(arguments: argparse.Namespace) -> int:
    """Follow the jobs live."""
    from apt_launch.sweep.watch.watch import watch

    return watch(arguments.folder, port=arguments.port, page=not arguments.terminal)


def wait(arguments: argparse.Namespace) -> int:
    """Wait for the jobs."""
    from apt_launch.sweep.control.send import follow

    return follow(arguments.folder)


def resume(arguments: argparse.Namespace) -> int:
    """Send jobs again."""
    from apt_launch.sweep.control import send as dispatch

    plan = Plan.read(arguments.folder)
    number = dispatch.resume(arguments.folder, arguments.overrides)
    if not number:
        dispatch.say("Nothing to send: every job is done or on its way.")
        return 0
    if arguments.wait or not dispatch.place(plan.launcher, plan.launcher_values).detaches:
        return dispatch.follow(arguments.folder)
    dispatch.say(f"Look at it by: python -m apt_launch.sweep status {arguments.folder}")
    return 0


def cancel(arguments: argparse.Namespace) -> int:
    """Cancel the jobs."""
    from apt_launch.sweep.control import send as dispatch

    statuses = dispatch.cancel(arguments.folder)
    show(Plan.read(arguments.folder), statuses, arguments.folder)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write the report."""
    from apt_launch.sweep.report.report import write_report

    statuses = Ledger(arguments.folder).statuses(rows=False)
    states = {one.job.folder: one.state for one in statuses}
    causes = {one.job.folder: one.cause for one in statuses}
    for path in write_report(arguments.folder, states, arguments.metric, causes, arguments.against):
        sys.stdout.write(f"{path}\n")
    return 0


COMMANDS = {"status": status, "watch": watch, "wait": wait, "resume": resume, "cancel": cancel, "report": report}


def show(plan: Plan, statuses: Sequence[Status], folder: Path) -> None:
    """Print the table of the jobs, and the causes of those that failed."""
    from rich.console import Console

    console = Console()
    console.print(f"sweep {plan.id}: {plan.told}, {plan.launcher}", style="bold", highlight=False)
    console.print(table(plan, statuses, console.width))
    console.print(counted(statuses), highlight=False)
    for one in statuses:
        if one.state in ("failed", "unknown") or (one.state == "cancelled" and one.cause):
            log = one.folder / "log.txt"
            where = f" Log: {log}" if log.exists() else ""
            console.print(
                f"job {one.job.number} ({one.job.label}) {one.state}: {one.cause}{where}",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )
    if any(one.state in ("failed", "cancelled") for one in statuses):
        console.print(
            f"Run them again, from their checkpoints: python -m apt_launch.sweep resume {folder}",
            highlight=False,
            soft_wrap=True,
        )


def table(plan: Plan, statuses: Sequence[Status], width: int, more: Mapping[str, Sequence[str]] | None = None) -> Table:
    """Return the table of the jobs; with ``more`` columns, a cell for each of ``statuses``, every job takes one line.

    Narrow terminals get the columns that matter most, and keys without what they have in common.
    """
    from rich.table import Table
    from rich.text import Text

    columns: dict[str, Sequence[str | Text]] = {
        "job": [str(one.job.number) for one in statuses],
        "what differs": [Text(" ".join(_short(override) for override in one.job.overrides)) for one in statuses],
        "state": [
            Text.assemble(
                (one.state, STYLES.get(one.state, "none")), f" (life {one.restarts + 1})" if one.restarts else ""
            )
            for one in statuses
        ],
        "epoch": [f"{int(one.row['epoch'])}" if one.row else "" for one in statuses],
        "step": [f"{int(one.row['step']) + 1}/{one.job.steps}" if one.row else "" for one in statuses],
        "phase": [phase(one.row) if one.row else "" for one in statuses],
        "train/loss": [_number(one.row, "train/loss", ".4f") for one in statuses],
        "val/loss": [_number(one.row, "val/loss", ".4f") for one in statuses],
        "tokens/s": [_number(one.row, "tokens_per_second", ",.0f") for one in statuses],
        **(more or {}),
        "heard of": [_ago(one.age) if one.age is not None and one.state != "planned" else "" for one in statuses],
    }
    widths = {name: 2 + max(map(len, [name, *cells])) for name, cells in columns.items()}
    label = widths["what differs"]
    if more:
        widths["what differs"] = min(label, 32)
    for name in ("epoch", "train/loss", "tokens/s", *(("heard of", "phase", *more) if more else ())):
        if sum(widths.values()) > width:  # it can be spared, until the rest fits
            del columns[name], widths[name]
    room = width - sum(widths.values()) + widths["what differs"]
    made = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in columns:
        left = name in ("what differs", "state", "phase", *(more or {}))
        if name == "what differs" and more:
            made.add_column(name, overflow="ellipsis", no_wrap=True, max_width=max(4, room - 2))
        else:
            made.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name != "what differs")
    for row in zip(*columns.values(), strict=True):
        made.add_row(*row)
    return made


def counted(statuses: Sequence[Status]) -> str:
    """Say how many jobs are in which state."""
    return ", ".join(f"{number} {state}" for state, number in Counter(one.state for one in statuses).items())


def _short(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{short_key(key)}={value}"


def _number(row: Mapping[str, float], name: str, form: str) -> str:
    return format(row[name], form) if name in row else ""


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _as_json(one: Status) -> dict[str, Any]:
    return {
        "number": one.job.number,
        "folder": str(one.folder),
        "overrides": list(one.job.overrides),
        "state": one.state,
        "cause": one.cause,
        "job_id": one.job_id,
        "restarts": one.restarts,
        "loss": one.loss,
        "age": one.age,
        "phase": phase(one.row) if one.row else None,
        "row": dict(one.row),
    }


if __name__ == "__main__":
    main()
