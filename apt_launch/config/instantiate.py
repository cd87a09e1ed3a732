"""The only reader of ``_target_``: turns checked values into objects."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import FunctionType
from typing import Any, Final

from hydra.utils import get_object

from apt_launch.config import own, schema
from apt_model.errors import ConfigError

PRETRAINED: Final = "apt_model.layouts.pretrained.PretrainedGPT"
GPTS: Final = ("apt_model.gpt.GPT", PRETRAINED)
"""Models of this project, which take experts, alignment and votes as their parts."""

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
    found = _target(values.get("_target_"))
    arguments = {str(key): _built(value) for key, value in values.items() if key != "_target_"}
    if values.get("_target_") not in ALLOWED or not isinstance(
        found, type
    ):  # some keys are the launcher's, and a class of the user's may take them
        arguments = {
            key: value for key, value in arguments.items() if key not in schema.OF_OWN or own.takes(found, key)
        }
    return functools.partial(found, **arguments)


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return factory(value)() if "_target_" in value else {key: _built(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_built(item) for item in value]
    return value


def _target(target: Any) -> own.Target:
    """Return the class of that name, or the user's own class or function.

    Raises:
        ConfigError: it is not allowed, or is something else than it says.
    """
    if target not in ALLOWED:
        if isinstance(target, str) and (own.is_named(target) or own.is_optimizer_name(target)):
            return own.find(target, "_target_")
        raise ConfigError(f"_target_: {own.refusal(target)}")
    found = get_object(target)
    module, name = target.rsplit(".", 1)
    if not isinstance(found, type | FunctionType) or found.__name__ != name or not found.__module__.startswith(module):
        raise ConfigError(f"_target_: {target!r} is not what it says, but {found!r}.")
    return found


def build_loss(values: Mapping[str, Any]) -> Any:
    """Return the loss that a config names, a function of logits and targets; None: the model's own.

    Raises:
        ConfigError: it is no function.
    """
    given = values.get("loss") or {}
    if given.get("_target_") is None:
        return None
    make = factory(given)
    if not isinstance(make.func, type):
        return make
    made = make()
    if not callable(made):
        raise ConfigError(
            f"loss._target_: what {given['_target_']} makes cannot be called. Give it __call__(logits, targets)."
        )
    return made


def build_callbacks(values: Mapping[str, Any]) -> list[Any]:
    """Return the callbacks that a config names, each with its name there.

    Raises:
        ConfigError: one is none.
    """
    from apt_model.training.callbacks import Callback, Named

    found = []
    for name, given in (values.get("callbacks") or {}).items():
        made = build(given)
        if not isinstance(made, Callback):
            raise ConfigError(
                f"callbacks.{name}._target_: {given['_target_']} makes something of the type {type(made).__name__}. Derive it "
                "from apt_model.training.callbacks.Callback."
            )
        found.append(Named(name, made))
    return found


def build_model(values: Mapping[str, Any]) -> Any:
    """Build a config's model as it is before the curriculum's first update, on torch's default device, not seeded.

    Raises:
        ConfigError: it is the user's own, and no ``torch.nn.Module``.
    """
    make = factory(values["model"])
    if values["model"]["_target_"] in GPTS:
        return make(moe=factory(values["moe"]), align=factory(values["align"]), voter=factory(values["voter"]))
    from torch import nn

    from apt_model.layers.in_place import MoEInPlace

    parts = {
        "moe": functools.partial(MoEInPlace, **factory(values["moe"]).keywords),
        "align": factory(values["align"]),
        "voter": factory(values["voter"]),
    }
    model = make(**{name: part for name, part in parts.items() if name in own.parameters(make.func)})
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model._target_: {values['model']['_target_']} made something of the type {type(model).__name__}. It has to make "
            "a torch.nn.Module."
        )
    return model
