"""``python -m apt_launch.watch RUN``: a run while it trains, in the terminal: how far it is, its losses, its schedule.

Files are read and nothing is written, so that any number of terminals may look, from other machines, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from apt_launch.commands import command
from apt_launch.config.ending import ending
from apt_launch.escapes import console as new_console
from apt_launch.lease import INTERVAL, read_holder
from apt_launch.record import RecordReader
from apt_launch.rows import as_speed, phase_of
from apt_launch.runs.folder import RunFolder
from apt_launch.secrets import keep_private
from apt_launch.sweep.control.follow import collected_interrupts, say
from apt_launch.sweep.watch.live import METRIC, READ_EVERY_SECONDS, READ_SECONDS, Runner
from apt_launch.sweep.watch.terminal import curves
from apt_launch.tracking.deliver import Summary
from apt_model.errors import ConfigError
from apt_model.files import read_json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BEATS: Final = 3
"""Heartbeats that may be late before a process of another machine counts as gone."""


@dataclass(frozen=True)
class _Summary(Summary):
    planned_steps: int | None = None


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 the run failed or is gone, 2 there is none, 130 interrupted."""
    keep_private()
    with ending():
        sys.exit(watch(parser().parse_args().folder))


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    found = argparse.ArgumentParser(
        prog="python -m apt_launch.watch",
        description="Follow a run in the terminal until it ends: how far it is, its losses, its schedule. Ctrl-C ends the "
        "watching, not the run.",
        epilog="example: python -m apt_launch.watch runs/a",
        allow_abbrev=False,
    )
    found.add_argument("folder", metavar="RUN_DIR", type=Path, help="the run's folder; that of a sweep's job, too")
    return found


@dataclass(frozen=True)
class Moment:
    """A run at one moment."""

    state: str  # of its summary; running: its process is there; gone: it is not, and has not said how it ended
    steps: int | None  # planned; None: a run of an earlier version
    runner: Runner  # its record so far
    behind: bool  # there are more rows, to be read at once

    @property
    def ended(self) -> bool:
        """Whether nothing will change by itself."""
        return self.state != "running" and not self.behind

    @property
    def step(self) -> int:
        """Updates that were recorded."""
        return int(self.runner.last["step"]) + 1 if "step" in self.runner.last else 0

    @property
    def total(self) -> float | None:
        """Tokens of the whole run."""
        return self.runner.last["tokens"] / self.step * self.steps if self.step and self.steps else None


