"""Cancels a sweep."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from apt_launch.sweep.backends.registry import backend
from apt_launch.sweep.control.ledger import Ledger, Status
from apt_launch.sweep.jobs.state import ENDED, read_state, transition
from apt_model.errors import ConfigError


def cancel(folder: Path) -> list[Status]:
    """Cancel every job of the sweep that has not ended; return the states when none of its jobs runs any more.

    Raises:
        ConfigError: there is no sweep, the cluster does not answer, or a job's folder is a link; all others are cancelled then.
    """
    ledger = Ledger(folder)
    not_ended = {}
    for job in ledger.plan.jobs:
        with suppress(ConfigError):  # a damaged state hides no other job; the table names it
            if (state := read_state(folder / job.folder)).state not in ENDED:
                not_ended[job.folder] = state
    sent = {name: state for name, state in not_ended.items() if state.state != "planned"}
    if sent:
        backend(ledger.plan.launcher, ledger.plan.launcher_values).cancel(folder, sent)
    problems: list[str] = []
    for name in not_ended:
        try:
            transition(folder / name, "cancelled", cause="on request")
        except ConfigError as error:  # it keeps no other job from being cancelled
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return ledger.statuses()
