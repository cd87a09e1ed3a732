"""What a sweep has found: its jobs compared, over seeds and group by group, from what they have recorded so far."""

from __future__ import annotations

import math
import shlex
import statistics
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from apt_launch.record import Row, read_rows
from apt_launch.rows import Speed, Speeds, first_enabled, is_number, is_scheduled_value, rank
from apt_launch.sweep.application import load
from apt_launch.sweep.jobs.trunk import Graft, graft_of
from apt_launch.sweep.plan.jobs import SEEDS, Job, in_short, key_and_value, short_key
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError, nearest

COUNTED = ("step", "epoch", "samples", "tokens", "time", "total")
"""Names in rows that count, and are compared by nobody unless a command says so."""


@dataclass(frozen=True)
class Trial:
    """A job and its record."""

    job: Job
    state: str
    rows: Sequence[Row] = field(repr=False)
    cause: str | None = None
    plan: Plan | None = field(default=None, repr=False)  # where several sweeps are joined, that of its own
    folder: Path | None = None  # the same
    given: Mapping[str, str] | None = None  # its settings among those of all joined sweeps
    graft: Graft | None = None  # the first updates that another job has trained for it

    @property
    def settings(self) -> dict[str, str]:
        """What it differs by: key to value, as the user wrote them."""
        return self.job.settings if self.given is None else dict(self.given)

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
    marginal: tuple[str, ...] = ()  # keys by which jobs are grouped for that, whatever else they have; none: by all
    direction: str = "minimize"  # which values are better
    axis: str = "tokens"  # what the rows' ``tokens`` count, see along()

    def rank(self, value: float) -> float:
        """Return what is less for a better value; what is not a number is worst."""
        return rank(value, self.direction)

    @cached_property
    def speeds(self) -> dict[str, list[Speed]]:
        """How fast each phase was, in each job that had it."""
        found: dict[str, list[Speed]] = {}
        for trial in self.trials:
            speeds = Speeds()
            for row in trial.rows:
                speeds.add(row)
            for phase, speed in speeds.by_phase().items():
                found.setdefault(phase, []).append(speed)
        return found

    @property
    def best(self) -> Trial | None:
        """The trial with the best value, where seeds are swept of those of the best setting."""
        with_value = [trial for trial in self.trials if trial.job.number in self.values]
        if self.has_seeds and with_value:
            settings = self.groups[0].settings
            with_value = [trial for trial in with_value if trial.without_seeds == settings]
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
        return self._by([key for key in self.keys if key not in SEEDS])

    @property
    def compared_groups(self) -> list[Group]:
        """The trials by what :attr:`against` names, the best mean first."""
        return self._by(self.marginal) if self.marginal else self.groups

    @property
    def has_groups(self) -> bool:
        """Whether groups of more than one job are compared."""
        return self.has_seeds or bool(self.marginal)

    def _by(self, keys: Collection[str]) -> list[Group]:
        members: dict[tuple[tuple[str, str], ...], dict[tuple[str, ...], float]] = {}
        for trial in self.trials:
            if trial.job.number in self.values:
                settings = tuple(item for item in trial.settings.items() if item[0] in keys)
                others = tuple(value for key, value in trial.settings.items() if key not in keys)
                members.setdefault(settings, {})[others] = self.values[trial.job.number]
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
        return Lead(self.metric, best, second, self.num_settings, tuple(ahead)) if ahead else None

    @property
    def num_settings(self) -> int:
        """How many settings were tried, those that were stopped as losers among them."""
        tried = [t for t in self.trials if t.job.number in self.values or t.state == "stopped"]
        return len({tuple(trial.without_seeds.items()) for trial in tried})

    @property
    def reference(self) -> Group:
        """The group that the others are compared with; there is a value."""
        groups = self.compared_groups
        return next((group for group in groups if group.label == self.against), groups[0])

    @property
    def one_by_one(self) -> str:
        """How differences between groups are taken."""
        return "pair by pair" if self.marginal else "seed by seed"

    @property
    def compared_with(self) -> str:
        """What :attr:`reference` is called."""
        return self.against or "the best"

    @property
    def summary(self) -> str:
        """Where the jobs are compared, and which are left out."""
        have, all_of = len(self.values), len(self.trials)
        lost = sum(trial.state == "stopped" and trial.job.number not in self.values for trial in self.trials)
        left = f" {lost} of {all_of} jobs were stopped as losers and are left out." if lost else ""
        if without := all_of - have - lost:
            left += f" {without} of {all_of} jobs have no {self.metric} there and are left out."
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
        swept, plan = set(trial.job.settings), trial.plan or self.plan
        fixed = []
        for override in plan.command:
            key, _ = key_and_value(override)
            if key not in swept and not key.startswith(("hydra.", "hydra/", "launch.")):
                fixed.append(override)
        return shlex.join([*self.program, *plan.flags, *fixed, *trial.job.overrides])


