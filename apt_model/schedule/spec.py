"""A curriculum as it stands in YAML: its grammar, and what can be said of it without a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field

from apt_model.errors import ConfigError, validated
from apt_model.schedule.anneal import Anneal
from apt_model.schedule.clock import Unit
from apt_model.schedule.fields import Count, Named, Number, Pattern, Positive, Strict, WrittenTime
from apt_model.schedule.targets import BINDINGS, MODULES
from apt_model.schedule.times import Time


class When(Strict):
    """A latch on a metric: what enables a module, and disables it again.

    The metric, smoothed (0: not at all), must pass ``above`` (or fall below ``below``); with ``release`` the module is
    disabled again when it comes back past that. ``hold`` is the shortest time between two flips; before ``not_before`` nothing
    happens; at ``deadline`` the module is enabled whatever the metric says.
    """

    metric: Pattern  # what is watched
    above: Number | None = None  # on when it exceeds this; or below
    below: Number | None = None  # on when it falls below this; or above
    release: Number | None = None  # off again when it comes back past this; null: never
    smooth: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the past in the moving average; 0: none
    hold: WrittenTime = Time(Fraction(0), "step")  # shortest time between two flips
    not_before: WrittenTime = Time(Fraction(0), "step")  # nothing happens before this time
    deadline: WrittenTime | None = None  # on at this time whatever the metric says

    def contradictions(self, key: str) -> list[str]:
        """Return what is missing or does not go together."""
        if self.hold.anchor is not None:
            return [f"{key}.hold: {self.hold} is a time after an event; a length such as 100st is wanted here."]
        if (self.above is None) == (self.below is None):
            return [f"{key}: give one of above and below."]
        if self.release is not None:
            wrong = self.release > self.above if self.above is not None else self.release < (self.below or 0.0)
            if wrong:
                side = (
                    f"at most above = {self.above:g}" if self.above is not None else f"at least below = {self.below:g}"
                )
                return [f"{key}.release = {self.release:g} must be {side}, or the module would flip at once."]
        return []

    def triggered(self, value: float) -> bool:
        """Return whether the smoothed metric is past the threshold that enables."""
        return value > self.above if self.above is not None else value < (self.below or 0.0)

    def released(self, value: float) -> bool:
        """Return whether the smoothed metric is past the threshold that disables."""
        if self.release is None:
            return False
        return value < self.release if self.above is not None else value > self.release


ACTIONS = {
    "enable": ("enabled", True),
    "disable": ("enabled", False),
    "freeze": ("frozen", True),
    "unfreeze": ("frozen", False),
    "grow": ("grown", True),
}
"""What an event does: to which state of its subject, and whether that begins or ends."""


class Event(Strict):
    """One of enable, disable, grow (modules), freeze, unfreeze (parameters, by path), at a time or when a metric says."""

    enable: Pattern | None = None  # module to enable
    disable: Pattern | None = None  # module to disable
    freeze: Pattern | None = None  # parameters that stay as they are, by path or pattern
    unfreeze: Pattern | None = None  # parameters that train again
    grow: Literal["moe"] | None = None  # module whose experts become more, copies of those that are there
    to: Positive | None = None  # of grow: how many experts a layer has from then on
    at: WrittenTime | None = None  # when: a time such as 2ep, 500st, 10%, moe.enabled + 1ep
    when: When | None = None  # a latch on a metric, instead of at

    @property
    def action(self) -> str:
        """The one of :data:`ACTIONS` that is set."""
        return next(name for name in ACTIONS if getattr(self, name) is not None)

    @property
    def subject(self) -> str:
        """The module, or the pattern of parameters."""
        subject: str = getattr(self, self.action)
        return subject

    @property
    def state(self) -> tuple[str, bool]:
        """The state of the subject that this begins or ends, and whether it begins."""
        state, begins = ACTIONS[self.action]
        return f"{state}{self.to}" if self.action == "grow" else state, begins

    def contradictions(self, key: str) -> list[str]:
        """Return what is missing or does not go together."""
        actions = [name for name in ACTIONS if getattr(self, name) is not None]
        problems = []
        if len(actions) != 1:
            problems.append(f"{key}: give one of {', '.join(ACTIONS)}, not {' and '.join(actions) or 'none'}.")
        if (self.at is None) == (self.when is None):
            problems.append(f"{key}: give one of at and when.")
        if (self.grow is None) != (self.to is None):
            problems.append(f"{key}: grow and to go together, such as {{grow: moe, to: 16, at: 6ep}}.")
        if self.grow is not None and self.when is not None:
            problems.append(f"{key}.when: experts grow at a time. Give at instead.")
        if self.when is not None:
            problems += self.when.contradictions(f"{key}.when")
            if actions and actions[0] in ("disable", "unfreeze"):
                problems.append(
                    f"{key}.when: a latch enables or freezes; write enable or freeze, and release for the way back."
                )
        return problems


class Curriculum(Strict):
    """Which modules are enabled when, and which values anneal; ``null``: never, or as the module has it."""

    enable_moe_at_epoch: Count | None = None
    enable_moe_at_step: Count | None = None
    enable_align_at_epoch: Count | None = None
    enable_align_at_step: Count | None = None
    enable_voter_at_epoch: Count | None = None
    enable_voter_at_step: Count | None = None
    route_temp: Anneal | None = None
    moe_capacity: Anneal | None = None
    align_weight: Anneal | None = None
    vote_threshold: Anneal | None = None
    anneals: Named[Anneal] = Field(default_factory=dict)
    events: Named[Event] = Field(default_factory=dict)
    on_horizon_change: Literal["error", "rescale", "keep_absolute"] = "error"

    @classmethod
    def read(cls, values: Mapping[str, Any], *, key: str = "schedule") -> Curriculum:
        """Build from plain values that stand at ``key`` in the config.

        Raises:
            ConfigError: unknown keys, wrong types, or things that do not go together.
        """
        curriculum = validated(cls, values, key=key)
        if problems := curriculum.contradictions(key):
            raise ConfigError(*problems)
        return curriculum

    def contradictions(self, key: str = "schedule") -> list[str]:
        """Return what is missing or does not go together, before any run is known."""
        problems = [
            f"{key}.enable_{module}_at_epoch and {key}.enable_{module}_at_step are both set; set one of them to null."
            for module in MODULES
            if self._at(module, "epoch") is not None and self._at(module, "step") is not None
        ]
        for name, spec in self.all_anneals.items():
            where = self.key_of(name, key)
            problems += spec.contradictions(where)
            if name in BINDINGS and spec.target is not None:
                problems.append(
                    f"{where}.target: {name} always writes {BINDINGS[name][0]}; use {key}.anneals for others."
                )
            if name not in BINDINGS and spec.target is None:
                problems.append(
                    f"{where}.target: missing. Name what it writes, such as align.weight or blocks.*.ffn.dropout."
                )
        problems += [
            f"{key}.anneals.{name}: {name} is a name of its own; use {key}.{name}."
            for name in self.anneals
            if name in BINDINGS
        ]
        for name, spec in self.anneals.items():
            where = self.key_of(name, key)
            if label := re.search(r"_(enabled|frozen|grown\d+)$", name):
                problems.append(
                    f"{where}: names that end in {label[0]} are those of switches, in rows and wherever they are read. Call it "
                    f"otherwise, such as {key}.anneals.{name.removesuffix(label[0])}_value."
                )
            if name == "lr" and spec.target not in (None, "optimizer.lr"):
                problems.append(
                    f"{where}: lr is the learning rate, in rows and pictures, and this writes {spec.target}. Call it by that."
                )
        for name, event in self.events.items():
            problems += event.contradictions(f"{key}.events.{name}")
        return problems

    @property
    def all_anneals(self) -> dict[str, Anneal]:
        """Every anneal that is set, by name: those with names of their own first."""
        named = {name: getattr(self, name) for name in BINDINGS}
        return {name: spec for name, spec in named.items() if spec is not None} | self.anneals

    @staticmethod
    def key_of(name: str, key: str = "schedule") -> str:
        """Return where in the config the anneal ``name`` stands."""
        return f"{key}.{name}" if name in BINDINGS else f"{key}.anneals.{name}"

    def target_of(self, name: str) -> str:
        """Return what the anneal ``name`` writes: a path or a pattern."""
        return BINDINGS[name][0] if name in BINDINGS else self.anneals[name].target or ""

    def all_events(self) -> dict[str, Event]:
        """Every event by its key below ``schedule``, with ``enable_MODULE_at_UNIT`` among them."""
        events = {}
        units: tuple[Unit, ...] = ("epoch", "step")
        for module in MODULES:
            for unit in units:
                at = self._at(module, unit)
                if at is not None:
                    events[f"enable_{module}_at_{unit}"] = Event(enable=module, at=f"{at}{unit}")
        return events | {f"events.{name}": event for name, event in self.events.items()}

    def _at(self, module: str, unit: Unit) -> int | None:
        at: int | None = getattr(self, f"enable_{module}_at_{unit}")
        return at
