"""Losers of a sweep end early, without a server: each job judges its own setting by what the sweep's folder has.

The rule is asynchronous successive halving (ASHA, arXiv:1810.05934) in the form that stops: where a setting comes to a rung, it
is compared at equal tokens with all that have come so far, and goes on if it is among the best. Jobs that differ only in their
seeds are one setting: its value is their mean, and it is judged once all of them are there. A decision is a file that is made
once, so that all jobs of a setting follow the same one.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

from apt_launch.record import read_rows
from apt_launch.rows import rank
from apt_launch.sweep.application import is_job_folder
from apt_launch.sweep.jobs.state import ENDED, read_state
from apt_model.errors import ConfigError
from apt_model.files import STRICT, read_json, refuse_link, write_json

logger = logging.getLogger(__name__)

RULE: Final = "rungs.json"
"""The file in a sweep's folder that says who is judged where."""

DECISIONS: Final = "decisions"
"""The folder beside it, with a file for each setting and rung."""


class Point(NamedTuple):
    """A value of the metric, in the order of the record."""

    updates: int
    """Those that were done by then."""
    tokens: float
    value: float


@dataclass(frozen=True)
class Member:
    """A job of a setting, as far as its record has come."""

    points: Sequence[Point]
    ended: bool = False
    """Whether it will record no more, so that nobody waits for it."""

    def at(self, tokens: float) -> float | None:
        """Return the last value until ``tokens``; None: it has not come there."""
        if not self.points or self.points[-1].tokens < tokens:
            return None
        return next((point.value for point in reversed(self.points) if point.tokens <= tokens), None)


@dataclass(frozen=True)
class Setting:
    """What is judged: jobs that differ only in their seeds."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    jobs: tuple[str, ...]
    """Their folders."""
    rungs: tuple[int, ...]
    """After how many updates of a job, in their order."""
    shared: int = 0
    """The first updates that it shares with another setting."""

    @property
    def key(self) -> str:
        """A short name for files."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Rule:
    """The schema of ``rungs.json``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    metric: str
    direction: str
    axis: str
    keep: str
    settings: tuple[Setting, ...]

    def __post_init__(self) -> None:
        """Refuse a share that keeps none or all, and settings without jobs."""
        if not 0 < self.share < 1 or not all(setting.jobs for setting in self.settings):
            raise ValueError("a rule keeps a share between 0 and 1 of settings that have jobs")
        if not all(is_job_folder(job) for setting in self.settings for job in setting.jobs):
            raise ValueError("a job's folder is named by its number and its identity")

    @property
    def share(self) -> Fraction:
        """Of the settings at a rung, how many go on."""
        return Fraction(self.keep)

    def setting_of(self, job: str) -> Setting | None:
        """Return the setting of the job with that folder."""
        return next((setting for setting in self.settings if job in setting.jobs), None)

    def points(self, rows: Sequence[Mapping[str, float]]) -> list[Point]:
        """Return what rows of a record say of the metric."""
        return [
            Point(int(row["step"]) + 1, row["tokens"] if self.axis == "tokens" else row["step"] + 1, row[self.metric])
            for row in rows
            if self.metric in row and (self.axis != "tokens" or "tokens" in row)
        ]


@dataclass(frozen=True)
class Decision:
    """What was decided of a setting at a rung, and the schema of the file that says so."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    stop: bool
    setting: str
    rung: int
    metric: str
    tokens: float
    value: float
    place: int
    of: int
    kept: int
    overruled: bool = False
    """Whether somebody has resumed a job of it since."""

    def __str__(self) -> str:
        return (
            f"its setting's {self.metric} {self.value:.4f} at update {self.rung} is number {self.place} of {self.of}, of "
            f"which {self.kept} {'goes' if self.kept == 1 else 'go'} on"
        )


def judge(rule: Rule, setting: Setting, rung: int, members: Mapping[str, Member]) -> Decision | None:
    """Return whether ``setting`` goes on at ``rung``; None: not all of its jobs have come there.

    Args:
        members: every job of the sweep by its folder, but for those that were dropped.
    """

    def value_at(tokens: float, of: Setting) -> float | None:
        found = []
        for job in of.jobs:
            member = members.get(job)
            if member is None:
                continue
            value = member.at(tokens)
            if value is not None:
                found.append(value)
            elif not member.ended:
                return None
        return statistics.fmean(found) if found else None

    own = [members[job].points for job in setting.jobs if job in members]
    there = [first for points in own if (first := next((p for p in points if p.updates >= rung), None)) is not None]
    if not there:
        return None
    tokens = max(point.tokens for point in there)
    value = value_at(tokens, setting)
    if value is None:
        return None
    others = [found for other in rule.settings if other != setting and (found := value_at(tokens, other)) is not None]
    place = 1 + sum(rank(other, rule.direction) < rank(value, rule.direction) for other in others)
    kept = math.ceil(rule.share * (1 + len(others)))
    return Decision(
        stop=place > kept,
        setting=setting.name,
        rung=rung,
        metric=rule.metric,
        tokens=tokens,
        value=value,
        place=place,
        of=1 + len(others),
        kept=kept,
    )


