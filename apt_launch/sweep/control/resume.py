"""Resumes a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apt_launch.sweep.application import Application
from apt_launch.sweep.backends.registry import backend
from apt_launch.sweep.control.follow import say
from apt_launch.sweep.control.ledger import Ledger
from apt_launch.sweep.control.send import prepare
from apt_launch.values import changed_keys, flatten, read_frozen, unflatten
from apt_model.errors import ConfigError


def resume(folder: Path, overrides: Sequence[str] = ()) -> int:
    """Send again what failed, was cancelled, or is missing; return how many jobs were sent.

    Args:
        overrides: of keys that cannot change a result, such as ``launch.hours=48``.

    Raises:
        ConfigError: a key cannot change, a job's folder holds another config than the plan, or it is unknown what became
            of a job.
    """
    ledger = Ledger(folder)
    application = ledger.application
    changed = _parsed(overrides, application)
    if refused := sorted(key for key in changed if not application.is_neutral(key)):
        raise ConfigError(
            *(f"{key}: a resume cannot change it, for it would be another run. Start a new sweep." for key in refused)
        )
    statuses = ledger.statuses(rows=False)
    problems = [
        status.summary for status in statuses if status.state == "unknown" and (status.damaged or not status.final)
    ]
    wanted = {s.job.number for s in statuses if s.state in ("failed", "cancelled", "planned", "unknown")}
    jobs = []
    for job in ledger.plan.jobs:
        values = {**ledger.plan.shared, **job.differs}
        if job.number in wanted:
            problems += _differences(folder / job.folder, values, application)
            values |= changed
            resources = application.check(unflatten(values)).resources
            if resources.gpus is None:  # the backend's default, found when the sweep was planned
                resources = replace(resources, gpus=job.resources.gpus)
            job = replace(job, resources=resources)
        jobs.append((job, values))
    if problems:
        raise ConfigError(*problems)
    plan = ledger.plan.with_values(jobs)
    again = [job for job in plan.jobs if job.number in wanted]
    if not again:
        return 0
    where = backend(plan.launcher, plan.launcher_values)
    where.check(replace(plan, jobs=tuple(again)))
    plan.write(folder)
    for job in again:
        (folder / job.folder / "cancel").unlink(missing_ok=True)
    prepare(plan, folder, again)
    for line in where.send(plan, folder, again):
        say(line)
    return len(again)


def _differences(folder: Path, planned: Mapping[str, Any], application: Application) -> list[str]:
    """Return where the config in a job's folder is not the one that was planned."""
    path = folder / "config.yaml"
    if not path.exists():
        return []
    differ = [key for key in changed_keys(flatten(read_frozen(path)), planned) if not application.is_neutral(key)]
    return [f"{key}: {path} says otherwise than plan.yaml. Put it back, or remove the folder." for key in differ]


def _parsed(overrides: Sequence[str], application: Application) -> dict[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(overrides))}
    except HydraException as error:
        raise application.explain(error) from None
