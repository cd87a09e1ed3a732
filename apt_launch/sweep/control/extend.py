"""Lets a sweep grow, and takes first updates from what other jobs have kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from apt_launch.commands import command
from apt_launch.sweep.application import load
from apt_launch.sweep.backends.registry import backend
from apt_launch.sweep.control.follow import say
from apt_launch.sweep.control.ledger import Ledger
from apt_launch.sweep.control.resume import differences
from apt_launch.sweep.control.send import prepare, show_plan
from apt_launch.sweep.jobs.state import ENDED, read_state
from apt_launch.sweep.plan.composer import SEARCHPATH, Composer
from apt_launch.sweep.plan.expand import of_command
from apt_launch.sweep.plan.jobs import key_and_value
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.plan.tree import Source, with_tree
from apt_model.errors import ConfigError


def extend(folder: Path, overrides: Sequence[str], *, dry_run: bool = False) -> int:
    """Plan the sweep in ``folder`` with other values, and send those of its jobs that are new; return how many.

    They begin with the updates that they share with jobs that have ended, as far as those have kept checkpoints, and with each
    other.

    Args:
        overrides: take the place of those of the sweep's command with the same keys.
        dry_run: show the jobs, and change nothing.

    Raises:
        ConfigError: there is no sweep, or a job is wrong.
    """
    plan = Ledger(folder).plan
    application = load(plan.application, plan.program)
    where = backend(plan.launcher, plan.launcher_values)
    given = {key for key, _ in map(key_and_value, overrides)}
    kept = [override for override in plan.command if key_and_value(override)[0] not in given]
    searched = [flag for flag in plan.flags if flag.lstrip("+").startswith(f"{SEARCHPATH}=")]
    with application.composing(plan.flags) as (loader, name):
        asked = of_command(
            [*searched, *kept, *overrides],
            composer=Composer(loader, name, plan.application),
            target=lambda config: where,
        )
    known = {(job.identity, job.resources) for job in plan.jobs}
    new = replace(asked, jobs=tuple(job for job in asked.jobs if (job.identity, job.resources) not in known))
    if not new.jobs:
        return 0
    first = len(plan.jobs)
    grown = with_tree(plan.joined(new), application, [*sources(plan, folder), *reused(new)], first=first)
    added = grown.jobs[first:]
    if dry_run:
        show_plan(replace(grown, jobs=added, asked=asked.asked), folder, where)
        return len(added)
    where.check(replace(grown, jobs=added))
    grown.write(folder)
    rule = prepare(grown, folder, added)
    say(f"sweep {plan.id}: {len(added)} jobs more, {len(asked.jobs) - len(added)} of those asked for are there already")
    for line in (*rule, *where.send(grown, folder, added)):
        say(line)
    if where.detaches:
        say(f"Look at it by: {command('apt_launch.sweep', 'status', folder)}")
    return len(added)


def sources(plan: Plan, folder: Path, *, elsewhere: bool = False) -> list[Source]:
    """Return the jobs of the sweep in ``folder`` that have ended as planned and kept something to begin from.

    Args:
        elsewhere: whether it is another sweep's than the one that is planned.
    """
    application = load(plan.application, plan.program)
    found = []
    for job in plan.jobs:
        own = folder / job.folder
        points = tuple(application.fork_points(own))
        values = {**plan.shared, **job.differs}
        if points and read_state(own).state in ENDED and not differences(own, values, application):
            spec = replace(application.check(plan.values(job)), resources=job.resources)
            found.append(Source(spec, job.folder, points, str(folder.absolute()) if elsewhere else None))
    return found


def reused(plan: Plan) -> list[Source]:
    """Return the jobs of the sweeps that ``launch.reuse`` names.

    Raises:
        ConfigError: there is no sweep, or it is another program's.
    """
    found = []
    for place in sorted({job.spec.reuse for job in plan.jobs if job.spec is not None and job.spec.reuse is not None}):
        folder = Path(place).expanduser()
        try:
            other = Plan.read(folder)
        except ConfigError as error:
            raise ConfigError(f"launch.reuse: {error}") from None
        if other.application != plan.application or other.program is not None:
            raise ConfigError(f"launch.reuse: {folder} is a sweep of another program.")
        found += sources(other, folder, elsewhere=True)
    return found
