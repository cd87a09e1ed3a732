"""Which job won: tables, plots and one page of a sweep, from what its jobs have recorded so far."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apt_launch.record import Row, read_rows
from apt_launch.sweep.plan.plan import Job, Plan, short_key
from apt_model.errors import ConfigError, nearest
from apt_model.files import write_whole
from apt_model.schedule.rows import anneals, first_on

SEEDS = ("seed", "data.seed")
"""Keys whose values are repetitions of one experiment."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1; above, 2.0 is close enough."""


@dataclass(frozen=True)
class Trial:
    """A job and its record."""

    job: Job
    state: str
    rows: Sequence[Row] = field(repr=False)
    cause: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What it was asked for by: key to value, as the user wrote them."""
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
        return [(row["tokens"], row[name]) for row in self.rows if name in row and is_number(row[name])]

    def at(self, name: str, tokens: float) -> float | None:
        """Return the metric's last value until ``tokens``."""
        values = [value for seen, value in self.series(name) if seen <= tokens]
        return values[-1] if values else None

    @property
    def switches(self) -> dict[str, float]:
        """Where each module went on, in tokens."""
        return {module: row["tokens"] for module, row in first_on(self.rows).items()}

    @property
    def anneals(self) -> list[str]:
        """The scheduled values that it recorded."""
        return sorted({f"schedule/{name}" for row in self.rows for name in anneals(row)})


@dataclass(frozen=True)
class Estimate:
    """A mean, and half of its 95 % interval (Student's); None: one value tells nothing of its spread."""

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
        return cls(mean, (T_95[count - 2] if count - 2 < len(T_95) else 2.0) * math.sqrt(variance / count))


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
class Findings:
    """What can be said of a sweep as far as it is."""

    plan: Plan
    metric: str
    trials: Sequence[Trial]
    tokens: float | None  # where jobs are compared; None: at their ends, which are equal
    values: Mapping[int, float]  # the metric there, by the job's number
    against: str | None = None  # the group that the others are compared with, by its label; None: the best one

    @property
    def best(self) -> Trial | None:
        """The trial with the lowest value."""
        with_value = [trial for trial in self.trials if trial.job.number in self.values]
        return min(with_value, key=lambda trial: self.values[trial.job.number], default=None)

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
        """The trials by everything but their seeds, the lowest mean first."""
        members: dict[tuple[tuple[str, str], ...], dict[tuple[str, ...], float]] = {}
        for trial in self.trials:
            if trial.job.number in self.values:
                settings = tuple(trial.without_seeds.items())
                seeds = tuple(value for key, value in trial.settings.items() if key in SEEDS)
                members.setdefault(settings, {})[seeds] = self.values[trial.job.number]
        groups = [Group(dict(settings), by_seed) for settings, by_seed in members.items()]
        return sorted(groups, key=lambda group: group.estimate.mean)

    @property
    def reference(self) -> Group:
        """The group that the others are compared with; there is a value."""
        return next((group for group in self.groups if group.label == self.against), self.groups[0])

    @property
    def compared_with(self) -> str:
        """What :attr:`reference` is called."""
        return self.against or "the best"

    @property
    def told(self) -> str:
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
            f"The sweep is partial: {have} jobs are compared at {self.tokens:,.0f} tokens, which all of them have reached; no "
            f"result is final.{left}"
        )

    def command(self, trial: Trial) -> str:
        """Return the command line that runs one trial again."""
        swept = set(trial.settings)
        fixed = []
        for override in self.plan.command:
            key = override.lstrip("+~").partition("=")[0]
            if key not in swept and not key.startswith(("hydra.", "hydra/", "launch.")):
                fixed.append(override)
        return shlex.join(["python", "-m", "apt_launch", *fixed, *trial.job.overrides])


Texts = Mapping[str, "str | None"]


def find(
    sweep: Path,
    states: Mapping[str, str],
    metric: str = "val/loss",
    causes: Texts | None = None,
    against: str | None = None,
) -> Findings:
    """Read the records of the sweep in ``sweep``.

    Args:
        states: the jobs' true states, by folder.
        metric: what is compared; less is better.
        causes: why jobs failed, by folder.
        against: the group of seeds that others are compared with, such as ``study=dense``; None: the best one.

    Raises:
        ConfigError: there is no such group; see :func:`compare`.
    """
    plan = Plan.read(sweep)
    trials = []
    for job in plan.jobs:
        path = sweep / job.folder / "metrics.jsonl"
        rows = read_rows(path) if path.exists() else []
        trials.append(Trial(job, states.get(job.folder, "planned"), rows, (causes or {}).get(job.folder)))
    findings = replace(compare(plan, trials, metric), against=against)
    labels = [group.label for group in findings.groups]
    if against is not None and labels and against not in labels:
        raise ConfigError(f"--against: no jobs of this sweep are {against!r}. {nearest(against, labels)}")
    return findings


