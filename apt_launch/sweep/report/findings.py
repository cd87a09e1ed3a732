"""What a sweep has found: its jobs compared, over seeds and group by group, from what they have recorded so far."""

from __future__ import annotations

import math
import shlex
import statistics
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from apt_launch.record import Row, read_rows
from apt_launch.rows import first_enabled, is_number, is_scheduled_value
from apt_launch.sweep.application import load
from apt_launch.sweep.plan.jobs import Job, in_short
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError, nearest

COUNTED = ("step", "epoch", "samples", "tokens", "time", "total")
"""Names in rows that count, and are compared by nobody unless a command says so."""

SEEDS = ("seed", "data.seed")
"""Keys whose values are repetitions of one experiment."""


@dataclass(frozen=True)
class Trial:
    """A job and its record."""

    job: Job
    state: str
    rows: Sequence[Row] = field(repr=False)
    cause: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """The overrides by which it differs: key to value, as the user wrote them."""
        return {
            key.lstrip("+"): value for key, _, value in (override.partition("=") for override in self.job.overrides)
        }

    @property
    def without_seeds(self) -> dict[str, str]:
        """Its settings but for the seeds."""
        return {key: value for key, value in self.settings.items() if key not in SEEDS}

    @property
    def label(self) -> str:
        """Its settings in short."""
        return in_short(self.settings) or f"job {self.job.number}"

    def series(self, name: str) -> list[tuple[float, float]]:
        """Return (tokens, value) of a metric, wherever it is a finite number."""
        return [(row["tokens"], row[name]) for row in self.rows if "tokens" in row and is_number(row.get(name))]

    def at(self, name: str, tokens: float) -> float | None:
        """Return the metric's last value until ``tokens``."""
        values = [value for seen, value in self.series(name) if seen <= tokens]
        return values[-1] if values else None

    @property
    def switches(self) -> dict[str, float]:
        """Where each part of the program was enabled, in tokens."""
        return {part: row["tokens"] for part, row in first_enabled(self.rows).items() if "tokens" in row}

    @property
    def scheduled_values(self) -> list[str]:
        """The metrics that are scheduled values."""
        return sorted({name for row in self.rows for name in row if is_scheduled_value(name)})


@dataclass(frozen=True)
class Estimate:
    """A mean, and half of its 95 % interval (Student's); None: one value has no spread."""

    mean: float
    half_interval: float | None

    @classmethod
    def of(cls, values: Collection[float]) -> Estimate:
        """Return that of one value or more."""
        count = len(values)
        mean = sum(values) / count
        if count < 2:
            return cls(mean, None)
        variance = sum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, t_95(count - 1) * math.sqrt(variance / count))


