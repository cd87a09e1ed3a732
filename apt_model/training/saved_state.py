"""What a checkpoint's ``state.pt`` holds: its schema, and its only reader."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from torch import Tensor

from apt_model.errors import CheckpointError, ConfigError
from apt_model.files import STRICT, from_json
from apt_model.schedule import Clock, Horizon
from apt_model.schedule.program import LatchState
from apt_model.training.checkpoint import STATE, load, read_manifest
from apt_model.training.randomness import check_random_state

REMEDY: Final = "Remove that checkpoint: the one before it is taken then."

PLAIN: Final = ("clock", "schedule", "progress", "scaler")
"""Parts without tensors."""

OF_TENSORS: Final = ("model", "optimizer", "random")

MOMENTS: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What optimizers keep for each weight, in its shape."""


@dataclass(frozen=True)
class _Schedule:
    horizon: Horizon
    applied: Clock | None
    on: dict[str, bool]
    latches: dict[str, LatchState]


@dataclass(frozen=True)
class _Progress:
    batches_done: int
    updates_done: int
    updates_skipped: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class _Plain:
    """The schema of the parts without tensors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    clock: Clock
    schedule: _Schedule
    progress: _Progress
    scaler: dict[str, float]  # of mixed precision; empty: there was none

    def __post_init__(self) -> None:
        """Refuse what no run can have come to."""
        counted = [*asdict(self.clock).values(), *asdict(self.progress).values()]
        if not all(0 <= number < math.inf for number in counted):
            raise ValueError("its clock and its progress cannot be negative or endless")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what :meth:`apt_model.training.base.BaseTrainer.state_dict` returned when ``checkpoint`` was written.

    Raises:
        CheckpointError: something is missing, damaged, or of another type or size than a run can go on from.
    """
    state: Any = load(checkpoint)
    path = checkpoint / STATE
    try:
        _check(state, step=read_manifest(checkpoint)["step"], where=str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({error}). {REMEDY}") from None
    found: dict[str, Any] = state
    return found


def _check(state: Any, *, step: int, where: str) -> None:
    """Raise what is wrong with ``state``."""
    if not isinstance(state, Mapping):
        raise ValueError("it is no mapping")
    if missing := [name for name in (*PLAIN, *OF_TENSORS) if name not in state]:
        raise ValueError(f"{', '.join(missing)}: missing")
    plain = from_json(json.dumps({name: state[name] for name in PLAIN}), _Plain, where=where, remedy=REMEDY)
    if plain.clock.step != step:
        raise ValueError(f"clock: it shows step {plain.clock.step}, and the checkpoint is that of step {step}")
    if not isinstance(state["model"], Mapping) or not all(isinstance(name, str) for name in state["model"]):
        raise ValueError("model: it is no mapping of names")
    _check_optimizer(state["optimizer"], state["model"])
    _check_average(state.get("ema", {}), state["model"])
    ranks = state["random"]
    if not isinstance(ranks, list | tuple) or not ranks:
        raise ValueError("random: it is no list of the random states of ranks")
    for number, of_rank in enumerate(ranks):
        try:
            check_random_state(of_rank)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"random.{number}: no random state: {error}") from None


def _check_optimizer(found: Any, weights: Mapping[str, Any]) -> None:
    """Raise what is wrong with an optimizer's state by the names of parameters."""
    if not isinstance(found, Mapping):
        raise ValueError("optimizer: it is no mapping of parameters")
    for name, values in found.items():
        weight = weights.get(name)
        if not isinstance(weight, Tensor):
            raise ValueError(f"optimizer: there is no parameter {name!r} in the checkpoint")
        if not isinstance(values, Mapping):
            raise ValueError(f"optimizer.{name}: it is no mapping")
        for part in MOMENTS:  # what else there is belongs to an optimizer that only its owner knows
            value = values.get(part)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer.{name}.{part}: {type(value).__name__}, and a tensor is wanted")
            if value.dim() and value.shape != weight.shape:
                raise ValueError(
                    f"optimizer.{name}.{part}: {tuple(value.shape)}, and the parameter is {tuple(weight.shape)}"
                )


def _check_average(found: Any, weights: Mapping[str, Any]) -> None:
    """Raise what is wrong with averaged weights."""
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("ema: it is no mapping of tensors")
    for name, value in found.items():
        weight = weights.get(name)
        if not isinstance(weight, Tensor) or weight.shape != value.shape:
            raise ValueError(f"ema.{name}: there is no parameter of that name and shape in the checkpoint")
