"""From what Hydra composed to a config that is known to be right. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from apt_launch.allow import FLAG
from apt_launch.config import guard, own, schema
from apt_launch.config.checks import check_curriculum, check_together, missing_libraries
from apt_launch.config.composing import config_loader
from apt_launch.config.corpus import Counts, plan_horizon
from apt_launch.config.menu import CONF as CONF
from apt_launch.config.pretrained import with_pretrained
from apt_launch.config.run_config import RunConfig
from apt_launch.interpolations import bounded
from apt_launch.secrets import check_secrets, secret_error
from apt_model.errors import ConfigError, nearest, validated


def load(cfg: DictConfig, counts: Counts | None = None) -> RunConfig:
    """Resolve and check what Hydra composed; ``counts``: see :func:`parse`.

    Raises:
        ConfigError: with every problem found.
    """
    with bounded():
        values = {str(key): _resolved(cfg, str(key)) for key in cfg if key != "hydra"}
    return parse(values, counts)


def load_data(cfg: DictConfig) -> dict[str, Any]:
    """Resolve and check the group ``data`` alone; no file is looked at.

    Raises:
        ConfigError: with every problem found.
    """
    with bounded():
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
        if (secret := secret_error(error)) is not None:
            raise ConfigError(f"{error.full_key or key}: {secret}") from None
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def composed(overrides: Sequence[str]) -> RunConfig:
    """Compose ``conf/`` with ``overrides`` and check it, as the command does.

    Raises:
        ConfigError: with every problem found.
        HydraException: an override that means nothing; see :func:`apt_launch.config.explain.explained`.
    """
    with composing() as compose:
        return load(compose(overrides))


@contextmanager
def composing() -> Iterator[Callable[[Sequence[str]], DictConfig]]:
    """Compose ``conf/`` with overrides meanwhile, as the command does; Hydra's global state stays as it is."""
    with guard.installed(), config_loader(CONF) as loader:
        yield lambda overrides: loader.load_configuration("config", list(overrides), run_mode=RunMode.RUN)


def parse(values: dict[str, Any], counts: Counts | None = None) -> RunConfig:
    """Check plain values; see :func:`load`. ``counts`` keeps what was counted, for the next of many configs."""
    values = with_pretrained(values)
    groups, top = parse_groups(values)
    corpus = check_together(values, groups, top.launch)
    horizon = plan_horizon(values, groups, corpus, {} if counts is None else counts)
    program = check_curriculum(values, groups, horizon)
    return RunConfig(
        values=values,
        seed=top.seed,
        launch=top.launch,
        corpus=corpus,
        horizon=horizon,
        program=program,
        **groups,
    )


def parse_groups(values: Mapping[str, Any]) -> tuple[dict[str, Any], schema.TopLevel]:
    """Check each group, and what is in none, by itself; no file is looked at.

    Raises:
        ConfigError: with every problem found.
    """
    check_secrets(values)
    problems: list[str] = []
    groups: dict[str, Any] = {}
    for name in schema.GROUPS:
        try:
            groups[name] = _parse_group(name, values.get(name, schema.NEW.get(name)))
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
    problems += _callback_problems(rest.get("callbacks"))
    if problems:
        raise ConfigError(*problems)
    return groups, top


def _callback_problems(callbacks: Any) -> list[str]:
    """Say which callbacks are not allowed here, or are given what they do not take."""
    problems: list[str] = []
    for name, given in callbacks.items() if isinstance(callbacks, Mapping) else ():
        key = f"callbacks.{name}"
        target = given.get("_target_") if isinstance(given, Mapping) else None
        if not isinstance(target, str) or not own.is_named(target):
            problems.append(f"{key}._target_: {own.refusal(target)}")
            continue
        try:
            found = own.find(target, f"{key}._target_")
        except ConfigError as error:
            problems += error.problems
        else:
            problems += own.problems_of(found, {k: value for k, value in given.items() if k != "_target_"}, key)
    return problems


def _parse_group(name: str, group: Any) -> schema.Group:
    """Check one group by itself.

    Raises:
        ConfigError: with every problem found.
    """
    schemas = schema.GROUPS[name]
    if not isinstance(group, Mapping):
        raise ConfigError(f"{name}: {group!r} is not valid: choose one of the group's options, for instance in conf/.")
    target = group.get("_target_")
    if isinstance(target, str | None) and target in schemas:
        return validated(schemas[target], _without_more(name, target, group), key=name)
    if isinstance(target, str) and name in schema.OWN and (own.is_named(target) or is_optimizer(name, target)):
        return _parse_own(name, target, group)
    known = [str(known) for known in schemas]
    told = own.refusal(target) if name in schema.OWN else f"{target!r} may not be built here."
    near = nearest(str(target), known)
    if FLAG in told and not near.startswith("Did you mean"):  # it is another's, and no list helps
        near = ""
    raise ConfigError(f"{name}._target_: {told} {near}".strip())


def _without_more(name: str, target: str | None, group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``group`` without keys that its option does not list and an optimizer of torch's takes all the same.

    Raises:
        ConfigError: one of these has a value of another type.
    """
    schemas = schema.GROUPS[name]
    listed = {field.alias or key for key, field in schemas[target].model_fields.items()}
    more = [key for key in group if key not in listed]
    if not more or target is None or not is_optimizer(name, target):
        return group
    found = own.find(target, f"{name}._target_")
    known = own.parameters(found)
    taken = {key: value for key, value in group.items() if key in more and key in known}
    problems = own.problems_of(found, taken, name, schema.INJECTED[name])
    if problems:
        raise ConfigError(*problems)
    return {key: value for key, value in group.items() if key not in taken}


def is_optimizer(name: str, target: str) -> bool:
    """Return whether ``target`` is named as an optimizer of torch's, in the group for optimizers."""
    return name == "optimizer" and own.is_optimizer_name(target)


def _parse_own(name: str, target: str, group: Mapping[str, Any]) -> schema.Group:
    """Check the group of a class that is not this project's against what the class takes.

    Raises:
        ConfigError: with every problem found.
    """
    kind = schema.OWN[name]
    found = own.find(target, f"{name}._target_")
    problems: list[str] = []
    typed: schema.Group | None = None
    try:
        typed = validated(kind, group, key=name)
    except ConfigError as error:
        problems += error.problems
    ours = {field.alias or key for key, field in kind.model_fields.items()}  # some are the launcher's alone
    given = {
        key: value for key, value in group.items() if key != "_target_" and (key not in ours or own.takes(found, key))
    }
    problems += own.problems_of(found, given, name, schema.INJECTED[name])
    if problems or typed is None:
        raise ConfigError(*problems)
    return typed
