"""The only reader of ``_target_``: turns checked values into objects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import get_object, instantiate

from apt_launch.config import schema
from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from apt_launch.config.load import RunConfig
    from apt_model.gpt import GPT
    from apt_model.training.callbacks import Callback
    from apt_model.training.checkpoint import Checkpoints
    from apt_model.training.trainer import Trainer

ALLOWED = frozenset(target for targets in schema.GROUPS.values() for target in targets if target)


def build(values: Mapping[str, Any], **injected: Any) -> Any:
    """Instantiate ``values``; what is no config (models, functions, paths) comes in ``injected``.

    Raises:
        ConfigError: a ``_target_`` that is not on the allow-list, or one that is something else than it says.
    """
    return _factory(values)(**injected)


def _factory(values: Mapping[str, Any]) -> Callable[..., Any]:
    """Return ``values`` as a function that still takes what is injected."""
    for target in _targets(values):
        if target not in ALLOWED:
            raise ConfigError(f"_target_: {target!r} may not be built here.")
        found = get_object(target)
        module, name = target.rsplit(".", 1)
        if not isinstance(found, type) or found.__name__ != name or not found.__module__.startswith(module):
            raise ConfigError(f"_target_: {target!r} is not what it says, but {found!r}.")
    factory: Callable[..., Any] = instantiate(dict(values), _partial_=True, _convert_="all")
    return factory


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
        moe=_factory(values["moe"]),
        align=_factory(values["align"]),
        voter=_factory(values["voter"]),
    )
    return model


def build_trainer(
    config: RunConfig,
    *,
    log: Callable[[dict[str, float]], None],
    callbacks: Sequence[Callback] = (),
    checkpoints: Checkpoints | None = None,
    resume: Path | None = None,
    leave_out: Collection[tuple[int, int]] = (),
    stop_requested: Callable[[], bool] = lambda: False,
) -> Trainer:
    """Build everything a run needs, seeded."""
    from apt_model.training.distributed import from_rank_zero
    from apt_model.training.options import by_concern
    from apt_model.training.randomness import seed_all

    seed_all(config.seed)
    values = config.values
    options = by_concern(
        values["trainer"]
        | {"seed": config.seed, "weight_decay": config.optimizer.weight_decay, "leave_out": frozenset(leave_out)}
    )
    trainer: Trainer = build(
        {"_target_": values["trainer"]["_target_"]},
        **options,
        model=build_model(values),
        optimizer=_factory(values["optimizer"]),
        schedule=build(values["schedule"], horizon=config.horizon, broadcast=from_rank_zero),
        corpus=build(values["data"]),
        resume=resume,
        checkpoints=checkpoints,
        log=log,
        callbacks=callbacks,
        stop_requested=stop_requested,
    )
    return trainer