def headline(findings: Findings) -> str:
    """Return the answer in a sentence."""
    best = findings.best
    if best is None:
        return f"{findings.plan.summary}; nothing to compare yet."
    word = "Best" if findings.tokens is None else "Best so far"
    lead = findings.lead
    if lead is not None:
        return f"{word} of {lead.settings} settings: {lead}"
    if findings.has_seeds and findings.num_settings > len(findings.groups) == 1:
        (group,) = findings.groups
        mean, seeds = group.estimate.mean, _seeds(len(group.by_seed))
        return (
            f"{word} of {findings.num_settings} settings: {group.label}, {findings.metric} {mean:.4f} on average over {seeds}; "
            "the others were stopped as losers."
        )
    value = findings.values[best.job.number]
    return f"{word} of {len(findings.values)}: job {best.job.number} ({best.label}), {findings.metric} {value:.4f}."


Texts = Mapping[str, "str | None"]


@dataclass(frozen=True)
class Source:
    """A sweep that is reported: its folder, and what is known of its jobs, by their folders."""

    folder: Path
    states: Mapping[str, str]
    causes: Texts = field(default_factory=dict)


def find(
    sweep: Path,
    states: Mapping[str, str],
    metric: str | None = None,
    causes: Texts | None = None,
    against: str | None = None,
    *,
    direction: str | None = None,
    others: Sequence[Source] = (),
) -> Findings:
    """Read the records of the sweep in ``sweep``.

    Args:
        states: the jobs' true states, by folder.
        metric: what is compared; None: what the application compares, or the first that its jobs have recorded.
        causes: why jobs failed, by folder.
        against: the jobs that others are compared with, such as ``moe.top_k=1``; None: the best ones. See :func:`_against`.
        direction: ``minimize`` or ``maximize``; None: as the application says.
        others: sweeps of the same program that are joined to it.

    Raises:
        ConfigError: there are no such jobs, or sweeps are of different programs; see :func:`compare`.
    """
    sources = [Source(sweep, states, causes or {}), *others]
    plans = [Plan.read(source.folder) for source in sources]
    plan = plans[0]
    for source, other in zip(sources, plans, strict=True):
        if (other.application, other.program and other.program.command) != (
            plan.application,
            plan.program and plan.program.command,
        ):
            raise ConfigError(
                f"{source.folder}: its jobs run another program than those of {sweep}. Report it by itself."
            )
    application = load(plan.application, plan.program)
    trials = [
        trial
        for source, one in zip(sources, plans, strict=True)
        for trial in _trials(source, one, application.axis, joined=bool(others))
    ]
    if others:
        plan, trials = _joined(plans, trials)
    if metric is None:
        metric = application.metric
        recorded = [name for trial in trials for row in trial.rows for name in row if name not in COUNTED]
        if plan.program is not None and recorded and metric not in recorded:
            metric = recorded[0]
    findings = compare(
        plan, trials, metric, application.program, direction=direction or application.direction, axis=application.axis
    )
    return findings if against is None else _against(findings, against)


def _trials(source: Source, plan: Plan, axis: str, *, joined: bool) -> list[Trial]:
    """Return the jobs of a sweep with their records, without those that were dropped."""
    trials = []
    for job in plan.jobs:
        state = source.states.get(job.folder, "planned")
        if state == "dropped":
            continue
        folder = source.folder / job.folder
        cause, rows = source.causes.get(job.folder), []
        path = folder / "metrics.jsonl"
        try:
            rows = along(axis, read_rows(path)) if path.exists() else []
        except ConfigError as error:  # it hides no other job
            state, cause = "unknown", str(error)
        graft = None
        if job.fork is not None:
            with suppress(ConfigError):  # damaged: it only says where updates come from
                graft = graft_of(folder)
        own = Trial(job, state, rows, cause, graft=graft)
        trials.append(replace(own, plan=plan, folder=folder) if joined else own)
    return trials


