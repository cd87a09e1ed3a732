"""A run's config, checked: its values, typed, with the corpus, the length and the curriculum that follow from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from apt_launch.config import schema
from apt_launch.config.schema import Role, role_of
from apt_launch.values import flatten
from apt_model.schedule.prefix import Course

if TYPE_CHECKING:
    from collections.abc import Callable

    from apt_model.data import Corpus
    from apt_model.schedule import Clock, Horizon, Program


@dataclass(frozen=True)
class RunConfig:
    """A run's config, checked. ``values`` is what YAML says, resolved; the groups are the same, typed.

    ``corpus``, ``horizon`` (the planned length) and ``program`` (the curriculum over that length) follow from them.
    """

    values: dict[str, Any]
    seed: int
    model: schema.GPTConfig | schema.OwnModelConfig
    moe: schema.MoEConfig
    align: schema.BiStateConfig
    voter: schema.VoterConfig
    schedule: schema.ScheduleConfig
    data: schema.Group
    optimizer: schema.AdamWConfig | schema.OwnOptimizerConfig
    trainer: schema.TrainerConfig
    logger: schema.Group
    loss: schema.Group
    launch: schema.LaunchConfig
    corpus: Corpus
    horizon: Horizon
    program: Program

    @property
    def result_values(self) -> dict[str, Any]:
        """The values that decide what the run computes, flat: dotted key to value."""
        flat = flatten({name: value for name, value in self.values.items() if value != schema.NEW.get(name, ...)})
        return {
            key: value
            for key, value in flat.items()
            if not is_neutral(key) and not (key in schema.NEW_KEYS and value == schema.NEW_KEYS[key])
        }

    def default_of(self, key: str) -> Any:
        """Return the value that a config without ``key`` stands for, as those of earlier versions; ``...``: it is not known."""
        if key in schema.NEW_KEYS:
            return schema.NEW_KEYS[key]
        group, _, name = key.partition(".")
        fields = getattr(type(getattr(self, group, None)), "model_fields", {})
        field = next((field for known, field in fields.items() if (field.alias or known) == name), None)
        return ... if field is None or field.is_required() else field.get_default()

    @property
    def identity(self) -> str:
        """The sha256 of what decides the result."""
        text = json.dumps(self.result_values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def course(self) -> Course:
        """What the run will do, update by update."""
        return Course(self.program, flatten(self.values), schema.reach_of, self._lr(), self.trainer.log_every)

    def _lr(self) -> Callable[[Clock], float]:
        """Return the learning rate at a clock, before what the curriculum says of it."""
        base, anneal = self.optimizer.lr, self.trainer.lr_schedule
        if anneal is None:
            return lambda clock: base
        curve = anneal.curve(self.horizon)
        return lambda clock: base * curve(getattr(clock, anneal.by))

    def resuming(self) -> RunConfig:
        """Return the same run, continued from its own newest checkpoint."""
        values = {**self.values, "trainer": {**self.values["trainer"], "resume": "auto"}}
        return replace(self, values=values, trainer=self.trainer.model_copy(update={"resume": "auto"}))


def is_neutral(key: str) -> bool:
    """Return whether a key cannot change what a run computes."""
    return role_of(key) in (Role.NEUTRAL, Role.PROCESS)