def compare(plan: Plan, trials: Sequence[Trial], metric: str) -> Findings:
    """Compare ``trials``, the jobs of ``plan``, by ``metric``: at their ends, or as far as all of them have come.

    Raises:
        ConfigError: jobs have records, but none of them has the metric.
    """
    seen = {name for trial in trials for row in trial.rows for name in row}
    if seen and metric not in seen and any(trial.state == "done" for trial in trials):
        raise ConfigError(f"--metric: no job has recorded {metric!r}. {nearest(metric, seen)}")
    reached = {trial.job.number: trial.series(metric)[-1][0] for trial in trials if trial.series(metric)}
    complete = {t.job.number for t in trials if t.state == "done"} >= set(reached) and len(set(reached.values())) <= 1
    tokens = None if complete or not reached else min(reached.values())
    end = math.inf if tokens is None else tokens
    values = {t.job.number: value for t in trials if (value := t.at(metric, end)) is not None}
    return Findings(plan, metric, trials, tokens, values)


def write_report(
    sweep: Path,
    states: Mapping[str, str],
    metric: str = "val/loss",
    causes: Texts | None = None,
    against: str | None = None,
) -> list[Path]:
    """Write ``report/`` into the sweep's folder: CSV, Markdown, PNG, and one HTML page; return the files. See :func:`find`."""
    from apt_launch.sweep.report.plots import draw

    findings = find(sweep, states, metric, causes, against)
    folder = sweep / "report"
    folder.mkdir(exist_ok=True)
    drawn = draw(findings, folder)
    files = {
        "report.csv": as_csv(findings),
        "report.md": as_markdown(findings, list(drawn)),
        "report.html": as_page(findings, drawn),
    }
    for name, text in files.items():
        write_whole(folder / name, text)
    return [folder / name for name in files] + [folder / f"{name}.png" for name in drawn]


# --- the table ---------------------------------------------------------------------------------------------------------


def columns(findings: Findings) -> list[str]:
    """Return the table's heads."""
    reached = ["state", "step", "tokens", f"{findings.metric} compared", f"best {findings.metric}"]
    causes = ["cause"] if any(trial.cause for trial in findings.trials) else []
    return ["job", *findings.keys, *reached, "train/loss", "tokens/s", "seconds", *causes]


def lines(findings: Findings) -> list[list[Any]]:
    """Return the table's lines, the best first, then those without a value."""
    found = []
    with_causes = "cause" in columns(findings)
    for trial in findings.trials:
        last: Row = {}
        for row in trial.rows:
            last |= row
        best = min((value for _, value in trial.series(findings.metric)), default=None)
        settings = trial.settings
        found.append(
            [
                trial.job.number,
                *(settings.get(key, "") for key in findings.keys),
                trial.state,
                int(last["step"]) + 1 if last else None,
                int(last["tokens"]) if last else None,
                findings.values.get(trial.job.number),
                best,
                last.get("train/loss"),
                last.get("tokens_per_second"),
                last.get("time"),
                *([trial.cause] if with_causes else []),
            ]
        )
    compared = len(findings.keys) + 4
    return sorted(found, key=lambda line: (line[compared] is None, line[compared] or 0.0, line[0]))


def as_csv(findings: Findings) -> str:
    """Return the table as CSV, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns(findings), "folder", "command"])
    by_number = {trial.job.number: trial for trial in findings.trials}
    for line in lines(findings):
        trial = by_number[line[0]]
        writer.writerow([*("" if cell is None else cell for cell in line), trial.job.folder, findings.command(trial)])
    return text.getvalue()


def shown(cell: Any, head: str = "") -> str:
    """Return a cell as people read it."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if head in ("tokens/s", "seconds") else f"{cell:.4f}"
    return f"{cell:,}" if isinstance(cell, int) and head in ("tokens", "step") else str(cell)


