"""The only reader of ``_target_``: turns checked values into objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate

from apt_launch.config import schema
from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from apt_model.gpt import GPT

ALLOWED = frozenset(target for targets in schema.GROUPS.values() for target in targets if target)


def build(values: Mapping[str, Any], **injected: Any) -> Any:
    """Instantiate ``values``; what is no config (models, functions, paths) comes in ``injected``.

    Raises:
        ConfigError: a ``_target_`` that is not on the allow-list, or one that is something else than it says.
    """
    return factory(values)(**injected)


def factory(values: Mapping[str, Any]) -> Callable[..., Any]:
    """Return ``values`` as a function that still takes what is injected."""
    for target in _targets(values):
        if target not in ALLOWED:
            raise ConfigError(f"_target_: {target!r} may not be built here.")
        found = get_object(target)
        module, name = target.rsplit(".", 1)
        if not isinstance(found, type) or found.__name__ != name or not found.__module__.startswith(module):
            raise ConfigError(f"_target_: {target!r} is not what it says, but {found!r}.")
    partial: Callable[..., Any] = instantiate(dict(values), _partial_=True, _convert_="all")
    return partial


def _targets(values: Any) -> list[Any]:
    if isinstance(values, Mapping):
        here = [values["_target_"]] if "_target_" in values else []
        return here + [target for value in values.values() for target in _targets(value)]
    if isinstance(values, list | tuple):
        return [target for value in values for target in _targets(value)]
    return []


def build_model(values: Mapping[str, Any]) -> GPT:
    """Build a config's model as it is before the curriculum's first update, on torch's default device, not seeded."""
    model: GPT = build(
        values["model"],
        moe=factory(values["moe"]),
        align=factory(values["align"]),
        voter=factory(values["voter"]),
    )
    return model
