"""Plans the jobs of a sweep, or the one of a run, outside of Hydra's command: for previews and dry runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_launch.sweep.plan.plan import Plan
from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def gather(arguments: Sequence[str], own_options: Path | None = None, *, multirun: bool = False) -> Plan:
    """Plan what ``python -m apt_launch --multirun ARGUMENTS`` would send, or the one job of a run.

    Args:
        own_options: a folder of groups and options, as ``--config-dir`` gives it.
        multirun: whether a sweep is meant also where it has one job.

    Raises:
        ConfigError: a job is wrong, or there is no such folder.
        HydraException: an override that means nothing; see :func:`apt_launch.config.explain.explained`.
    """
    from omegaconf import OmegaConf

    from apt_launch.config import guard
    from apt_launch.config.composing import config_loader
    from apt_launch.config.menu import CONF
    from apt_launch.sweep.application import TRAINER, load
    from apt_launch.sweep.backends.registry import backend_of
    from apt_launch.sweep.control.extend import reused
    from apt_launch.sweep.plan.composer import Composer
    from apt_launch.sweep.plan.expand import Target, of_command
    from apt_launch.sweep.plan.tree import with_tree
    from apt_launch.sweep.plugins import refuse_dropped, register

    if own_options is not None and not os.path.isdir(own_options):  # noqa: PTH112  (Path.is_dir raises where a name is too long)
        raise ConfigError(f"--config-dir: there is no folder {str(own_options)!r} (looked in {Path.cwd()}).")
    register()
    guard.install()
    with config_loader(CONF, own_options) as loader:
        composer = Composer(loader, "config", TRAINER)
        composed: list[DictConfig] = []

        def target(config: DictConfig) -> Target:
            composed.append(config)
            launcher: Any = OmegaConf.to_container(config.hydra.launcher, resolve=True)
            return backend_of(config.hydra.runtime.choices["hydra/launcher"], launcher)

        plan = of_command(arguments, composer=composer, target=target)
        plan = with_tree(plan, load(TRAINER), reused(plan))
        if multirun or plan.asked > 1:
            refuse_dropped(composed[0], load(TRAINER).job_logging())
        return plan
