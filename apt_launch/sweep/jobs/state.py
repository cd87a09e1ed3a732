"""``state.json``: the state of a job, as the job or its sender last wrote it. :func:`transition` is its only writer."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from apt_model.files import STRICT, from_json, read_regular, refuse_link, refuse_newer, touch, write_json

Name = Literal[
    "planned",
    "submitted",
    "pending",
    "running",
    "preempted",
    "requeued",
    "failed",
    "cancelled",
    "done",
    "stopped",
    "dropped",
    "unknown",
]

ENDED: Final[frozenset[Name]] = frozenset({"failed", "cancelled", "done", "stopped", "dropped"})
"""States that do not change by themselves."""

WAITING: Final[frozenset[Name]] = frozenset({"planned", "submitted", "pending"})
"""States of jobs that have never run."""

TRANSITIONS: Final[dict[Name, frozenset[Name]]] = {
    "planned": frozenset({"submitted", "running", "preempted", "failed", "cancelled", "dropped"}),
    "submitted": frozenset({"planned", "submitted", "running", "preempted", "failed", "cancelled"}),
    # to planned: another job has failed to make the updates that it was to begin with
    # to running: a cluster started it again without notice; to submitted: it was killed without notice, and is resumed
    "running": frozenset({"submitted", "running", "preempted", "requeued", "failed", "cancelled", "done", "stopped"}),
    "preempted": frozenset({"planned", "submitted", "running", "preempted", "requeued", "failed", "cancelled"}),
    "requeued": frozenset({"planned", "submitted", "running", "preempted", "requeued", "failed", "cancelled"}),
    # a cluster may start a job again whatever became of it
    "failed": frozenset({"submitted", "running", "dropped"}),
    "cancelled": frozenset({"submitted", "running", "dropped"}),
    "done": frozenset({"running", "dropped"}),
    "stopped": frozenset(
        {"submitted", "running", "dropped"}
    ),  # a loser that somebody wants all the same, by its number
    "dropped": frozenset({"submitted"}),  # somebody wants it again, by its number
}
"""To which states each one may change. ``pending`` and ``unknown`` are only observed, never written."""


VERSION: Final = 1
"""Of the format, see docs/reference/files.md; a file that names none is of the first."""

CANCEL: Final = "cancel"
"""The file by which a job is asked to stop for good."""


@dataclass(frozen=True)
class State:
    """The content of ``state.json``, and its schema."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    state: Name
    job_id: str | None = None  # SLURM's, or the local worker's name
    restarts: int = 0  # attempts before this one
    since: str = ""  # when the state began
    seconds: float = 0.0  # taken by the attempts before this one
    cause: str | None = None
    loss: float | None = None  # not a number, too: what a run that diverged has
    version: int = VERSION

    def __post_init__(self) -> None:
        """Raise ValueError for values that no job writes."""
        if not 1 <= self.version <= VERSION:
            raise ValueError(f"its version cannot be {self.version}")
        if not 0 <= self.restarts < 1 << 31 or not 0 <= self.seconds < math.inf:
            raise ValueError("restarts and seconds cannot be negative or endless")


@dataclass(frozen=True)
class ObservedState:
    """What the machine or the cluster says of a job; ``final``: it will never say anything else."""

    state: Name
    cause: str | None = None
    final: bool = False


def read_state(folder: Path) -> State:
    """Return the state of the job in ``folder``; ``planned`` where nothing is written yet.

    Raises:
        ConfigError: it is damaged, or of a later version.
    """
    path = folder / "state.json"
    remedy = "Nobody knows what became of the job. Remove the file: sweep resume then runs it, from its checkpoint."
    try:
        text = read_regular(path)
    except FileNotFoundError:
        return State("planned")
    with suppress(ValueError, RecursionError):  # damaged, as its schema says better
        refuse_newer(json.loads(text), VERSION, str(path))
    return from_json(text, State, where=str(path), remedy=remedy)


def is_allowed(before: Name, after: Name) -> bool:
    """Return whether a job may change from the state ``before`` to ``after``."""
    return after in TRANSITIONS.get(before, frozenset())


def transition(
    folder: Path,
    to: Name,
    *,
    expected: Name | None = None,
    cause: str | None = None,
    loss: float | None = None,
    job_id: str | None = None,
    restarts: int | None = None,
    seconds: float | None = None,
) -> State:
    """Change the state of the job in ``folder``, with the current time, and return it.

    A job that has ended stays as it is: of a job that ends while it is cancelled the first word counts. The state that stands
    is returned.

    Args:
        expected: change from this state only; another one stays.
        job_id: None: as before, and so ``restarts`` and ``seconds``; empty: not known yet.

    Raises:
        ConfigError: the folder is a link.
        ValueError: no job may change like that.
    """
    before = read_state(folder)
    if (expected is not None and before.state != expected) or (
        before.state in ENDED and not is_allowed(before.state, to)
    ):
        return before
    if not is_allowed(before.state, to):
        raise ValueError(f"{folder}: a job cannot change from {before.state} to {to}")
    after = State(
        state=to,
        job_id=before.job_id if job_id is None else job_id or None,
        restarts=before.restarts if restarts is None else restarts,
        since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=before.seconds if seconds is None else seconds,
        cause=cause,
        loss=loss,
    )
    refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "state.json", {"version": VERSION, **asdict(after)})
    return after


def ask_to_cancel(folder: Path) -> None:
    """Note that the job in ``folder`` is to stop for good.

    Raises:
        ConfigError: the folder, or the note in it, is a link.
    """
    refuse_link(folder)
    touch(folder / CANCEL)


def wants_cancel(folder: Path) -> bool:
    """Return whether somebody asked the job to stop for good."""
    return (folder / CANCEL).exists()
