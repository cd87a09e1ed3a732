"""Which services are shown the rows of a run."""

from __future__ import annotations

import functools
import logging
from dataclasses import asdict
from pathlib import Path

from apt_launch.commands import command
from apt_launch.config.instantiate import build, factory
from apt_launch.config.own import takes
from apt_launch.config.run_config import RunConfig
from apt_launch.config.schema import OwnLoggerConfig, WandbConfig
from apt_launch.tracking.deliver import Identity, Membership
from apt_launch.tracking.once import OnceEach
from apt_launch.tracking.projection import Tracking
from apt_launch.tracking.wandb import mode_of

logger = logging.getLogger(__name__)


def project(tracking: Tracking, config: RunConfig, folder: Path, member: Membership | None) -> None:
    """Show the rows to what the ``logger`` group names."""
    values = config.values["logger"]
    if config.logger.target is None or values.get("mode") == "disabled":
        return
    if isinstance(config.logger, OwnLoggerConfig):
        name = config.logger.target.rpartition(".")[2]
        tracking.project(functools.partial(_own, config, folder), name=name)
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


def _own(config: RunConfig, folder: Path) -> OnceEach:
    """Build the user's own logger, with what it takes of what a run knows."""
    make = factory(config.values["logger"])
    known = {"folder": folder, "config": config.values, "identity": config.identity}
    return OnceEach(make(**{name: value for name, value in known.items() if takes(make.func, name)}), folder)
