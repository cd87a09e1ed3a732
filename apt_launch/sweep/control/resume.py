"""Resumes a sweep."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from apt_launch.sweep.application import Application
from apt_launch.sweep.backends.registry import backend
from apt_launch.sweep.control.follow import say
from apt_launch.sweep.control.ledger import Ledger
from apt_launch.sweep.control.send import prepare
from apt_launch.sweep.jobs.halving import overrule
from apt_launch.sweep.jobs.state import CANCEL
from apt_launch.sweep.plan.composer import TYPED, typed_secret
from apt_launch.sweep.programs.secrets import SECRETS
from apt_launch.values import changed_keys, flatten, read_frozen, unflatten
from apt_model.errors import ConfigError


def resume(folder: Path, overrides: Sequence[str] = (), numbers: Sequence[int] = ()) -> int:
    """Send again what failed, was cancelled, or is missing; return how many jobs were sent.

    Args:
        overrides: of keys that cannot change a result, such as ``launch.hours=48``.
        numbers: the jobs, also those that were dropped or stopped as losers; empty: all others. A setting of which a job is
            resumed that was stopped goes on where it was judged.

    Raises:
        ConfigError: there is no such job, a key cannot change, a job's folder holds another config than the plan, or it is
            unknown what became of a job.
    """
    ledger = Ledger(folder)
    ledger.plan.check_numbers(numbers)
    application = ledger.application
    if application.trusts_folder:
        refuse_shared(folder, [job.folder for job in ledger.plan.jobs])
    changed = flatten(_parsed(overrides, application))
    if refused := sorted(key for key in changed if not application.is_neutral(key)):
        raise ConfigError(
            *(f"{key}: a resume cannot change it, for it would be another run. Start a new sweep." for key in refused)
        )
    statuses = ledger.statuses(rows=False)
    problems = [
        status.summary for status in statuses if status.state == "unknown" and (status.damaged or not status.final)
    ]
    again_from = ("failed", "cancelled", "planned", "unknown", *(("dropped", "stopped") if numbers else ()))
    wanted = {s.job.number for s in statuses if s.state in again_from and (not numbers or s.job.number in numbers)}
    jobs = []
    for job in ledger.plan.jobs:
        values = {**ledger.plan.shared, **job.differs}
        if job.number in wanted:
            problems += differences(folder / job.folder, values, application)
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
    prepare(plan, folder, again)
    for job in again:
        (folder / job.folder / CANCEL).unlink(missing_ok=True)
        if numbers:
            overrule(folder, job.folder)
    for line in where.send(plan, folder, again):
        say(line)
    return len(again)


def differences(folder: Path, planned: Mapping[str, Any], application: Application) -> list[str]:
    """Return where the config in a job's folder is not the one that was planned."""
    path = folder / "config.yaml"
    if not path.exists():
        return []
    differ = [key for key in changed_keys(flatten(read_frozen(path)), planned) if not application.is_neutral(key)]
    return [f"{key}: {path} says otherwise than plan.yaml. Put it back, or remove the folder." for key in differ]


def refuse_shared(folder: Path, jobs: Sequence[str]) -> None:
    """Make sure that nobody else can have written what the jobs of the sweep in ``folder`` will run.

    Raises:
        ConfigError: a folder or a file belongs to somebody else, or others may write to it.
    """
    for path in (folder, folder / "plan.yaml", *(folder / name for name in jobs), folder / "code", folder / SECRETS):
        try:
            about = path.lstat()
        except FileNotFoundError:
            continue
        if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            whose = "belongs to another user" if about.st_uid != os.getuid() else "may be written to by others"
            raise ConfigError(
                f"{path}: it {whose}, and it says which program the jobs run. Look at what is in it, and take the right away: "
                f"chmod -R go-w {folder}"
            )


def _parsed(overrides: Sequence[str], application: Application) -> dict[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise application.explain(error) from None
    if application.trusts_folder and (typed := list(filter(None, map(typed_secret, parsed)))):
        raise ConfigError(*(TYPED.format(key=key) for key in typed))
    return {o.key_or_group: o.value() for o in parsed}
