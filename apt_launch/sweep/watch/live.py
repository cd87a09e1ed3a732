"""The present state of a sweep, for any number of viewers: records are read once, and viewers get differences."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from apt_launch.commands import command
from apt_launch.record import RecordReader, Row
from apt_launch.rows import Speeds, enabled, is_number, is_scheduled_value
from apt_launch.sweep.control.ledger import Ledger, Status, damaged_rows
from apt_launch.sweep.jobs.state import WAITING
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.report.findings import COUNTED, Findings, Trial, along, compare, headline

METRIC: Final = "val/loss"
LOSSES: Final = (METRIC, "train/loss")

MOST_POINTS: Final = 512
"""Points of a curve; of more rows every second one is left out, then every second of those, and so on."""

READ_EVERY_SECONDS: Final = 1.0
"""Records are read at most this often, for any number of viewers."""

READ_SECONDS: Final = 0.5
"""One reading takes at most so long; the next continues there."""

ASK_SECONDS: Final = {"local": 2.0, "slurm": 15.0}
"""States are polled at most this often, by launcher: a cluster's accounting is shared by many."""


class Curve:
    """A metric over tokens, in at most :data:`MOST_POINTS` of its recorded values; the newest one is always there."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._readings: list[int] = []  # when each point came
        self._count = 0
        self._stride = 1

    def add(self, reading: int, tokens: float, value: float) -> None:
        """Add a point that was found by the reading with that number."""
        if self._count and (self._count - 1) % self._stride:  # the newest until now has no place of its own
            self.points.pop()
            self._readings.pop()
        self.points.append((tokens, value))
        self._readings.append(reading)
        self._count += 1
        if len(self.points) > MOST_POINTS:
            self._stride *= 2
            self.points = self.points[::2]
            self._readings = [reading] * len(self.points)

    def since(self, reading: int) -> tuple[int, list[tuple[float, float]]]:
        """Return what came after that reading: where it begins among the points, and the points from there."""
        first = bisect_right(self._readings, reading)
        return first, self.points[first:]


@cache
def _is_drawn(name: str) -> bool:
    return name in LOSSES or is_scheduled_value(name)


@dataclass
class Runner:
    """A job, as far as its record has been read."""

    reader: RecordReader
    began: int  # the first reading of its record
    metric: str = METRIC  # what decides; its curve has the name METRIC for viewers
    axis: str = "tokens"
    second: str | None = "train/loss"  # the metric whose curve has that name; None: the first other that comes
    changed: int = 0  # the last reading that found something new
    last: Row = field(default_factory=dict)  # the newest values, laid over each other
    compared: list[Row] = field(default_factory=list)  # of each row with the metric, what is compared
    curves: dict[str, Curve] = field(default_factory=dict)
    switches: dict[str, float] = field(default_factory=dict)  # where each part was enabled, in tokens
    speeds: Speeds = field(default_factory=Speeds)  # by phase
    facts: dict[str, Any] = field(default_factory=dict)  # what viewers have of it, beside curves

    def read(self, reading: int, until: float) -> bool:
        """Read what is new; return whether that is all of it. Stop at ``until``, seconds of the monotonic clock."""
        restarts = self.reader.restarts
        for row in self.reader.rows():
            if self.reader.restarts != restarts:
                restarts = self.reader.restarts
                self._forget(reading)
            self._take(reading, row)
            if time.monotonic() > until:
                return False
        if self.reader.restarts != restarts:  # nothing is left
            self._forget(reading)
        return True

    def _forget(self, reading: int) -> None:
        self.began = self.changed = reading
        self.last, self.compared, self.curves, self.switches, self.speeds = {}, [], {}, {}, Speeds()

    def _take(self, reading: int, row: Row) -> None:
        if self.axis != "tokens":
            row = self._renamed(row)
        tokens = row.get("tokens")
        if not is_number(tokens):
            return
        self.changed = reading
        self.last |= row
        self.speeds.add(row)
        if METRIC in row:
            self.compared.append({"tokens": row["tokens"], self.metric: row[METRIC]})
        for name, value in row.items():
            if _is_drawn(name) and is_number(value):
                self.curves.setdefault(name, Curve()).add(reading, row["tokens"], value)
        for part in enabled(row):
            self.switches.setdefault(part, row["tokens"])

    def _renamed(self, row: Row) -> Row:
        """Return a row of a program of its own with the names that viewers know."""
        (row,) = along(self.axis, [row])
        if self.second is None:
            self.second = next((name for name in row if name not in (*COUNTED, self.metric)), None)
        kept = {name: value for name, value in row.items() if name not in LOSSES or name in (self.metric, self.second)}
        for name, known in ((self.metric, METRIC), (self.second, "train/loss")):
            if name is not None and name in row:
                kept[known] = row[name]
        return kept


@dataclass(frozen=True)
class _Answer:
    """The states of the jobs, as of one moment."""

    ledger: Ledger
    written: int  # when its plan was
    statuses: Sequence[Status]
    at: float  # seconds since 1970
    good_until: float  # seconds of the monotonic clock

    @classmethod
    def ask(cls, folder: Path, before: _Answer | None) -> _Answer:
        """Poll the states of the jobs that the plan has by now.

        Raises:
            ConfigError: there is no sweep.
        """
        began = time.monotonic()
        written = _plan_written(folder)
        ledger = before.ledger if before is not None and before.written == written else Ledger(folder)
        statuses = ledger.statuses(rows=False)
        now = time.monotonic()
        pause = max(ASK_SECONDS[ledger.plan.launcher], 20 * (now - began))
        return cls(ledger, written, statuses, time.time(), now + pause)

    def last_seen(self, status: Status) -> float | None:
        """Return when a job was last seen."""
        return None if status.age is None else self.at - status.age


@dataclass(frozen=True)
class Picture:
    """A sweep at one moment."""

    plan: Plan
    statuses: Sequence[Status]
    findings: Findings
    runners: Sequence[Runner]  # one for each of statuses
    behind: bool  # there are more rows, to be read by the next reading

    @property
    def ended(self) -> bool:
        """Whether nothing will change by itself."""
        return not self.behind and all(status.final or status.state == "planned" for status in self.statuses)


class Watch:
    """Follows the sweep in ``folder`` for any number of viewers, who share one reading. Without viewers nothing is read.

    Raises:
        ConfigError: there is no sweep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reading = 0  # the number of the newest reading
        self.began = 1  # the reading that found this sweep here for the first time
        self.problem: str | None = None  # why states could not be asked for
        self._lock = threading.Lock()
        self._runners: dict[str, Runner] = {}
        self._thread = threading.Thread()
        self._read_at = 0.0
        self._answer = _Answer.ask(folder, None)
        self._picture: Picture | None = None

    def picture(self) -> Picture:
        """Return the sweep as it is, read anew where the last reading is no longer fresh."""
        with self._lock:
            return self._fresh()

    def news(self, since: int) -> dict[str, Any]:
        """Return what a page that knows everything up to reading ``since`` has to learn, ready for JSON."""
        with self._lock:
            picture = self._fresh()
            whole = not self.began <= since <= self.reading
            since = -1 if whole else since
            jobs = [
                runner.facts | {"anew": runner.began > since, "curves": _curves(runner, since)}
                for runner in picture.runners
                if runner.changed > since
            ]
            best = picture.findings.best
            return {
                "reading": self.reading,
                "whole": whole,
                "now": time.time(),
                "problem": self.problem,
                "id": picture.plan.id,
                "about": f"{picture.plan.summary}, {picture.plan.launcher}",
                "folder": str(self.folder.absolute()),
                "headline": headline(picture.findings),
                "summary": picture.findings.summary,
                "best": best.job.number if best else None,
                "behind": picture.behind,
                "ended": picture.ended,
                "advice": self._advice(picture),
                "jobs": jobs,
                "unit": picture.findings.unit,
                "names": _names(picture),
            }

    def _advice(self, picture: Picture) -> str | None:
        """Return the command that comes next, once the sweep has ended."""
        if not picture.ended:
            return None
        verb = (
            "report" if all(status.state in ("done", "stopped", "dropped") for status in picture.statuses) else "resume"
        )
        return command("apt_launch.sweep", verb, self.folder)

    def _fresh(self) -> Picture:
        if self._picture is None or self._picture.behind or time.monotonic() - self._read_at >= READ_EVERY_SECONDS:
            if time.monotonic() >= self._answer.good_until and not self._thread.is_alive():
                self._thread = threading.Thread(target=self._ask, name="ask", daemon=True)
                self._thread.start()  # a cluster may take its time
            self._picture = self._read()
        return self._picture

    def _ask(self) -> None:
        try:
            self._answer = _Answer.ask(self.folder, self._answer)
            self.problem = None
        except Exception as error:  # viewers see it, beside what was known
            self.problem = str(error) or type(error).__name__
            pause = ASK_SECONDS[self._answer.ledger.plan.launcher]
            self._answer = replace(self._answer, good_until=time.monotonic() + pause)

    def _read(self) -> Picture:
        self._read_at = time.monotonic()
        self.reading += 1
        answer = self._answer
        plan, states, application = answer.ledger.plan, answer.statuses, answer.ledger.application
        if self._picture is not None and plan.id != self._picture.plan.id:
            self._runners, self.began = {}, self.reading
        behind = False
        for status in states:
            name = status.job.folder
            if name not in self._runners:
                reader = RecordReader(status.folder / "metrics.jsonl")
                second = "train/loss" if application.axis == "tokens" else None
                self._runners[name] = Runner(reader, self.reading, application.metric, application.axis, second)
            behind = behind or not self._runners[name].read(self.reading, self._read_at + READ_SECONDS)
        runners = [self._runners[status.job.folder] for status in states]
        trials = [Trial(s.job, s.state, r.compared, s.cause) for s, r in zip(states, runners, strict=True)]
        findings = compare(
            plan,
            trials,
            application.metric,
            application.program,
            direction=application.direction,
            axis=application.axis,
        )
        styles = _styles(trials)
        statuses: list[Status] = []
        for status, runner, trial in zip(states, runners, trials, strict=True):
            phase = application.phase(runner.last) if runner.last else None
            if (problem := runner.reader.problem) is not None:
                status = replace(status, state="unknown", cause=problem, damaged=True)
            reader = runner.reader
            remark = damaged_rows(reader.path, len(reader.damaged), reader.lines)
            statuses.append(
                replace(status, row=runner.last, phase=phase, damaged_rows=len(reader.damaged), remark=remark)
            )
            seen = [time for time in (answer.last_seen(status), runner.reader.touched) if time is not None]
            facts = _facts(statuses[-1], runner, trial) | {
                "colour": styles[trial.job.number],
                "last_seen": round(max(seen)) if seen and status.state not in WAITING else None,
                "compared": findings.values.get(trial.job.number),
            }
            if facts != runner.facts:
                runner.facts, runner.changed = facts, self.reading
        return Picture(plan, statuses, findings, runners, behind)


