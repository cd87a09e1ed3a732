"""The only reader of ``_target_``: turns checked values into objects."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object

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


def factory(values: Mapping[str, Any]) -> functools.partial[Any]:
    """Return ``values`` as a function that still takes what is injected.

    Text stays text: values are resolved already, and Hydra's own ``instantiate`` would resolve them once more, and build what
    comes of that.
    """
    arguments = {str(key): _built(value) for key, value in values.items() if key != "_target_"}
    return functools.partial(_class(values.get("_target_")), **arguments)


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return factory(value)() if "_target_" in value else {key: _built(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_built(item) for item in value]
    return value


def _class(target: Any) -> type:
    """Return the class of that name.

    Raises:
        ConfigError: it is not on the allow-list, or is something else than it says.
    """
    if target not in ALLOWED:
        raise ConfigError(f"_target_: {target!r} may not be built here.")
    found = get_object(target)
    module, name = target.rsplit(".", 1)
    if not isinstance(found, type) or found.__name__ != name or not found.__module__.startswith(module):
        raise ConfigError(f"_target_: {target!r} is not what it says, but {found!r}.")
    return found


def build_model(values: Mapping[str, Any]) -> GPT:
    """Build a config's model as it is before the curriculum's first update, on torch's default device, not seeded."""
    model: GPT = build(
        values["model"],
        moe=factory(values["moe"]),
        align=factory(values["align"]),
        voter=factory(values["voter"]),
    )
    return model
