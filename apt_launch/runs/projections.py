"""Which services are shown the rows of a run."""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict
from pathlib import Path

from apt_launch.commands import command
from apt_launch.config.instantiate import build
from apt_launch.config.run_config import RunConfig
from apt_launch.config.schema import WandbConfig
from apt_launch.tracking.deliver import Identity, Membership
from apt_launch.tracking.projection import Tracking
from apt_launch.tracking.wandb import mode_of

logger = logging.getLogger(__name__)


def project(tracking: Tracking, config: RunConfig, folder: Path, member: Membership | None) -> None:
    """Show the rows to what the ``logger`` group names."""
    values = config.values["logger"]
    if config.logger.target is None or values["mode"] == "disabled":
        return
    if not isinstance(config.logger, WandbConfig):
        name = config.logger.target.rpartition(".")[2]
        tracking.project(functools.partial(build, values, folder=folder), name=name)
        return
    mode, variable = mode_of(values["mode"])
    if variable is not None:
        logger.info("W&B: %s, as %s says in the environment (logger.mode is %s).", mode, variable, values["mode"])
    if mode == "disabled":
        return
    identity = Identity.of(config.identity, folder, member, config.horizon.updates_per_epoch)
    identity.write(folder)
    make = functools.partial(build, {**values, "mode": mode}, folder=folder, config=config.values, **asdict(identity))
    tracking.project(make, name="W&B", remedy=f"Deliver the rest with: {command('apt_launch.sync', folder)}")