def _names(picture: Picture) -> dict[str, str]:
    """Return what the curves that viewers know are called in this sweep."""
    seconds = [runner.second for runner in picture.runners if runner.second is not None]
    return {METRIC: picture.findings.metric, "train/loss": seconds[0] if seconds else "train/loss"}


def _plan_written(folder: Path) -> int:
    try:
        return (folder / "plan.yaml").stat().st_mtime_ns
    except OSError:
        return 0


def _curves(runner: Runner, since: int) -> dict[str, Any]:
    found = {}
    for name, curve in runner.curves.items():
        first, points = curve.since(since)
        if points:
            found[name] = {"first": first, "points": points}
    return found


def _styles(trials: Sequence[Trial]) -> dict[int, tuple[int, int]]:
    """Return by each job's number which colour and which kind of line it has: seeds of one experiment share the colour."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial.without_seeds.items()), []).append(trial.job.number)
    if len(groups) == 1:
        return {trial.job.number: (place, 0) for place, trial in enumerate(trials)}
    return {number: (colour, kind) for colour, group in enumerate(groups.values()) for kind, number in enumerate(group)}


def _facts(status: Status, runner: Runner, trial: Trial) -> dict[str, Any]:
    """Return what viewers are sent of a job, beside its curves; a number that JSON has not as text."""
    job, row = status.job, runner.last
    step, tokens, speed = row.get("step"), row.get("tokens", 0), row.get("tokens_per_second")
    steps = job.steps or int(row.get("total", 0))
    total = tokens / (step + 1) * steps if step is not None else None
    left = (total - tokens) / speed if total is not None and speed and status.state == "running" else None
    facts: dict[str, Any] = {
        "number": job.number,
        "label": trial.label,
        "asked": job.label,
        "state": status.state,
        "attempt": status.restarts + 1,
        "cause": status.cause or status.remark,
        "steps": steps,
        "step": step + 1 if step is not None else 0,
        "phase": status.phase,
        "total": total,
        "train/loss": row.get("train/loss"),
        "val/loss": row.get(METRIC),
        "speed": speed,
        "left": left,
        "switches": dict(runner.switches),
    }
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in facts.items()
    }
