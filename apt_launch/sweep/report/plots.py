"""The pictures of a sweep's report, each as PNG and as SVG for the page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_launch.drawing import Drawing, new_figure
from apt_launch.escapes import label
from apt_launch.sweep.plan.jobs import SEEDS, in_short, short_key
from apt_launch.sweep.report.findings import Estimate, Findings, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED = 10
"""Above this many groups of jobs colours are a scale, and only the table names them."""

MOST_RANKED = 24
"""Groups that are drawn beside each other, the best."""

GREY = "#808080"  # to be read on white and on black


def draw(findings: Findings, folder: Path) -> dict[str, str]:
    """Draw what there is data for, as PNG into ``folder``; return the same as SVG, by name."""
    drawn = {}
    style: Any = {
        **{f"{part}.color": GREY for part in ("text", "xtick", "ytick")},
        **{"axes.labelcolor": GREY, "axes.edgecolor": GREY, "axes.titlecolor": GREY, "grid.color": GREY},
        **{"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "legend.labelcolor": GREY},
    }
    pictures = {"losses": _losses, "schedules": _schedules, "metric": _metric, "differences": _differences}
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        with Drawing(path, style):
            figure = picture(findings)
            if figure is not None:
                figure.savefig(path, dpi=110, facecolor="white")
                text = io.StringIO()
                figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
                drawn[name] = _inline(text.getvalue(), name)
    return drawn


def _inline(svg: str, name: str) -> str:
    """Return an SVG file as an element of a page: no prolog, no size, names of its own."""
    body = svg[svg.index("<svg") :]
    head, _, rest = body.partition(">")
    view = next(part for part in head.split('"') if part.startswith("0 0 "))
    rest = rest.replace('id="', f'id="{name}-').replace('"#', f'"#{name}-').replace("url(#", f"url(#{name}-")
    rest = rest[: rest.index("<metadata>")] + rest[rest.index("</metadata>") + len("</metadata>") :]
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg viewBox="{view}" {spaces} role="img" aria-label="{name}">{rest}'


def _figure(width: float, height: float) -> Figure:
    return new_figure(width, height, layout="constrained")


def _names(trials: Sequence[Trial]) -> dict[int, str]:
    """Return what jobs are called, by number: those that differ in their seeds only alike, where there are others."""
    alike = {trial.job.number: in_short(trial.without_seeds) for trial in trials}
    names = alike if len(set(alike.values())) > 1 else {trial.job.number: trial.label for trial in trials}
    return {number: label(name) for number, name in names.items()}


def _colours(names: Mapping[int, str]) -> dict[int, Any]:
    import matplotlib as mpl

    places = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
    if len(places) <= MOST_NAMED:
        return {number: f"C{places[name]}" for number, name in names.items()}
    scale = mpl.colormaps["viridis"]
    return {number: scale(places[name] / (len(places) - 1)) for number, name in names.items()}


def _legend(figure: Figure, axis: Any, trials: Sequence[Trial]) -> None:
    handles, labels = axis.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if len(named) <= MOST_NAMED:
        figure.legend(named.values(), named, loc="outside lower center", ncols=min(3, len(named)), frameon=False)
    else:
        figure.supxlabel(f"{len(trials)} jobs, from the first (dark) to the last (bright)", fontsize=8)


def _losses(findings: Findings) -> Figure | None:
    shown = "val/loss" if findings.axis == "tokens" else findings.metric
    trials = [trial for trial in findings.trials if trial.series("train/loss") or trial.series(shown)]
    if findings.axis != "tokens" and all(len(trial.series(shown)) < 2 for trial in trials):
        return None  # results alone are no curves
    if not trials:
        return None
    figure = _figure(9, 4.4)
    axis = figure.subplots()
    names = _names(trials)
    colours, few = _colours(names), len(trials) <= MOST_NAMED
    for name in dict.fromkeys(names.values()):
        alike = [trial for trial in trials if names[trial.job.number] == name]
        colour = colours[alike[0].job.number]
        if few:  # many would hide what they are about
            for trial in alike:
                axis.plot(*_unzipped(trial.series("train/loss")), color=colour, alpha=0.3, linewidth=0.8)
        points = _mean_of([trial.series(shown) for trial in alike])
        axis.plot(*_unzipped(points), color=colour, label=name, marker="o", markersize=3.5)
    _mark_phases(axis, trials, colours)
    if findings.tokens is not None:
        axis.axvline(findings.tokens, color=GREY, linewidth=2.5, alpha=0.35)
    validated = [value for trial in trials for _, value in trial.series(shown)]
    if (
        validated and findings.axis == "tokens"
    ):  # what comes before the first validation would leave no room for differences
        axis.set_ylim(top=max(validated) + 0.1 * (max(validated) - min(validated)) + 0.05)
    _count_tokens(axis, findings.unit)
    seeds = "" if len(set(names.values())) == len(trials) else ", mean over seeds"
    if findings.axis != "tokens":
        axis.set_ylabel(f"{label(shown)}{seeds}")
    else:
        axis.set_ylabel(f"loss (line: training, dots: validation{seeds})" if few else f"validation loss{seeds}")
    axis.grid(alpha=0.25)
    _legend(figure, axis, trials)
    return figure


def _mean_of(series: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of several curves where all of them have a point."""
    curves = [dict(points) for points in series if points]
    shared = [x for x in curves[0] if all(x in curve for curve in curves)] if curves else []
    return [(x, sum(curve[x] for curve in curves) / len(curves)) for x in shared]