def as_markdown(findings: Findings, pictures: Sequence[str]) -> str:
    """Return the report as Markdown."""
    heads = columns(findings)
    parts = [f"# Sweep {findings.plan.id}", "", headline(findings), "", findings.told, ""]
    best = findings.best
    if best is not None:
        parts += ["```sh", findings.command(best), "```", ""]
    parts += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    parts += [
        f"| {' | '.join(shown(c, h).replace('|', '/') for c, h in zip(line, heads, strict=True))} |"
        for line in lines(findings)
    ]
    if findings.has_seeds:
        heads, rows = group_table(findings)
        parts += ["", "## Mean over seeds", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        parts += [f"| {' | '.join(row)} |" for row in rows]
    parts += ["", told_groups(findings), ""]
    parts += [f"![{name}]({name}.png)\n" for name in pictures]
    return "\n".join(parts)


def headline(findings: Findings) -> str:
    """Return the answer in a sentence."""
    best = findings.best
    if best is None:
        return f"{findings.plan.told}; nothing to compare yet."
    word = "Best" if findings.tokens is None else "Best so far"
    value = findings.values[best.job.number]
    return f"{word} of {len(findings.values)}: job {best.job.number} ({best.label}), {findings.metric} {value:.4f}."


def told_groups(findings: Findings) -> str:
    """Return what the intervals of :func:`group_table` are, or why there are none."""
    if not findings.values:
        return ""
    if not findings.has_seeds:
        return "One seed each: no interval can be given. Add several seeds, for instance seed=0,1,2."
    return (
        "± is half of the 95 % interval (Student's t) of the mean over seeds. Differences are taken seed by seed: one whose "
        "interval holds 0 may be chance."
    )


def group_table(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of the table of groups: mean over seeds, and the difference from the reference."""
    keys = list(dict.fromkeys(key for group in findings.groups for key in group.settings))
    heads = [*(short_key(key) for key in keys), "seeds", findings.metric, f"more than {findings.compared_with}"]
    rows = []
    for group in findings.groups:
        more = group.over(findings.reference) if group.label != findings.reference.label else None
        told = [group.settings.get(key, "").replace("|", "/") for key in keys]
        rows.append([*told, str(len(group.by_seed)), _shown(group.estimate), _shown(more) if more else ""])
    return heads, rows


def _shown(estimate: Estimate) -> str:
    half = estimate.half_interval
    return f"{estimate.mean:.4f} ± {half:.4f}" if half is not None else f"{estimate.mean:.4f}"


# --- the page ----------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2ca02c33; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.answer { font-size: 1.1rem; }
pre { background: var(--soft); padding: .6rem .8rem; border-radius: .4rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.text, th.text { text-align: left; } td.cause { white-space: normal; min-width: 14rem; text-align: left; }
tr.best td { background: var(--good); }
svg { width: 100%; height: auto; display: block; }
"""


def as_page(findings: Findings, drawn: Mapping[str, str]) -> str:
    """Return one HTML page that needs nothing from outside; ``drawn``: SVG by name."""
    from html import escape

    heads = columns(findings)
    texts = {*findings.keys, "state", "cause"}
    best = findings.best
    head = "".join(f"<th{' class=text' if h in texts else ''}>{escape(h)}</th>" for h in heads)
    body = []
    for line in lines(findings):
        cells = []
        for name, cell in zip(heads, line, strict=True):
            kind = " class=cause" if name == "cause" else " class=text" if name in texts else ""
            cells.append(f"<td{kind}>{escape(shown(cell, name))}</td>")
        mark = " class=best" if best is not None and line[0] == best.job.number else ""
        body.append(f"<tr{mark}>{''.join(cells)}</tr>")
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>Sweep {escape(findings.plan.id)}</title><style>{STYLE}</style></head><body>",
        f"<h1>Sweep {escape(findings.plan.id)}</h1><p>{escape(findings.plan.told)}, {escape(findings.plan.launcher)}, "
        f"{escape(findings.plan.created[:16].replace('T', ' '))} UTC</p>",
        f"<p class=answer><strong>{escape(headline(findings))}</strong></p><p>{escape(findings.told)}</p>",
    ]
    if best is not None:
        parts.append(f"<pre>{escape(findings.command(best))}</pre>")
    titles = {
        "losses": "Losses over tokens",
        "schedules": "Schedules",
        "metric": f"Final {findings.metric} by what was swept",
        "differences": f"Differences from {findings.compared_with}, seed by seed",
    }
    for name, svg in drawn.items():
        parts.append(f"<h2>{escape(titles[name])}</h2>{svg}")
    if findings.has_seeds and findings.values:
        heads_of_groups, rows = group_table(findings)
        top = "".join(f"<th>{escape(name)}</th>" for name in heads_of_groups)
        rest = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<h2>Mean over seeds</h2><div class=wide><table><tr>{top}</tr>{rest}</table></div>")
    parts.append(f"<p>{escape(told_groups(findings))}</p>")
    parts.append(f"<h2>Jobs</h2><div class=wide><table><tr>{head}</tr>{''.join(body)}</table></div></body></html>\n")
    return "".join(parts)


def in_short(settings: Mapping[str, str]) -> str:
    """Return settings with the parts of keys that tell them from others."""
    return " ".join(f"{short_key(key)}={value}" for key, value in settings.items())


def is_number(value: Any) -> bool:
    """Say whether ``value`` can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)
