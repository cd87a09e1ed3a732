"""What a sweep asks of a backend: of what runs jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from apt_launch.sweep.jobs.state import ObservedState, State
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan


class Backend(Protocol):
    """Runs jobs: this machine, or a cluster."""

    name: str
    values: dict[str, Any]
    detaches: bool  # the command returns once the jobs are sent

    def has_gpus(self) -> bool:
        """Return whether jobs can have GPUs there."""

    def check(self, plan: Plan) -> None:
        """Raise ConfigError if a job could never run there."""

    def send(self, plan: Plan, folder: Path, jobs: Sequence[Job]) -> list[str]:
        """Send ``jobs``, whose folders are ready; return lines for the user."""

    def poll(self, folder: Path, jobs: Mapping[str, State]) -> dict[str, ObservedState]:
        """Return the observed states of ``jobs``, by folder, none of which has ended by its own account."""

    def cancel(self, folder: Path, jobs: Mapping[str, State], *, whole: bool = True) -> None:
        """Stop ``jobs``; return when none of them runs. ``whole``: nothing else of the sweep shall run either."""