class RunWatch:
    """Reads the run in ``folder``, each row once.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        if (folder / "plan.yaml").exists():
            raise ConfigError(f"{folder} is a sweep. Watch it by: {command('apt_launch.sweep', 'watch', folder)}")
        if not (self.folder.config.exists() or self.folder.metrics.exists()):
            raise ConfigError(f"{folder}: there is no run here: no config.yaml (looked in {Path.cwd()}).")
        self.runner = Runner(RecordReader(self.folder.metrics), 0)
        self._beat = (0, time.monotonic())  # the lease's time of change, and when it was seen first
        self._reading = 0

    def moment(self) -> Moment:
        """Return the run as it is now.

        Raises:
            ConfigError: its summary or its record cannot be read.
        """
        alive = self._alive()  # asked first: who ends writes a summary, then gives the lease back
        try:
            remedy = "Resume the run, which writes it anew."
            summary: _Summary | None = read_json(self.folder.summary, _Summary, remedy=remedy)
        except FileNotFoundError:
            summary = None
        state = "running" if alive else "gone" if summary is None or summary.state == "running" else summary.state
        self._reading += 1
        behind = not self.runner.read(self._reading, time.monotonic() + READ_SECONDS)
        if self.runner.reader.problem is not None:
            raise ConfigError(self.runner.reader.problem)
        return Moment(state, summary.planned_steps if summary else None, self.runner, behind)

    def _alive(self) -> bool:
        path = self.folder.path / "lease.json"
        holder = read_holder(path)
        if holder is None:
            return False
        if holder.alive is not None:
            return holder.alive
        try:
            touched = path.lstat().st_mtime_ns
        except OSError:
            return False
        if touched != self._beat[0]:
            self._beat = (touched, time.monotonic())
        return time.monotonic() - self._beat[1] < BEATS * INTERVAL


def watch(folder: Path) -> int:
    """Show the run in ``folder`` until it ends; return the exit code.

    Raises:
        ConfigError: there is no run.
        KeyboardInterrupt: the user has seen enough.
    """
    live, screen = RunWatch(folder), new_console()
    moment = _in_place(live, screen) if screen.is_terminal else _line_by_line(live)
    said = "; ".join(part for part in (_where(moment), _losses(moment.runner)) if part)
    say(f"{folder}: {moment.state}, {said}")
    if moment.state != "done":
        reason = "Its process is gone, and has not said why. " if moment.state == "gone" else ""
        say(f"{reason}Its log, with what resumes it: {live.folder.log}")
    return 0 if moment.state == "done" else 1


def _in_place(live: RunWatch, screen: Console) -> Moment:
    from rich.live import Live

    with (
        collected_interrupts() as interrupts,
        Live("reading", console=screen, auto_refresh=False, transient=True, vertical_overflow="crop") as shown,
    ):
        for moment in _moments(live, interrupts):
            shown.update(frame(live.folder.path, moment, screen.width, screen.height - 2), refresh=True)
    return moment


def _line_by_line(live: RunWatch) -> Moment:
    before = ""
    with collected_interrupts() as interrupts:
        for moment in _moments(live, interrupts):
            phase = f"{moment.state}, {phase_of(moment.runner.last)}"
            compared = moment.runner.compared
            now = f"{phase}{len(compared)}"
            if now != before and moment.runner.last:
                say(f"{_where(moment)}; {phase}; {_losses(moment.runner)}")
            before = now
    return moment


def _moments(live: RunWatch, interrupts: list[int]) -> Iterator[Moment]:
    while True:
        moment = live.moment()
        yield moment
        if moment.ended:
            return
        until = time.monotonic() + (0.0 if moment.behind else READ_EVERY_SECONDS)
        while not interrupts and time.monotonic() < until:
            time.sleep(0.05)
        if interrupts:
            raise KeyboardInterrupt


def frame(folder: Path, moment: Moment, width: int, height: int) -> RenderableType:
    """Return what a terminal of ``width`` and ``height`` shows: three lines, then a curve a line as there is room."""
    from rich.console import Group
    from rich.text import Text

    runner = moment.runner
    lines = [Text(f"run {folder}: {moment.state}, {phase_of(runner.last)}", style="bold"), Text(_where(moment))]
    lines.append(Text(_losses(runner)))
    speeds = runner.speeds.by_phase()
    if len(speeds) > 1 or any(speed.mfu is not None for speed in speeds.values()):
        lines.append(Text("; ".join(f"{phase} {as_speed(speed)}" for phase, speed in speeds.items())))
    if runner.curves:
        total = moment.total or runner.last.get("tokens") or 1.0
        lines += map(Text, curves(runner, total, max(8, min(72, width - 36))))
    for text in lines:
        text.no_wrap, text.overflow = True, "ellipsis"
    return Group(*lines[: max(3, height)])


def _where(moment: Moment) -> str:
    """Say how far the run is, and how long it will take."""
    row, said = moment.runner.last, []
    if not moment.step:
        return "no update was recorded yet"
    of = f" of {moment.steps:,} ({moment.step / moment.steps:.0%})" if moment.steps else ""
    said.append(f"update {moment.step:,}{of}")
    said.append(f"{row['tokens']:,.0f} tokens")
    if speed := row.get("tokens_per_second"):
        said.append(f"{speed:,.0f} tokens/s")
        if moment.state == "running" and moment.total is not None:
            minutes, seconds = divmod(round((moment.total - row["tokens"]) / speed), 60)
            said.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(said)


def _losses(runner: Runner) -> str:
    said = [f"{name} {runner.last[name]:.4f}" for name in ("train/loss", METRIC) if name in runner.last]
    best = min(runner.compared, key=lambda row: row[METRIC], default=None)
    if best is not None:
        said.append(f"best {best[METRIC]:.4f} at {best['tokens']:,.0f} tokens")
    return ", ".join(said)


if __name__ == "__main__":
    main()
