"""Which job won: tables, plots and one page of a sweep."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from apt_launch.escapes import cell, markdown, visible
from apt_launch.record import Row
from apt_launch.sweep.plan.jobs import short_key
from apt_launch.sweep.plan.tree import is_shared, saving
from apt_launch.sweep.report.findings import Estimate, Findings, Source, Texts, Trial, find, headline
from apt_model.files import refuse_links, write_atomic


def write_report(
    sweep: Path,
    states: Mapping[str, str],
    metric: str | None = None,
    causes: Texts | None = None,
    against: str | None = None,
    *,
    direction: str | None = None,
    others: Sequence[Source] = (),
) -> list[Path]:
    """Write CSV, Markdown, PNG, and one HTML page into the sweep's folder; return the files. See :func:`find`.

    They are in ``report/`` there; of several sweeps together in ``joined/`` of the first.
    """
    from apt_launch.sweep.report.plots import draw  # matplotlib

    findings = find(sweep, states, metric, causes, against, direction=direction, others=others)
    folder = sweep / ("joined" if others else "report")
    refuse_links(sweep, "DIR") if folder.is_symlink() else refuse_links(folder, "DIR")
    folder.mkdir(exist_ok=True)
    drawn = draw(findings, folder)
    files = {
        "report.csv": as_csv(findings),
        "report.md": as_markdown(findings, list(drawn)),
        "report.html": as_page(findings, drawn),
    }
    for name, text in files.items():
        write_atomic(folder / name, text)
    return [folder / name for name in files] + [folder / f"{name}.png" for name in drawn]


# --- the table ---------------------------------------------------------------------------------------------------------


def columns(findings: Findings) -> list[str]:
    """Return the table's heads, the same whatever is compared."""
    tokens = ["tokens"] if findings.axis == "tokens" else []
    reached = ["state", "step", *tokens, "compared", "best"]
    causes = ["cause"] if any(trial.cause for trial in findings.trials) else []
    own = ["train/loss", "tokens/s"] if findings.axis == "tokens" else []
    shared = ["shared"] if any(_shared(trial) for trial in findings.trials) else []
    return ["job", *findings.keys, *shared, *reached, *own, "seconds", *causes]


def lines(findings: Findings) -> list[list[Any]]:
    """Return the table's lines, the best first, then those without a value."""
    found = []
    with_causes, with_shared = "cause" in columns(findings), "shared" in columns(findings)
    has_tokens = findings.axis == "tokens"
    for trial in findings.trials:
        last: Row = {}
        for row in trial.rows:
            last |= row
        best = min((value for _, value in trial.series(findings.metric)), key=findings.rank, default=None)
        settings = trial.settings
        found.append(
            [
                trial.job.number,
                *(settings.get(key, "") for key in findings.keys),
                *([_shared(trial)] if with_shared else []),
                trial.state,
                int(last["step"]) + 1 if last else None,
                *([int(last["tokens"]) if "tokens" in last else None] if has_tokens else []),
                findings.values.get(trial.job.number),
                best,
                *([last.get("train/loss"), last.get("tokens_per_second")] if has_tokens else []),
                last.get("time"),
                *([trial.cause] if with_causes else []),
            ]
        )
    compared = columns(findings).index("compared")
    return sorted(found, key=lambda line: (line[compared] is None, findings.rank(line[compared] or 0.0), line[0]))


def _shared(trial: Trial) -> str:
    """Return how many of its first updates another job has trained, and which one."""
    if trial.graft is None or not trial.graft.update:
        return ""
    of = "" if trial.plan is not None else f" of {trial.graft.job.partition('-')[0]}"
    return f"{trial.graft.update}{of}"


def as_csv(findings: Findings) -> str:
    """Return the table as CSV, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*map(cell, columns(findings)), "metric", "folder", "command"])
    by_number = {trial.job.number: trial for trial in findings.trials}
    for line in lines(findings):
        trial = by_number[line[0]]
        values = ["" if value is None else cell(value) for value in line]
        folder = trial.job.folder if trial.folder is None else str(trial.folder)
        writer.writerow([*values, cell(findings.metric), folder, findings.command(trial)])
    return text.getvalue()


def shown(cell: Any, head: str = "") -> str:
    """Return a cell as text."""
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if head in ("tokens/s", "seconds") else f"{cell:.4f}"
    return f"{cell:,}" if isinstance(cell, int) and head in ("tokens", "step") else str(cell)


def as_markdown(findings: Findings, pictures: Sequence[str]) -> str:
    """Return the report as Markdown."""
    heads = columns(findings)
    parts = [
        f"# Sweep {markdown(findings.plan.id)}",
        "",
        markdown(headline(findings)),
        "",
        markdown(findings.summary),
        "",
    ]
    best = findings.best
    if best is not None:
        parts += ["```sh", findings.command(best).replace("```", "` ` `"), "```", ""]
    parts += [markdown(note_on_jobs(findings)), ""]
    parts += [f"| {' | '.join(map(markdown, heads))} |", f"|{'---|' * len(heads)}"]
    parts += [
        f"| {' | '.join(markdown(shown(c, h)) for c, h in zip(line, heads, strict=True))} |" for line in lines(findings)
    ]
    if speeds := speed_table(findings):
        parts += ["", f"## {SPEEDS}", "", "| phase | tokens/s | MFU |", "|---|---|---|"]
        parts += [f"| {' | '.join(map(markdown, row))} |" for row in speeds]
    if findings.has_groups and findings.values:
        heads, rows = group_table(findings)
        parts += [
            "",
            f"## {title_of_groups(findings)}",
            "",
            f"| {' | '.join(map(markdown, heads))} |",
            f"|{'---|' * len(heads)}",
        ]
        parts += [f"| {' | '.join(map(markdown, row))} |" for row in rows]
    parts += ["", markdown(note_on_groups(findings)), ""]
    parts += [f"![{name}]({name}.png)\n" for name in pictures]
    return visible("\n".join(parts))


SPEEDS: Final = "Speed by phase, the mean of all jobs"


def speed_table(findings: Findings) -> list[list[str]]:
    """Return a line a phase: its name, tokens a second, and the share of the GPUs' peak where that is known."""
    table = []
    for phase, each in findings.speeds.items():
        utilisations = [speed.mfu for speed in each if speed.mfu is not None]
        mfu = f"{fmean(utilisations):.1%}" if utilisations else ""
        table.append([phase, f"{fmean(speed.tokens_per_second for speed in each):,.0f}", mfu])
    return table


