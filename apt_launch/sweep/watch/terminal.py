"""A sweep while it runs, in the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from apt_launch.sparkline import blocks
from apt_launch.sweep.control.follow import collected_interrupts
from apt_launch.sweep.control.table import counted, show, table
from apt_launch.sweep.report.findings import headline
from apt_launch.sweep.watch.live import READ_EVERY_SECONDS, Picture, Runner, Watch

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SPARK: Final = 16
"""Blocks of a job's loss in the table."""


def show_live(live: Watch, console: Console, *, until_ended: bool) -> int:
    """Keep the table up to date until Ctrl-C, or the sweep's end; then leave it as ``status`` shows it."""
    from rich.live import Live

    with collected_interrupts() as interrupts:
        if not console.is_terminal:
            while not interrupts:
                time.sleep(0.1)
            raise KeyboardInterrupt
        reading = "reading what the jobs have recorded so far"
        with Live(reading, console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as screen:
            while not interrupts:
                picture = live.picture()
                screen.update(frame(picture, console.width, console.height - 4, live.problem), refresh=True)
                if picture.ended and until_ended:
                    break
                until = time.monotonic() + (0.0 if picture.behind else READ_EVERY_SECONDS)
                while not interrupts and time.monotonic() < until:
                    time.sleep(0.05)
    show(picture.plan, picture.statuses, live.folder)
    if interrupts:
        raise KeyboardInterrupt
    return 0 if all(status.state in ("done", "stopped", "dropped") for status in picture.statuses) else 1


def frame(picture: Picture, width: int, height: int, problem: str | None = None) -> RenderableType:
    """Return what a terminal shows: the jobs that matter most, the best one, why some failed, and the curves of one."""
    from rich.console import Group
    from rich.text import Text

    plan, best = picture.plan, picture.findings.best
    failed = [status for status in picture.statuses if status.state in ("failed", "unknown") and status.cause]
    below = [Text(headline(picture.findings), style="bold")]
    below += [Text(f"job {status.job.number} {status.state}: {status.cause}", style="red") for status in failed[:3]]
    remarks = [status for status in picture.statuses if status.remark]
    below += [Text(f"job {status.job.number}: {status.remark}", style="magenta") for status in remarks[:1]]
    if problem is not None:
        below.append(Text(f"States could not be asked for, these are older: {problem}", style="magenta"))
    room = max(3, height - 3 - len(below))
    order = sorted(zip(picture.statuses, picture.runners, strict=True), key=lambda pair: _rank(pair[0].state))
    kept = order if len(order) <= room else order[: room - 1]
    left = [status for status, _ in order[len(kept) :]]
    kept = sorted(kept, key=lambda pair: pair[0].job.number)
    jobs = table(plan, [s for s, _ in kept], width, {"loss so far": [_spark(runner) for _, runner in kept]})
    above = [
        Text(f"sweep {plan.id}: {plan.summary}, {plan.launcher}", style="bold"),
        Text(counted(picture.statuses) + (". It has ended." if picture.ended else "")),
    ]
    if left:
        below.insert(0, Text(f"and {counted(left)}", style="dim"))
    first = [runner for status, runner in order if status.state == "running" and runner.curves]
    first += [runner for status, runner in order if best is not None and status.job == best.job]
    drawn = curves(first[0], first[0].facts.get("total") or 1.0, min(72, width - 36)) if first else []
    if drawn and len(above) + 1 + len(kept) + len(below) + 1 + len(drawn) <= height:
        below += [Text(f"job {first[0].facts['number']}, over its tokens:", style="bold"), *map(Text, drawn)]
    for text in (*above, *below):
        text.no_wrap, text.overflow = True, "ellipsis"
    return Group(*above, jobs, *below)


RANKS: Final = ("running", "failed", "unknown", "preempted", "requeued", "done")
"""Jobs in these states are kept first where there is no room for all."""


def _rank(state: str) -> int:
    return RANKS.index(state) if state in RANKS else len(RANKS)


def _spark(runner: Runner) -> str:
    """Draw the job's training loss, as far as it is, over the whole of its run."""
    curve, total = runner.curves.get("train/loss"), runner.facts.get("total")
    if curve is None or not total:
        return ""
    return blocks(_columns(curve.points, SPARK, total)).ljust(SPARK, "·")


def _columns(points: Sequence[tuple[float, float]], width: int, total: float) -> list[float]:
    """Return the value at the end of each of ``width`` equal parts of ``total`` tokens that has begun."""
    values = []
    for column in range(width):
        until = [value for tokens, value in points if tokens <= total * (column + 1) / width]
        if until:
            values.append(until[-1])
        if points[-1][0] <= total * (column + 1) / width:
            break
    return values or [points[-1][1]]


def curves(runner: Runner, total: float, width: int) -> list[str]:
    """Return a line for each curve of a job of ``total`` tokens, and each part that is enabled, as a preview draws them."""
    lines = []
    for name in sorted(runner.curves, key=lambda name: (name.startswith("schedule/"), name)):
        curve = runner.curves[name]
        numbers = _columns(curve.points, width, total)
        first, last = curve.points[0][1], curve.points[-1][1]
        lines.append(f"{name.removeprefix('schedule/'):>20} {first:>7.4g} {blocks(numbers)} {last:.4g}")
    reached = runner.last.get("tokens", 0.0)
    for part, tokens in runner.switches.items():
        ends = [total * (column + 1) / width for column in range(width)]
        drawn = "".join("█" if tokens <= end else "·" for end in ends if end - total / width < reached)
        lines.append(f"{part + ' enabled':>20}         {drawn}")
    return lines
