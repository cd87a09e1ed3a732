"""Which projections a run has, and how they are delivered later."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apt_launch.build import build
from apt_launch.config import RunConfig
from apt_launch.folder import write_json
from apt_launch.schema import WandbConfig
from apt_launch.tracking import Tracking, read_rows
from apt_model.errors import ConfigError


@dataclass(frozen=True)
class Membership:
    """Which job of which sweep a run is."""

    sweep: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Identity:
    """As what W&B knows a run."""

    run_id: str
    group: str | None
    job_type: str
    job_tags: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig, folder: Path, member: Membership | None) -> Identity:
        """Return that of a run in ``folder``."""
        place = f"{config.identity}:{folder.resolve()}"
        return cls(
            run_id=f"{config.identity[:8]}-{hashlib.sha256(place.encode()).hexdigest()[:8]}",
            group=member.sweep if member else None,
            job_type="sweep" if member else "train",
            job_tags=member.tags if member else (),
        )


def project(tracking: Tracking, config: RunConfig, folder: Path, member: Membership | None) -> None:
    """Show the rows to what the ``logger`` group names."""
    if config.logger.target is None or config.values["logger"]["mode"] == "disabled":
        return
    identity = Identity.of(config, folder, member)
    remedy = ""
    if isinstance(config.logger, WandbConfig):
        _path(folder).parent.mkdir(exist_ok=True)
        write_json(_path(folder), asdict(identity))
        remedy = f"Deliver the rest with: python -m apt_launch.sync {folder}"
    tracking.project(
        functools.partial(build, config.values["logger"], **_injected(config, folder, identity)), remedy=remedy
    )


def deliver(config: RunConfig, folder: Path, state: str) -> tuple[int, int]:
    """Show W&B what it has not seen of the run in ``folder``; return for how many steps rows were sent, and for how many not.

    Raises:
        ConfigError: the run was not logged to W&B, or W&B knows no key here.
        wandb.Error: W&B cannot be reached.
    """
    if not isinstance(config.logger, WandbConfig) or config.logger.mode == "disabled":
        raise ConfigError(f"{folder}: this run was not logged to W&B (logger=wandb, logger.mode=offline or online).")
    told = json.loads(_path(folder).read_text(encoding="utf-8"))
    identity = Identity(**{**told, "job_tags": tuple(told["job_tags"])})
    values = {**config.values["logger"], "mode": "online"}
    tracker = build(values, **_injected(config, folder, identity), fallback=False)
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        tracker.log(row)
    tracker.close(state)
    return tracker.sent, len({row["step"] for row in rows}) - tracker.sent


def _path(folder: Path) -> Path:
    return folder / "wandb" / "apt_launch.json"


def _injected(config: RunConfig, folder: Path, identity: Identity) -> dict[str, Any]:
    injected: dict[str, Any] = {"folder": folder}
    if isinstance(config.logger, WandbConfig):
        injected |= {"config": config.values, "updates_per_epoch": config.horizon.updates_per_epoch, **asdict(identity)}
    return injected
