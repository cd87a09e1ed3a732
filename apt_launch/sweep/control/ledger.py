"""How far a sweep is: what its jobs wrote, and what the machine or the cluster knows. What nobody knows is ``unknown``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, Literal

from apt_launch.record import last_row
from apt_launch.sweep.lease import read_holder
from apt_launch.sweep.plan.plan import Job, Plan
from apt_model.files import write_json
from apt_model.schedule.rows import modules_on

Name = Literal[
    "planned", "submitted", "pending", "running", "preempted", "requeued", "failed", "cancelled", "done", "unknown"
]

ENDED: Final = frozenset({"failed", "cancelled", "done"})
"""States that do not change by themselves."""


@dataclass(frozen=True)
class State:
    """A job's ``state.json``: what the job, or who sent it, last wrote."""

    state: Name = "planned"
    job_id: str | None = None  # SLURM's, or the worker's process
    restarts: int = 0  # lives before this one
    since: str = ""  # when the state began
    seconds: float = 0.0  # taken by the lives before this one
    cause: str | None = None
    loss: float | None = None


def read_state(folder: Path) -> State:
    """Return the state that ``folder`` has; ``planned`` where nothing is written yet."""
    try:
        return State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return State()


def write_state(folder: Path, state: State) -> State:
    """Write ``state`` with the time of now, whole or not at all; return it."""
    dated = replace(state, since=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "state.json", asdict(dated))
    return dated


@dataclass(frozen=True)
class Seen:
    """What the machine or the cluster says of a job; ``final``: it will never say anything else."""

    state: Name
    cause: str | None = None
    final: bool = False


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
    age: float | None = None  # seconds since its last sign of life
    final: bool = False  # the state will not change by itself

    @property
    def told(self) -> str:
        """What happened to it, in a sentence."""
        return f"job {self.job.number} ({self.job.label}) {self.state}: {self.cause or 'no cause is known'}"


class Ledger:
    """The book of the sweep in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = Plan.read(folder)

    def statuses(self, *, rows: bool = True) -> list[Status]:
        """Return what is known of each job now; ``rows``: also the last row of its record."""
        from apt_launch.sweep.control.send import place

        written = {job.folder: read_state(self.folder / job.folder) for job in self.plan.jobs}
        open_ones = {name: state for name, state in written.items() if state.state not in (*ENDED, "planned")}
        true = place(self.plan.launcher, self.plan.launcher_values).look(self.folder, open_ones) if open_ones else {}
        found = []
        for job in self.plan.jobs:
            folder = self.folder / job.folder
            state = written[job.folder]
            seen = true.get(job.folder, Seen(state.state, state.cause, final=state.state in ENDED))
            if job.folder in true:
                again = read_state(folder)
                if again.state in ENDED:  # it ended while we asked
                    state, seen = again, Seen(again.state, again.cause, final=True)
                elif seen.state in ENDED:  # a cluster may forget it: we keep it
                    write_state(folder, replace(again, state=seen.state, cause=seen.cause))
            found.append(
                Status(
                    job=job,
                    folder=folder,
                    state=seen.state,
                    cause=seen.cause,
                    loss=state.loss,
                    job_id=state.job_id,
                    restarts=state.restarts,
                    row=last_row(folder / "metrics.jsonl") if rows else {},
                    age=_age(folder),
                    final=seen.final,
                )
            )
        return found


def _age(folder: Path) -> float | None:
    times = []
    for name in ("metrics.jsonl", "lease.json", "state.json"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(0.0, time.time() - max(times)) if times else None


def holder_is_alive(folder: Path) -> bool | None:
    """Say whether the process that writes into a job's folder lives; None: it cannot be known from here."""
    holder = read_holder(folder / "lease.json")
    return False if holder is None else holder.alive


def phase(row: Mapping[str, Any]) -> str:
    """Return the modules that are on, as the curriculum's phase."""
    return "+".join(modules_on(row)) or "dense"
