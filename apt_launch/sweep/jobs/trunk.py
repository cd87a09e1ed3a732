"""The updates that a job has from another one: whether they are there, will come, or will not.

A job begins from an update of another by taking over what that one has kept (see ``Application.graft``). ``graft.json`` in its
folder then says so; from then on it is a job like any other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from apt_launch.sweep.application import Application, Awaited, Fork
from apt_launch.sweep.jobs.state import ENDED, read_state
from apt_model.errors import ConfigError
from apt_model.files import STRICT, read_json, write_json

logger = logging.getLogger(__name__)

GRAFT: Final = "graft.json"

Trunk = Literal["ready", "alone", "to come", "lost"]
"""Of the updates that a job shares: they are there; it trains them itself; somebody is to train them; somebody has failed to."""


@dataclass(frozen=True)
class Graft:
    """The schema of ``graft.json``: how many updates a job has from which other; none: it has trained all of them."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    update: int
    job: str
    sweep: str | None = None


def trunk(application: Application, sweep: Path, fork: Fork) -> Trunk:
    """Return what is known of the updates that ``fork`` asks for; another sweep's are there, or will not come."""
    place = fork.place(sweep)
    if fork.update in application.fork_points(place):
        return "ready"
    if fork.sweep is not None:
        return "alone"
    try:
        state = read_state(place).state
    except ConfigError:  # whoever waits ends no worker; see cause_of_loss
        return "lost"
    if state in ("done", "stopped", "dropped"):  # it has passed them, and could not keep them; or it is not wanted
        return "alone"
    return "lost" if state in ENDED or state == "planned" else "to come"


def cause_of_loss(sweep: Path, fork: Fork) -> str:
    """Return why a job waits whose shared updates are lost."""
    whose = f"job {fork.job.partition('-')[0]}, whose first {fork.update} updates it shares,"
    try:
        state = read_state(fork.place(sweep))
    except ConfigError as error:
        return f"{whose} cannot be asked: {error}"
    what = {"planned": "is planned again, too,", "failed": "failed", "cancelled": "was cancelled"}.get(
        state.state, "is gone"
    )
    return f"{whose} {what} before it had made them. sweep resume sends both"


def take_over(application: Application, folder: Path, values: Mapping[str, Any], fork: Fork) -> None:
    """Have the job in ``folder`` begin from what another has kept; where that cannot be, it trains all updates itself."""
    place, updates = fork.place(folder.parent), 0
    try:
        if trunk(application, folder.parent, fork) == "ready":
            application.graft(folder, values, place, fork.update)
            logger.info("begins at update %d, with those of %s before it", fork.update, place)
            updates = fork.update
    except (ConfigError, OSError) as error:  # what another sweep has may be another user's
        logger.warning("trains its first %d updates itself: %s", fork.update, error)
    has_begun(application, folder, fork, updates)


def has_begun(application: Application, folder: Path, fork: Fork, updates: int) -> None:
    """Note how many updates the job in ``folder`` has from another, which then need not keep them for it."""
    write_json(folder / GRAFT, asdict(Graft(updates, fork.job, fork.sweep)))
    if fork.sweep is None:
        with suppress(ConfigError, OSError):
            place = fork.place(folder.parent)
            if read_state(place).state in ENDED:
                application.prune_forks(place)


def graft_of(folder: Path) -> Graft | None:
    """Return what the job in ``folder`` has taken over; None: nothing yet.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return read_json(folder / GRAFT, Graft, remedy="Remove it: it only says where the first updates come from.")
    except FileNotFoundError:
        return None


def needed(sweep: Path, forks: Sequence[Awaited]) -> set[int]:
    """Return the updates from which a job has yet to begin."""
    return {fork.update for fork in forks if not all((sweep / name / GRAFT).exists() for name in fork.jobs)}


def wait_for_first_rank(folder: Path) -> bool:
    """Wait until the first rank has decided where the job begins; return whether the job runs."""
    while not (folder / GRAFT).exists():
        if read_state(folder).state in (*ENDED, "planned"):
            return False
        time.sleep(0.1)
    return True