class Halving:
    """Judges the setting of one job as its record grows: called with each row, it returns whether the job ends here.

    Args:
        sweep: the folder that all jobs of the sweep can read and write.
        job: the folder of this one in it.
    """

    def __init__(self, sweep: Path, job: str, rule: Rule, setting: Setting) -> None:
        self.sweep, self.job, self.rule, self.setting = sweep, job, rule, setting
        self.stopped: Decision | None = None
        self.last: float | None = None
        """The job's own last value of the metric."""
        self._rungs = list(setting.rungs)

    @classmethod
    def of(cls, folder: Path) -> Halving | None:
        """Return that of the job in ``folder``; None: it is never judged."""
        try:
            rule = read_rule(folder.parent)
        except ConfigError as error:  # a run does not end because nobody can judge it
            logger.warning("%s The job is not judged.", error)
            return None
        setting = rule.setting_of(folder.name) if rule is not None else None
        return cls(folder.parent, folder.name, rule, setting) if rule is not None and setting is not None else None

    def __call__(self, row: Mapping[str, float]) -> bool:
        """Return whether the job ends after ``row``, the newest of its record."""
        self.last = row.get(self.rule.metric, self.last)
        while self._rungs and row["step"] + 1 >= self._rungs[0]:
            try:
                decision = self._decision(self._rungs[0], may_judge=self.rule.metric in row)
            except (ConfigError, OSError) as error:
                logger.warning("%s: the setting is not judged: %s", self.job, error)
                return False
            if decision is None:  # later seeds are not there; the last of them decides
                return False
            self._rungs.pop(0)
            if decision.stop:
                self.stopped = decision
                logger.info("stopped: %s", decision)
                return True
        return False

    def _decision(self, rung: int, *, may_judge: bool) -> Decision | None:
        """Return what was decided at ``rung``, or decide it; None: it cannot be decided yet."""
        path = decision_path(self.sweep, self.setting, rung)
        found = read_decision(path)
        if found is not None or not may_judge:
            return found
        decision = judge(self.rule, self.setting, rung, members_of(self.sweep, self.rule))
        if decision is None:
            return None
        return keep_first(path, decision)


def members_of(sweep: Path, rule: Rule) -> dict[str, Member]:
    """Return the jobs of a sweep as far as they have come, without those that were dropped."""
    found = {}
    for setting in rule.settings:
        for job in setting.jobs:
            state = "unknown"
            with suppress(ConfigError):
                state = read_state(sweep / job).state
            if state == "dropped":
                continue
            points: list[Point] = []
            with suppress(ConfigError, FileNotFoundError):
                points = rule.points(read_rows(sweep / job / "metrics.jsonl"))
            found[job] = Member(points, ended=state in ENDED)
    return found


def read_rule(sweep: Path) -> Rule | None:
    """Return the rule of the sweep in ``sweep``; None: none of its jobs is judged.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return read_json(sweep / RULE, Rule, remedy="sweep resume writes it anew.")
    except FileNotFoundError:
        return None


def decision_path(sweep: Path, setting: Setting, rung: int) -> Path:
    """Return the file with what was decided of ``setting`` at ``rung``."""
    return sweep / DECISIONS / f"{setting.key}-{rung}.json"


def read_decision(path: Path) -> Decision | None:
    """Return what was decided; None: nothing.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return read_json(path, Decision, remedy="Remove it, and it is decided again.")
    except FileNotFoundError:
        return None


def keep_first(path: Path, decision: Decision) -> Decision:
    """Write a decision that nobody has written before; return the one that stands."""
    refuse_link(path.parent)
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    write_json(aside, asdict(decision))
    try:
        os.link(aside, path)  # of several jobs at once the first is obeyed by all
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return read_decision(path) or decision


def overrule(sweep: Path, job: str) -> None:
    """Let the setting of ``job`` go on wherever it was stopped: somebody wants it all the same."""
    rule = read_rule(sweep)
    setting = rule.setting_of(job) if rule is not None else None
    if setting is None:
        return
    for rung in setting.rungs:
        path = decision_path(sweep, setting, rung)
        found = read_decision(path)
        if found is not None and found.stop:
            write_json(path, asdict(found) | {"stop": False, "overruled": True})