def t_95(degrees_of_freedom: int) -> float:
    """Return Student's t for a two-sided interval of 95 %."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, 0.975))


@dataclass(frozen=True)
class Group:
    """Trials that differ in their seeds only."""

    settings: Mapping[str, str]
    by_seed: Mapping[tuple[str, ...], float]  # the metric

    @property
    def label(self) -> str:
        """Its settings in short."""
        return in_short(self.settings) or "all"

    @property
    def estimate(self) -> Estimate:
        """The metric."""
        return Estimate.of(self.by_seed.values())

    def over(self, other: Group) -> Estimate | None:
        """Return how much more it is than ``other``, seed by seed: what a seed does to both is left out."""
        both = [value - other.by_seed[seed] for seed, value in self.by_seed.items() if seed in other.by_seed]
        return Estimate.of(both) if both else None


@dataclass(frozen=True)
class Lead:
    """How far the best setting is ahead of the next, seed by seed, and whether that can be told from chance.

    The interval is Student's, of 95 % for all comparisons with the best together (Bonferroni): the best of many settings is
    ahead by chance more often than the better of two.
    """

    metric: str
    best: Group
    second: Group
    settings: int
    ahead: tuple[float, ...]  # of each seed that both have; above 0: the best one is better

    def half_interval(self, seeds: int) -> float:
        """Return half of the interval that the spread of these differences would have with ``seeds`` of them; two or more."""
        from scipy.special import stdtrit

        t = float(stdtrit(seeds - 1, 1 - 0.025 / (self.settings - 1)))
        return t * statistics.stdev(self.ahead) / math.sqrt(seeds)

    def more_seeds(self) -> int | None:
        """Return how many more seeds would show a lead of this size; None: more than 10,000."""
        lead, have = statistics.fmean(self.ahead), len(self.ahead)
        more = range(have + 1, 10_001)  # with more seeds the interval only becomes narrower
        found = bisect_left(more, True, key=lambda seeds: self.half_interval(seeds) < lead)
        return more[found] - have if found < len(more) else None

    def __str__(self) -> str:
        seeds = len(self.ahead)
        mean = self.best.estimate.mean
        found = f"{self.best.label}, {self.metric} {mean:.4f} on average over {_seeds(len(self.best.by_seed))}."
        if seeds < 2:
            return f"{found} {_seeds(seeds).capitalize()} shared with {self.second.label} cannot tell its lead from chance."
        lead, half = statistics.fmean(self.ahead), self.half_interval(seeds)
        found += f" It leads {self.second.label} by {lead:.5f} ± {half:.5f} over {_seeds(seeds)}: "
        if lead > half:
            return found + "more than chance gives."
        more = self.more_seeds() if lead > 0 else None
        remedy = f"{_seeds(more, 'more ')} would show one of this size" if more else "more seeds would hardly show one"
        return found + f"no difference that these seeds can show; {remedy}."


def _seeds(number: int, word: str = "") -> str:
    return f"{number} {word}seed{'s' * (number != 1)}"


@dataclass(frozen=True)
class Findings:
    """What can be said of a sweep as far as it is."""

    plan: Plan
    metric: str
    trials: Sequence[Trial]
    tokens: float | None  # where jobs are compared; None: at their ends, which are equal
    values: Mapping[int, float]  # the metric there, by the job's number
    program: Sequence[str]  # the command line without overrides
    against: str | None = None  # the group that the others are compared with, by its label; None: the best one
    direction: str = "minimize"  # which values are better
    axis: str = "tokens"  # what the rows' ``tokens`` count, see along()

    def rank(self, value: float) -> float:
        """Return what is less for a better value; what is not a number is worst."""
        return math.inf if math.isnan(value) else -value if self.direction == "maximize" else value

    @property
    def best(self) -> Trial | None:
        """The trial with the best value."""
        with_value = [trial for trial in self.trials if trial.job.number in self.values]
        return min(with_value, key=lambda trial: self.rank(self.values[trial.job.number]), default=None)

    @property
    def keys(self) -> list[str]:
        """The swept keys, in the order that they were asked in."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial.settings))

    @property
    def has_seeds(self) -> bool:
        """Whether seeds are among what was swept."""
        return any(key in SEEDS for key in self.keys)

    @property
    def groups(self) -> list[Group]:
        """The trials by everything but their seeds, the best mean first."""
        members: dict[tuple[tuple[str, str], ...], dict[tuple[str, ...], float]] = {}
        for trial in self.trials:
            if trial.job.number in self.values:
                settings = tuple(trial.without_seeds.items())
                seeds = tuple(value for key, value in trial.settings.items() if key in SEEDS)
                members.setdefault(settings, {})[seeds] = self.values[trial.job.number]
        groups = [Group(dict(settings), by_seed) for settings, by_seed in members.items()]
        return sorted(groups, key=lambda group: self.rank(group.estimate.mean))

    @property
    def lead(self) -> Lead | None:
        """How far the best setting is ahead of the next; None: there is one setting, or they share no seed."""
        groups = self.groups
        if not self.has_seeds or len(groups) < 2:
            return None
        best, second = groups[0], groups[1]
        sign = -1.0 if self.direction == "maximize" else 1.0
        ahead = [
            sign * (second.by_seed[seed] - value) for seed, value in best.by_seed.items() if seed in second.by_seed
        ]
        return Lead(self.metric, best, second, len(groups), tuple(ahead)) if ahead else None

    @property
    def reference(self) -> Group:
        """The group that the others are compared with; there is a value."""
        return next((group for group in self.groups if group.label == self.against), self.groups[0])

    @property
    def compared_with(self) -> str:
        """What :attr:`reference` is called."""
        return self.against or "the best"

    @property
    def summary(self) -> str:
        """Where the jobs are compared, and which are left out."""
        have, all_of = len(self.values), len(self.trials)
        left = (
            f" {all_of - have} of {all_of} jobs have no {self.metric} there and are left out." if have < all_of else ""
        )
        if not have:
            return f"No job has recorded {self.metric} yet."
        if self.tokens is None:
            return (
                f"All {have} jobs are compared at their end."
                if not left
                else f"{have} jobs are compared at their end.{left}"
            )
        return (
            f"The sweep is partial: {have} jobs are compared at {self.tokens:,.0f} {self.unit}, which all of them have "
            f"reached; no result is final.{left}"
        )

    @property
    def unit(self) -> str:
        """What the axis counts."""
        return "steps" if self.axis == "step" else self.axis

    def command(self, trial: Trial) -> str:
        """Return the command line that runs one trial again."""
        swept = set(trial.settings)
        fixed = []
        for override in self.plan.command:
            key = override.lstrip("+~").partition("=")[0]
            if key not in swept and not key.startswith(("hydra.", "hydra/", "launch.")):
                fixed.append(override)
        return shlex.join([*self.program, *self.plan.flags, *fixed, *trial.job.overrides])


