"""From what Hydra composed to a config that is known to be right. Nothing here loads torch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from apt_launch.config.checks import check_curriculum, check_together, missing_libraries
from apt_launch.config.corpus import Counts, plan_horizon
from apt_launch.config.menu import CONF as CONF
from apt_launch.sweep.values import flatten
from apt_model.errors import ConfigError, nearest, validated

if TYPE_CHECKING:
    from apt_launch.config import schema
    from apt_model.schedule import Horizon, Program


NEUTRAL = (
    "data.cache",
    "data.verify",
    "launch",
    "logger",
    "profile_file",
    "schedule.on_horizon_change",
    "trainer.resume",
    "trainer.parallel",
    "trainer.expert_parallel",
    "trainer.activation_checkpointing",
    "trainer.log_every",
    "trainer.checkpoint_every_epochs",
    "trainer.checkpoint_every_minutes",
    "trainer.keep_last",
    "trainer.keep_best",
    "trainer.keep_every",
    "trainer.stall_minutes",
    "trainer.keep_freed_memory",
    "trainer.onednn_products",
)
"""Keys that cannot change what a run computes, but for last digits: no part of its identity."""


@dataclass(frozen=True)
class RunConfig:
    """A run's config, checked. ``values`` is what YAML says, resolved; the groups are the same, typed."""

    values: dict[str, Any]
    seed: int
    model: schema.GPTConfig
    moe: schema.MoEConfig
    align: schema.BiStateConfig
    voter: schema.VoterConfig
    schedule: schema.ScheduleConfig
    data: schema.Group
    optimizer: schema.AdamWConfig
    trainer: schema.TrainerConfig
    logger: schema.Group
    launch: schema.LaunchConfig
    horizon: Horizon
    program: Program

    @property
    def result_values(self) -> dict[str, Any]:
        """The values that decide what the run computes, flat: dotted key to value."""
        flat = flatten(self.values)
        return {key: value for key, value in flat.items() if not is_neutral(key)}

    @property
    def identity(self) -> str:
        """The sha256 of what decides the result."""
        text = json.dumps(self.result_values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def resuming(self) -> RunConfig:
        """Return the same run, to go on from its own newest checkpoint."""
        values = {**self.values, "trainer": {**self.values["trainer"], "resume": "auto"}}
        return replace(self, values=values, trainer=self.trainer.model_copy(update={"resume": "auto"}))


def is_neutral(key: str) -> bool:
    """Say whether a key cannot change what a run computes."""
    return any(key == name or key.startswith(f"{name}.") for name in NEUTRAL)


def load(cfg: DictConfig, counts: Counts | None = None) -> RunConfig:
    """Resolve and check what Hydra composed; ``counts``: see :func:`parse`.

    Raises:
        ConfigError: with every problem found.
    """
    values = {str(key): _resolved(cfg, str(key)) for key in cfg if key != "hydra"}
    return parse(values, counts)


def load_data(cfg: DictConfig) -> dict[str, Any]:
    """Resolve and check the group ``data`` alone; no file is looked at.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_launch.sweep.secrets import check_secrets

    values: dict[str, Any] = {"data": _resolved(cfg, "data")}
    check_secrets(values)
    problems = missing_libraries({"data": _parse_group("data", values["data"])})
    if problems:
        raise ConfigError(*problems)
    data: dict[str, Any] = values["data"]
    return data


def _resolved(cfg: DictConfig, key: str) -> Any:
    """Return what stands under ``key`` as plain values.

    Raises:
        ConfigError: a value is missing, or means nothing.
    """
    try:
        node = cfg[key]
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: has no value yet. Set it: {error.full_key}=...") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def composed(overrides: list[str]) -> RunConfig:
    """Compose ``conf/`` with ``overrides`` and check it, as the command does.

    Raises:
        ConfigError: with every problem found.
        HydraException: an override that means nothing; see :func:`apt_launch.config.explain.explained`.
    """
    with composing() as compose:
        return load(compose(overrides))


@contextmanager
def composing() -> Iterator[Callable[[list[str]], DictConfig]]:
    """Compose ``conf/`` with overrides meanwhile; what Hydra composes elsewhere in this process stays as it is."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield lambda overrides: compose("config", overrides=overrides, return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = before


def parse(values: dict[str, Any], counts: Counts | None = None) -> RunConfig:
    """Check plain values; see :func:`load`. ``counts`` keeps what was counted, for the next of many configs."""
    groups, top = parse_groups(values)
    check_together(values, groups, top.launch)
    horizon = plan_horizon(values, groups, {} if counts is None else counts)
    program = check_curriculum(values, groups, horizon)
    return RunConfig(values=values, seed=top.seed, launch=top.launch, horizon=horizon, program=program, **groups)


def parse_groups(values: Mapping[str, Any]) -> tuple[dict[str, Any], schema.TopLevel]:
    """Check each group, and what is in none, by itself; no file is looked at.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_launch.config import schema
    from apt_launch.sweep.secrets import check_secrets

    check_secrets(values)
    problems: list[str] = []
    groups: dict[str, Any] = {}
    for name in schema.GROUPS:
        try:
            groups[name] = _parse_group(name, values.get(name))
        except ConfigError as error:
            problems += error.problems
    rest = {key: value for key, value in values.items() if key not in schema.GROUPS}
    for key in [key for key in rest if key not in schema.TopLevel.model_fields]:
        del rest[key]
        problems.append(f"{key}: unknown key. {nearest(key, schema.all_keys())}")
    try:
        top = validated(schema.TopLevel, rest)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return groups, top


def _parse_group(name: str, group: Any) -> schema.Group:
    """Check one group by itself.

    Raises:
        ConfigError: with every problem found.
    """
    from apt_launch.config import schema

    schemas = schema.GROUPS[name]
    if not isinstance(group, Mapping):
        raise ConfigError(f"{name}: {group!r} is not valid: choose one of the group's options, for instance in conf/.")
    target = group.get("_target_")
    if not isinstance(target, str | None) or target not in schemas:
        known = [str(known) for known in schemas]
        raise ConfigError(f"{name}._target_: {target!r} may not be built here. {nearest(str(target), known)}")
    return validated(schemas[target], group, key=name)


def show_error(error: ConfigError) -> None:
    """Tell the user what is wrong with the config."""
    count = len(error.problems)
    sys.stderr.write("error: " + (f"{count} problems\n  " if count > 1 else "") + "\n  ".join(error.problems) + "\n")


class CheckBeforeStart(Callback):
    """Checks a run before Hydra makes its folder, so that a mistake leaves nothing behind."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave with exit code 2 if the config is wrong. (An exception would be turned into a warning by Hydra.)"""
        from apt_launch.runs.folder import RunFolder

        try:
            RunFolder(Path(config.hydra.run.dir)).check_free(load(config))
        except ConfigError as error:
            show_error(error)
            raise SystemExit(2) from None