def _joined(plans: Sequence[Plan], trials: Sequence[Trial]) -> tuple[Plan, list[Trial]]:
    """Return the trials of several sweeps as those of one, each different run once, with what they differ by."""
    kept: dict[str, Trial] = {}
    for trial in trials:
        known = kept.get(trial.job.identity)
        if known is None or (trial.state == "done", len(trial.rows)) > (known.state == "done", len(known.rows)):
            kept[trial.job.identity] = trial
    configs = {
        identity: {**trial.plan.shared, **trial.job.differs} if trial.plan is not None else {}
        for identity, trial in kept.items()
    }
    fixed = [  # what one command has set for all of its jobs, another may have swept, or set otherwise
        key_and_value(override)[0]
        for plan in plans
        for override in plan.command
        if not override.lstrip("+~").startswith(("hydra.", "hydra/", "launch."))
    ]
    keys = dict.fromkeys([*(key for trial in kept.values() for key in trial.job.settings), *fixed])
    given: dict[str, dict[str, str]] = {identity: {} for identity in kept}
    for key in keys:
        values = {
            identity: _value(configs[identity], key, trial.job.settings.get(key, _of_command(trial.plan, key)))
            for identity, trial in kept.items()
        }
        if len(set(values.values())) > 1:
            for identity, value in values.items():
                if value:  # a group's option that only another command has named
                    given[identity][key] = value
    found = [
        replace(trial, job=replace(trial.job, number=number), given=given[identity])
        for number, (identity, trial) in enumerate(kept.items())
    ]
    plan = replace(
        plans[0],
        id=" and ".join(plan.id for plan in plans),
        asked=sum(plan.asked for plan in plans),
        jobs=tuple(trial.job for trial in found),
    )
    return plan, found


def _of_command(plan: Plan | None, key: str) -> str:
    """Return what a command sets ``key`` to; empty: nothing."""
    overrides = map(key_and_value, reversed(plan.command if plan is not None else ()))
    return next((value for name, value in overrides if name == key), "")


def _value(config: Mapping[str, Any], key: str, written: str) -> str:
    """Return the value of ``key`` in a config, or as it is ``written`` where the config has none, such as a group's option."""
    value = config.get(key, written)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _against(findings: Findings, against: str) -> Findings:
    """Return ``findings`` with the jobs that the others are compared with: those with the settings in ``against``.

    ``moe.top_k=1 seed=0``: keys in full or in short, of some of the keys that were swept. Where jobs differ by others, too,
    those are compared that are alike in them.

    Raises:
        ConfigError: there are no such jobs.
    """
    labels = [group.label for group in findings.groups]
    if not labels or against in labels:
        return replace(findings, against=against)
    swept = [key for key in findings.keys if key not in SEEDS]
    wanted: dict[str, str] = {}
    for word in against.split():
        name, _, value = word.lstrip("+").partition("=")
        found = [key for key in swept if key == name] or [key for key in swept if short_key(key) == name]
        if not found:
            names = [*swept, *map(short_key, swept)]
            raise ConfigError(f"--against: {name!r} is not among what was swept. {nearest(name, names)}")
        if len(found) > 1:
            raise ConfigError(f"--against: {name!r} may be {' or '.join(found)}. Write the whole key.")
        wanted[found[0]] = value
    keys = tuple(key for key in swept if key in wanted)
    chosen = replace(findings, marginal=keys if len(keys) < len(swept) else ())
    for group in chosen.compared_groups:
        if all(_same(group.settings.get(key, ""), wanted[key]) for key in keys):
            return replace(chosen, against=group.label)
    known = [group.label for group in chosen.compared_groups]
    known += [" ".join(f"{key}={value}" for key, value in group.settings.items()) for group in chosen.compared_groups]
    raise ConfigError(f"--against: no jobs of this sweep are {against!r}. {nearest(against, known)}")


def _same(one: str, other: str) -> bool:
    """Return whether two values are one, as numbers too."""
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


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
    running = [trial for trial in trials if trial.state != "stopped"]  # losers end early: nobody waits for them
    compared = running if any(trial.series(metric) for trial in running) else trials
    reached = {trial.job.number: trial.series(metric)[-1][0] for trial in compared if trial.series(metric)}
    equal = len(set(reached.values())) <= 1 or axis != "tokens"  # programs may come to their end at any step
    complete = {t.job.number for t in trials if t.state == "done"} >= set(reached) and equal
    tokens = None if complete or not reached else min(reached.values())
    end = math.inf if tokens is None else tokens
    values = {t.job.number: value for t in compared if (value := t.at(metric, end)) is not None}
    return Findings(plan, metric, trials, tokens, values, program, direction=direction, axis=axis)
