"""Cancels a sweep, or jobs of it; drops jobs from it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from apt_launch.sweep.backends.registry import backend
from apt_launch.sweep.control.ledger import Ledger, Status
from apt_launch.sweep.jobs.state import ENDED, read_state, transition
from apt_model.errors import ConfigError


def cancel(folder: Path, numbers: Sequence[int] = ()) -> list[Status]:
    """Cancel jobs of the sweep that have not ended; return all states when none of those runs any more.

    Args:
        numbers: the jobs; empty: all.

    Raises:
        ConfigError: there is no sweep or no such job, the cluster does not answer, or a job's folder is a link; all others are
            cancelled then.
    """
    ledger = Ledger(folder)
    ledger.plan.check_numbers(numbers)
    not_ended = {}
    for job in ledger.plan.jobs:
        if numbers and job.number not in numbers:
            continue
        with suppress(ConfigError):  # a damaged state hides no other job; the table names it
            if (state := read_state(folder / job.folder)).state not in ENDED:
                not_ended[job.folder] = state
    sent = {name: state for name, state in not_ended.items() if state.state != "planned"}
    if sent:
        where = backend(ledger.plan.launcher, ledger.plan.launcher_values)
        where.cancel(folder, sent, whole=not numbers)
    problems: list[str] = []
    for name in not_ended:
        try:
            transition(folder / name, "cancelled", cause="on request")
        except ConfigError as error:  # it keeps no other job from being cancelled
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return ledger.statuses()


def drop(folder: Path, numbers: Sequence[int]) -> list[Status]:
    """Cancel jobs, and leave them out from now on: they are not resumed, waited for or reported. Their files stay.

    Raises:
        ConfigError: see :func:`cancel`.
    """
    cancel(folder, numbers)
    ledger = Ledger(folder)
    for job in ledger.plan.jobs:
        if job.number in numbers:
            transition(folder / job.folder, "dropped", cause="on request")
    return ledger.statuses()
