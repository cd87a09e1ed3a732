"""Lets a sweep grow, and takes first updates from what other jobs have kept."""

from __future__ import annotations

from pathlib import Path

from apt_launch.sweep.application import load
from apt_launch.sweep.jobs.state import ENDED, read_state
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.plan.tree import Source
from apt_launch.values import read_frozen
from apt_model.errors import ConfigError


def sources(plan: Plan, folder: Path, *, elsewhere: bool = False) -> list[Source]:
    """Return the jobs of the sweep in ``folder`` that have ended and kept something to begin from.

    Args:
        elsewhere: whether it is another sweep's than the one that is planned.
    """
    application = load(plan.application, plan.program)
    found = []
    for job in plan.jobs:
        own = folder / job.folder
        points = tuple(application.fork_points(own))
        if points and read_state(own).state in ENDED:
            spec = application.check(read_frozen(own / "config.yaml"))
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
