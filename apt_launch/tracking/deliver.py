"""Which projections a run has, and how they are delivered later."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apt_launch.config.load import RunConfig
from apt_launch.config.schema import WandbConfig
from apt_launch.record import read_rows
from apt_launch.runs.build import build
from apt_launch.tracking.projection import Tracking
from apt_model.errors import ConfigError
from apt_model.files import write_json


@dataclass(frozen=True)
class Membership:
    """Which job of which sweep a run is."""

    sweep: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Identity:
    """As what W&B knows a run, and what it needs to know of it; kept in the run's folder.

    ``run_id`` is the same for every resume in that folder, so that W&B continues one run. Under W&B's own sweep agent it is the
    one that the agent names.
    """

    run_id: str
    group: str | None
    job_type: str
    job_tags: tuple[str, ...]
    updates_per_epoch: int

    @classmethod
    def of(cls, config: RunConfig, folder: Path, member: Membership | None) -> Identity:
        """Return that of a run in ``folder``."""
        place = f"{config.identity}:{folder.resolve()}"
        return cls(
            run_id=_agents_run() or f"{config.identity[:8]}-{hashlib.sha256(place.encode()).hexdigest()[:8]}",
            group=member.sweep if member else None,
            job_type="sweep" if member else "train",
            job_tags=member.tags if member else (),
            updates_per_epoch=config.horizon.updates_per_epoch,
        )


def _agents_run() -> str | None:
    """Return the run that W&B's own agent has made for this process, if it is one that the agent started."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def project(tracking: Tracking, config: RunConfig, folder: Path, member: Membership | None) -> None:
    """Show the rows to what the ``logger`` group names."""
    values = config.values["logger"]
    if config.logger.target is None or values["mode"] == "disabled":
        return
    if not isinstance(config.logger, WandbConfig):
        name = config.logger.target.rpartition(".")[2]
        tracking.project(functools.partial(build, values, folder=folder), name=name)
        return
    identity = Identity.of(config, folder, member)
    _path(folder).parent.mkdir(exist_ok=True)
    write_json(_path(folder), asdict(identity))
    make = functools.partial(build, values, folder=folder, config=config.values, **asdict(identity))
    tracking.project(make, name="W&B", remedy=f"Deliver the rest with: python -m apt_launch.sync {folder}")


def deliver(values: dict[str, Any], folder: Path, state: str) -> tuple[int, int]:
    """Show W&B what it has not seen of the run in ``folder``; return for how many steps rows were sent, and for how many not.

    Args:
        values: the run's config.
        state: of the run.

    Raises:
        ConfigError: the run was not logged to W&B.
        wandb.Error: W&B knows no key here, or cannot be reached.
        TimeoutError: it did not take all in time.
    """
    try:
        told = json.loads(_path(folder).read_text(encoding="utf-8"))
        identity = Identity(**{**told, "job_tags": tuple(told["job_tags"])})
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{folder}: this run was not logged to W&B (logger=wandb, logger.mode=offline or online)."
        ) from None
    online = {**values["logger"], "mode": "online"}
    tracker = build(online, folder=folder, config=values, fallback=False, **asdict(identity))
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        tracker.log(row)
    tracker.close(state)
    return tracker.sent, len({row["step"] for row in rows}) - tracker.sent


def _path(folder: Path) -> Path:
    return folder / "wandb" / "apt_launch.json"