def _unzipped(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _count_tokens(axis: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(unit)


def _mark_phases(axis: Any, trials: Sequence[Trial], colours: dict[int, Any]) -> None:
    """Draw a line where a part of the program is enabled: grey where all jobs agree, else in the job's colour."""
    for height, module in enumerate(dict.fromkeys(module for trial in trials for module in trial.switches)):
        places = {trial.switches[module] for trial in trials if module in trial.switches}
        alike = len(places) == 1
        for trial in trials:
            if module in trial.switches:
                colour = GREY if alike else colours[trial.job.number]
                axis.axvline(trial.switches[module], color=colour, linestyle="--", linewidth=0.9)
                if alike:
                    break
        axis.annotate(
            f" {label(module)} enabled",
            (min(places), 1 - 0.07 * (height + 1)),
            xycoords=("data", "axes fraction"),
            fontsize=8,
        )


def _schedules(findings: Findings) -> Figure | None:
    trials = [trial for trial in findings.trials if trial.scheduled_values]
    names = list(dict.fromkeys(name for trial in trials for name in trial.scheduled_values))
    if not names:
        return None
    figure = _figure(9, 1.0 + 1.35 * len(names))
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    labels = _names(trials)
    colours = _colours(labels)
    for axis, name in zip(axes, names, strict=True):
        for trial in trials:
            points = trial.series(name)
            axis.step(
                [x for x, _ in points],
                [y for _, y in points],
                where="post",
                color=colours[trial.job.number],
                label=labels[trial.job.number],
                linewidth=1.3,
                alpha=0.8,
            )
        axis.set_title(label(name.removeprefix("schedule/")), loc="left", fontsize=9)
        axis.grid(alpha=0.25)
        axis.margins(y=0.15)
    _count_tokens(axes[-1], findings.unit)
    _legend(figure, axes[0], trials)
    return figure


def _metric(findings: Findings) -> Figure | None:
    keys = [key for key in findings.keys if key not in SEEDS]
    if not keys or not findings.values:
        return None
    only_seeds = len(keys) == 1  # jobs with one value differ in nothing else: the interval is that of seeds
    across = min(3, len(keys))
    down = math.ceil(len(keys) / across)
    figure = _figure(9, 0.4 + 2.9 * down)
    axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    for axis, key in zip(axes, keys, strict=False):
        shown = [t for t in findings.trials if t.job.number in findings.values and key in t.settings]
        pairs = [(trial.settings[key], findings.values[trial.job.number]) for trial in shown]
        numeric = all(_as_number(value) is not None for value, _ in pairs)
        names = sorted({value for value, _ in pairs}, key=(lambda v: _as_number(v) or 0.0) if numeric else str)
        place = {value: (_as_number(value) if numeric else float(number)) for number, value in enumerate(names)}
        axis.scatter([place[value] for value, _ in pairs], [y for _, y in pairs], s=22, color="C0", alpha=0.55)
        means, halves = [], []
        for name in names:
            estimate = Estimate.of([y for value, y in pairs if value == name])
            means.append(estimate.mean)
            halves.append(estimate.half_interval or 0.0 if only_seeds else 0.0)
        axis.errorbar(
            [place[name] for name in names],
            means,
            yerr=halves,
            color="C3",
            marker="_",
            linewidth=1,
            capsize=3,
            linestyle="-" if numeric else "none",
        )
        axis.set_xlabel(label(short_key(key)))
        if not numeric:
            axis.set_xticks(list(place.values()), [label(name[:32]) for name in names], rotation=25, ha="right")
        elif len(names) <= 6:
            axis.set_xticks([place[name] for name in names], names)
        axis.grid(alpha=0.25)
    interval = "\nand 95 % interval over seeds" if only_seeds else " of the jobs with that value"
    axes[0].set_ylabel(f"{label(findings.metric)}\n(red: mean{interval})")
    return figure


def _differences(findings: Findings) -> Figure | None:
    """Draw how much more each group has than the reference, seed by seed."""
    groups = findings.compared_groups
    if not findings.has_groups or len(groups) < 2 or max(len(group.by_seed) for group in groups) < 2:
        return None
    groups = groups[:MOST_RANKED]
    reference = findings.reference
    figure = _figure(9, 1.0 + 0.32 * len(groups))
    axis = figure.subplots()
    axis.axvline(0.0, color=GREY, linewidth=1)
    for place, group in enumerate(groups):
        more = group.over(reference)
        if more is None:
            continue
        single = [v - reference.by_seed[seed] for seed, v in group.by_seed.items() if seed in reference.by_seed]
        axis.scatter(single, [place] * len(single), s=18, color="C0", alpha=0.55)
        axis.errorbar(more.mean, place, xerr=more.half_interval or 0.0, color="C3", marker="|", linewidth=1, capsize=3)
    axis.set_yticks(range(len(groups)), [label(group.label) for group in groups])
    axis.invert_yaxis()
    axis.set_xlabel(
        f"{label(findings.metric)} more than {label(findings.compared_with)}, {findings.one_by_one} "
        "(red: mean and 95 % interval)"
    )
    axis.grid(alpha=0.25, axis="x")
    return figure


def _as_number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
