"""How W&B knows a run, and how rows are delivered to it later."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from apt_launch.record import read_rows
from apt_launch.tracking.projection import Tracker
from apt_model.errors import ConfigError
from apt_model.files import read_json, write_json


@dataclass(frozen=True)
class Membership:
    """Which job of which sweep a run is."""

    sweep: str
    tags: tuple[str, ...] = ()
    judge: Callable[[Mapping[str, float]], bool] | None = None
    """Called with each row of the record; True: the run ends here, as one of the sweep's losers."""


@dataclass(frozen=True)
class Identity:
    """A run as W&B knows it; kept in the run's folder.

    ``run_id`` is the same for every resume in that folder, so that W&B continues one run. Under W&B's own sweep agent it is the
    one that the agent names.
    """

    run_id: str
    group: str | None
    job_type: str
    job_tags: tuple[str, ...]
    updates_per_epoch: int

    @classmethod
    def of(cls, identity: str, folder: Path, member: Membership | None, updates_per_epoch: int) -> Identity:
        """Return that of the run in ``folder`` whose config has ``identity``."""
        place = f"{identity}:{folder.resolve()}"
        return cls(
            run_id=_agents_run() or f"{identity[:8]}-{hashlib.sha256(place.encode()).hexdigest()[:8]}",
            group=member.sweep if member else None,
            job_type="sweep" if member else "train",
            job_tags=member.tags if member else (),
            updates_per_epoch=updates_per_epoch,
        )

    @classmethod
    def read(cls, folder: Path) -> Identity:
        """Return that of the run in ``folder``.

        Raises:
            ConfigError: the run was not logged to W&B, or the file is damaged.
        """
        try:
            return read_json(_path(folder), cls, remedy="Resume the run, which writes it anew.")
        except FileNotFoundError:
            raise ConfigError(
                f"{folder}: this run was not logged to W&B (logger=wandb, logger.mode=offline or online)."
            ) from None

    def write(self, folder: Path) -> None:
        """Keep it in the folder of its run."""
        _path(folder).parent.mkdir(exist_ok=True)
        write_json(_path(folder), asdict(self))


def _agents_run() -> str | None:
    """Return the run that W&B's own agent has made for this process, if it is one that the agent started."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


@dataclass(frozen=True)
class Summary:
    """The schema of ``summary.json``, as far as a delivery reads it."""

    state: Literal["running", "done", "failed", "interrupted", "stopped"]


class Delivery(Tracker, Protocol):
    """A tracker that counts what it sent."""

    sent: int


def deliver(make: Callable[..., Delivery], folder: Path, state: str) -> tuple[int, int]:
    """Show W&B what it has not seen of the run in ``folder``; return for how many steps rows were sent, and for how many not.

    Args:
        make: builds the tracker, called with the fields of :class:`Identity`.
        state: of the run.

    Raises:
        ConfigError: the run was not logged to W&B.
        wandb.Error: W&B knows no key here, or cannot be reached.
        TimeoutError: it did not take all in time.
    """
    tracker = make(**asdict(Identity.read(folder)))
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        tracker.log(row)
    tracker.close(state)
    return tracker.sent, len({row["step"] for row in rows}) - tracker.sent


def _path(folder: Path) -> Path:
    return folder / "wandb" / "apt_launch.json"
