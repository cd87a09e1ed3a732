"""How far a sweep is: what its jobs wrote, and what the machine or the cluster says. Reading changes no file.

What cannot be found out is ``unknown``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from apt_launch.record import Tail, read_tail
from apt_launch.sweep.application import load
from apt_launch.sweep.backends.registry import backend
from apt_launch.sweep.jobs.state import ENDED, Name, ObservedState, State, read_state, transition
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError


@dataclass(frozen=True)
class Status:
    """What is known of a job: its true state, and how far it came."""

    job: Job
    folder: Path
    state: Name
    cause: str | None = None
    loss: float | None = None
    job_id: str | None = None
    restarts: int = 0
    row: Mapping[str, float] = field(default_factory=dict)  # the last of its record
    phase: str | None = None  # of that row; None: it has none
    age: float | None = None  # seconds since it was last seen
    final: bool = False  # the state will not change by itself
    damaged: bool = False  # a file of the job cannot be read: the state is unknown, and ``cause`` names the file
    damaged_rows: int = 0  # of its record, as far as it was read
    remark: str | None = None  # about those

    @property
    def summary(self) -> str:
        """What happened to it, in a sentence."""
        return f"job {self.job.number} ({self.job.label}) {self.state}: {self.cause or 'no cause is known'}"


class Ledger:
    """Reads the states of the sweep in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = Plan.read(folder)
        self.application = load(self.plan.application, self.plan.program)

    def statuses(self, *, rows: bool = True) -> list[Status]:
        """Return what is known of each job now; ``rows``: also the last row of its record."""
        written: dict[str, State] = {}
        damaged: dict[str, str] = {}
        for job in self.plan.jobs:
            try:
                written[job.folder] = read_state(self.folder / job.folder)
            except ConfigError as error:  # it hides no other job
                damaged[job.folder] = str(error)
        running = {name: state for name, state in written.items() if state.state not in (*ENDED, "planned")}
        observed: dict[str, ObservedState] = {}
        if running:
            observed = backend(self.plan.launcher, self.plan.launcher_values).poll(self.folder, running)
        found = []
        for job in self.plan.jobs:
            folder = self.folder / job.folder
            record = folder / "metrics.jsonl"
            tail = Tail({}, 0, 0)
            try:
                tail = read_tail(record) if rows else tail
            except ConfigError as error:
                damaged.setdefault(job.folder, str(error))
            if job.folder in damaged:
                found.append(
                    Status(job, folder, "unknown", damaged[job.folder], age=_age(folder), final=True, damaged=True)
                )
                continue
            state = written[job.folder]
            seen = ObservedState(state.state, state.cause, final=state.state in ENDED)
            if job.folder in observed:
                seen = observed[job.folder]
                with suppress(ConfigError):  # the next poll reports it
                    state = read_state(folder)
                if state.state in ENDED:  # it ended while the backend was asked
                    seen = ObservedState(state.state, state.cause, final=True)
            found.append(
                Status(
                    job=job,
                    folder=folder,
                    state=seen.state,
                    cause=seen.cause,
                    loss=state.loss,
                    job_id=state.job_id,
                    restarts=state.restarts,
                    row=tail.row,
                    phase=self.application.phase(tail.row) if tail.row else None,
                    age=_age(folder),
                    final=seen.final,
                    damaged_rows=tail.damaged,
                    remark=damaged_rows(record, tail.damaged, tail.lines),
                )
            )
        return found


def damaged_rows(record: Path, damaged: int, read: int) -> str | None:
    """Return a remark about the lines of a record that were left out, of the last that were ``read``; None: there are none."""
    if not damaged:
        return None
    return f"{record}: {damaged} of its last {read} lines are damaged, and left out."


def record_ends(statuses: Sequence[Status]) -> None:
    """Write the ends of jobs that could not write them, for clusters forget: only commands that act on a sweep do so."""
    for status in statuses:
        if status.final and status.state in ENDED and read_state(status.folder).state not in ENDED:
            transition(status.folder, status.state, cause=status.cause)


def _age(folder: Path) -> float | None:
    times = []
    for name in ("metrics.jsonl", "lease.json", "state.json"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(0.0, time.time() - max(times)) if times else None