def note_on_jobs(findings: Findings) -> str:
    """Return what two columns of the table are of."""
    better = "higher" if findings.direction == "maximize" else "lower"
    note = f"compared and best: {findings.metric}, where jobs are compared and anywhere; {better} is better."
    if "shared" in columns(findings):
        note += " shared: first updates that another job has trained for it, which the seconds count, too."
    if is_shared(findings.plan):
        note += f" As planned: {saving(findings.plan)}."
    return note


def title_of_groups(findings: Findings) -> str:
    """Return what :func:`group_table` has."""
    return (
        f"Mean over all jobs with the same {' and '.join(findings.marginal)}"
        if findings.marginal
        else "Mean over seeds"
    )


def note_on_groups(findings: Findings) -> str:
    """Return what the intervals of :func:`group_table` are, or why there are none."""
    if not findings.values:
        return ""
    about = f"mean: of {findings.metric}; difference: how much more than {findings.compared_with}. "
    if findings.marginal:
        return (
            f"{about}Differences are taken between jobs that are alike in all else, seeds too; ± is half of the 95 % interval "
            "(Student's t) over such pairs, as if each were an experiment of its own."
        )
    if not findings.has_seeds:
        return "One seed each: no interval can be given. Add several seeds, for instance seed=0,1,2."
    return (
        f"{about}± is half of the 95 % interval (Student's t) of the mean over seeds. Differences are taken seed by seed: one "
        "whose interval holds 0 may be chance."
    )


def group_table(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Return heads and lines of the table of groups: mean over seeds, and the difference from the reference."""
    groups = findings.compared_groups
    keys = list(dict.fromkeys(key for group in groups for key in group.settings))
    heads = [*(short_key(key) for key in keys), "jobs" if findings.marginal else "seeds", "mean", "difference"]
    rows = []
    for group in groups:
        more = group.over(findings.reference) if group.label != findings.reference.label else None
        settings = [group.settings.get(key, "") for key in keys]
        rows.append([*settings, str(len(group.by_seed)), _shown(group.estimate), _shown(more) if more else ""])
    return heads, rows


def _shown(estimate: Estimate) -> str:
    half = estimate.half_interval
    return f"{estimate.mean:.4f} ± {half:.4f}" if half is not None else f"{estimate.mean:.4f}"


def as_page(findings: Findings, drawn: Mapping[str, str]) -> str:
    """Return one HTML page that needs nothing from outside; ``drawn``: SVG by name."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("apt_launch.sweep.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    heads = columns(findings)
    kinds = {"cause": "cause"} | dict.fromkeys((*findings.keys, "state"), "text")
    best = findings.best
    titles = {
        "losses": f"{'Losses' if findings.axis == 'tokens' else findings.metric} over {findings.unit}",
        "schedules": "Schedules",
        "metric": f"Final {findings.metric} by what was swept",
        "differences": f"Differences from {findings.compared_with}, {findings.one_by_one}",
    }
    html = page.get_template("report.html").render(
        findings=findings,
        headline=headline(findings),
        command=findings.command(best) if best is not None else None,
        best=best.job.number if best is not None else None,
        pictures=[(titles[name], svg) for name, svg in drawn.items()],
        groups=group_table(findings) if findings.has_groups and findings.values else None,
        title_of_groups=title_of_groups(findings),
        speeds=speed_table(findings),
        title_of_speeds=SPEEDS,
        note=note_on_groups(findings),
        note_on_jobs=note_on_jobs(findings),
        heads=[(head, "text" if head == "cause" else kinds.get(head, "")) for head in heads],
        jobs=[
            (line[0], [(kinds.get(head, ""), shown(cell, head)) for head, cell in zip(heads, line, strict=True)])
            for line in lines(findings)
        ],
    )
    return visible(html)
