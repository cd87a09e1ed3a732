"""Makes the rule of a sweep whose losers end early, from its plan; see :mod:`apt_launch.sweep.jobs.halving`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from apt_launch.sweep.application import Application, JobSpec
from apt_launch.sweep.jobs.halving import RULE, Rule, Setting
from apt_launch.sweep.options import StopConfig, share_of, updates_of
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_model.files import write_json


def rule_of(plan: Plan, application: Application, stop: StopConfig | None) -> Rule | None:
    """Return where each setting of the sweep is judged; None: nowhere, for ``stop`` names no rungs.

    No setting is judged before it differs from every other one, and ``stop.grace`` more updates.
    """
    if stop is None or not stop.rungs:
        return None
    groups = _settings(plan.jobs, stop)
    specs = {name: _spec(plan, jobs[0], application) for name, jobs in groups.items()}
    shared = dict.fromkeys(groups, 0)
    for place, name in enumerate(groups):
        for other in list(groups)[place + 1 :]:
            updates = application.shared_updates(specs[name], specs[other])
            shared[name], shared[other] = max(shared[name], updates), max(shared[other], updates)
    settings = tuple(
        Setting(name, tuple(job.folder for job in jobs), rungs(stop, specs[name].steps, shared[name]), shared[name])
        for name, jobs in groups.items()
    )
    return Rule(stop.metric, application.direction, application.axis, str(share_of(stop.keep)), settings)


def rungs(stop: StopConfig, steps: int, shared: int) -> tuple[int, ...]:
    """Return after how many of a job's ``steps`` updates its setting is judged, which has ``shared`` with another one.

    Args:
        steps: 0: nobody knows.
    """
    first = max(1, shared + updates_of(stop.grace, steps))
    places = {max(first, updates_of(rung, steps)) for rung in stop.rungs}
    return tuple(sorted(place for place in places if place < steps or not steps))


def rule_for(plan: Plan, application: Application, jobs: Sequence[Job]) -> Rule | None:
    """Return what ``jobs``, which are about to be sent, have to know of the rule of their sweep."""
    return rule_of(plan, application, _spec(plan, jobs[0], application).stop) if jobs else None


def write_rule(folder: Path, rule: Rule | None) -> list[str]:
    """Write the rule for who follows it; return lines for the user."""
    if rule is None:
        (folder / RULE).unlink(missing_ok=True)
        return []
    write_json(folder / RULE, asdict(rule))
    return described(rule)


def described(rule: Rule) -> list[str]:
    """Return in words where settings are judged."""
    by_rungs: dict[tuple[int, ...], list[Setting]] = {}
    for setting in rule.settings:
        by_rungs.setdefault(setting.rungs, []).append(setting)
    lines = []
    for places, settings in by_rungs.items():
        who = "all settings" if len(by_rungs) == 1 else ", ".join(setting.name for setting in settings)
        shared = max(setting.shared for setting in settings)
        first = f"the first {shared} updates are those" if shared > 1 else "the first update is that"
        differ = f" ({first} of another setting)" if shared else ""
        if places:
            *before, last = map(str, places)
            where = f"after updates {', '.join(before)} and {last}" if before else f"after update {last}"
            lines.append(f"losers: {who} judged by {rule.metric} {where}{differ}; the best {rule.keep} go on")
        else:
            lines.append(f"losers: {who} never judged, for no rung is left before the end{differ}")
    return lines


def _settings(jobs: Sequence[Job], stop: StopConfig) -> dict[str, list[Job]]:
    """Return the jobs by their settings, each with the name of what distinguishes it."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        distinct = job.settings if stop.group is None else job.without_seeds
        groups.setdefault(" ".join(f"{key}={value}" for key, value in distinct.items()) or "all", []).append(job)
    return groups


def _spec(plan: Plan, job: Job, application: Application) -> JobSpec:
    """Return a job's checked config, which the process that planned it still has."""
    return job.spec if job.spec is not None else application.check(plan.values(job))