def headline(findings: Findings) -> str:
    """Return the answer in a sentence."""
    best = findings.best
    if best is None:
        return f"{findings.plan.summary}; nothing to compare yet."
    word = "Best" if findings.tokens is None else "Best so far"
    lead = findings.lead
    if lead is not None:
        return f"{word} of {lead.settings} settings: {lead}"
    value = findings.values[best.job.number]
    return f"{word} of {len(findings.values)}: job {best.job.number} ({best.label}), {findings.metric} {value:.4f}."


Texts = Mapping[str, "str | None"]


def find(
    sweep: Path,
    states: Mapping[str, str],
    metric: str | None = None,
    causes: Texts | None = None,
    against: str | None = None,
) -> Findings:
    """Read the records of the sweep in ``sweep``.

    Args:
        states: the jobs' true states, by folder.
        metric: what is compared; None: what the application compares, or the first that its jobs have recorded.
        causes: why jobs failed, by folder.
        against: the group of seeds that others are compared with, such as ``study=dense``; None: the best one.

    Raises:
        ConfigError: there is no such group; see :func:`compare`.
    """
    plan = Plan.read(sweep)
    application = load(plan.application, plan.program)
    trials = []
    for job in plan.jobs:
        if states.get(job.folder) == "dropped":
            continue
        path = sweep / job.folder / "metrics.jsonl"
        state, cause, rows = states.get(job.folder, "planned"), (causes or {}).get(job.folder), []
        try:
            rows = along(application.axis, read_rows(path)) if path.exists() else []
        except ConfigError as error:  # it hides no other job
            state, cause = "unknown", str(error)
        trials.append(Trial(job, state, rows, cause))
    if metric is None:
        metric = application.metric
        others = [name for trial in trials for row in trial.rows for name in row if name not in COUNTED]
        if plan.program is not None and others and metric not in others:
            metric = others[0]
    findings = compare(
        plan, trials, metric, application.program, direction=application.direction, axis=application.axis
    )
    findings = replace(findings, against=against)
    labels = [group.label for group in findings.groups]
    if against is not None and labels and against not in labels:
        raise ConfigError(f"--against: no jobs of this sweep are {against!r}. {nearest(against, labels)}")
    return findings


def along(axis: str, rows: Sequence[Row]) -> list[Row]:
    """Return rows as they are followed: those of programs that count no tokens have their steps in that place."""
    if axis == "tokens":
        return list(rows)
    return [{**row, "tokens": row[axis] + 1} if axis in row else row for row in rows]


def compare(
    plan: Plan,
    trials: Sequence[Trial],
    metric: str,
    program: Sequence[str],
    *,
    direction: str = "minimize",
    axis: str = "tokens",
) -> Findings:
    """Compare ``trials``, the jobs of ``plan``, by ``metric``: at their ends, or as far as all of them have come.

    Raises:
        ConfigError: jobs have records, but none of them has the metric.
    """
    seen = {name for trial in trials for row in trial.rows for name in row}
    if seen and metric not in seen and any(trial.state == "done" for trial in trials):
        raise ConfigError(f"--metric: no job has recorded {metric!r}. {nearest(metric, seen)}")
    reached = {trial.job.number: trial.series(metric)[-1][0] for trial in trials if trial.series(metric)}
    equal = len(set(reached.values())) <= 1 or axis != "tokens"  # programs may come to their end at any step
    complete = {t.job.number for t in trials if t.state == "done"} >= set(reached) and equal
    tokens = None if complete or not reached else min(reached.values())
    end = math.inf if tokens is None else tokens
    values = {t.job.number: value for t in trials if (value := t.at(metric, end)) is not None}
    return Findings(plan, metric, trials, tokens, values, program, direction=direction, axis=axis)
