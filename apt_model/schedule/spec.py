"""A curriculum as it stands in YAML, checked, and its pure functions of the clock."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from apt_model.errors import ConfigError, validated
from apt_model.schedule.clock import Clock, Horizon, Unit
from apt_model.schedule.curves import anneal
from apt_model.schedule.targets import BINDINGS, MODULES, Domain


def _warmup(value: Any) -> Any:
    """Accept a count in the unit of ``by``, or a share of the run such as ``10%``."""
    if isinstance(value, str):
        if not re.fullmatch(r"\d+(\.\d+)?%", value):
            raise ValueError(f"{value!r} is neither a whole number nor a share of the run such as '10%'")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is neither a whole number nor a share of the run such as '10%'")
    if value < 0:
        raise ValueError(f"{value} is negative; 0 is no warmup")
    return value


Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Base of everything read from YAML: unknown keys are errors, nothing is coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Anneal(Strict):
    """A value that moves from ``start`` to ``end`` over the run, index by index of the unit ``by``.

    ``warmup`` ramps from 0 to ``start`` first: a count in that unit, or a share of the run (``10%``).
    """

    start: Number
    end: Number
    by: Unit = "epoch"
    type: Literal["linear", "cosine"] = "linear"
    warmup: Annotated[Any, BeforeValidator(_warmup)] = 0

    def warmup_length(self, length: int) -> int:
        """Return the warmup as a count; a share of the run is rounded to the nearest whole index, halves up."""
        if isinstance(self.warmup, str):
            return int(Fraction(self.warmup[:-1]) / 100 * length + Fraction(1, 2))
        return int(self.warmup)

    def value(self, clock: Clock, horizon: Horizon) -> float:
        """Return the value in force at ``clock``."""
        length = horizon.length(self.by)
        index = clock.epoch if self.by == "epoch" else clock.step
        return anneal(
            index,
            length=length,
            warmup=self.warmup_length(length),
            start=self.start,
            end=self.end,
            shape=self.type,
        )

    def problems(self, key: str, horizon: Horizon, domain: Domain) -> list[str]:
        """Say what keeps this anneal from running over ``horizon`` within ``domain``."""
        length = horizon.length(self.by)
        warmup = self.warmup_length(length)
        if warmup >= length:
            return [
                f"{key}.warmup is {self.warmup} = {warmup} {self.by}s, but the run has only {length} {self.by}s "
                f"({horizon}), so the anneal would never begin. Set {key}.warmup below {length} (a share such as 10% "
                "fits any run), or make the run longer with trainer.max_epochs."
            ]
        problems = [
            f"{key}.{name} = {value:g} is outside its domain: it must be {domain}."
            for name, value in (("start", self.start), ("end", self.end))
            if value not in domain
        ]
        if not problems and warmup and 0.0 not in domain:
            problems.append(
                f"{key}.warmup = {self.warmup} ramps up from 0, which is outside the domain: the value must be {domain}. "
                f"Set {key}.warmup=0."
            )
        return problems


class Curriculum(Strict):
    """What switches on when, and what anneals; ``null`` leaves a module off or a value as its module has it."""

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
    on_horizon_change: Literal["error", "rescale", "keep_absolute"] = "error"

    @classmethod
    def read(cls, values: Mapping[str, Any], *, key: str = "schedule") -> Curriculum:
        """Build from plain values that stand at ``key`` in the config.

        Raises:
            ConfigError: unknown keys, wrong types, or two times for one switch.
        """
        curriculum = validated(cls, values, key=key)
        if problems := curriculum.contradictions(key):
            raise ConfigError(*problems)
        return curriculum

    def contradictions(self, key: str = "schedule") -> list[str]:
        """Say which switches have two times."""
        return [
            f"{key}.enable_{module}_at_epoch and {key}.enable_{module}_at_step are both set; set one of them to null."
            for module in MODULES
            if self._at(module, "epoch") is not None and self._at(module, "step") is not None
        ]

    @property
    def anneals(self) -> dict[str, Anneal]:
        """The anneals that are set, by name."""
        named = {name: getattr(self, name) for name in BINDINGS}
        return {name: spec for name, spec in named.items() if spec is not None}

    def _at(self, module: str, unit: Unit) -> int | None:
        at: int | None = getattr(self, f"enable_{module}_at_{unit}")
        return at

    def switched_on_at(self, module: str) -> tuple[int, Unit] | None:
        """Return when ``module`` switches on and in which unit; None: never."""
        units: tuple[Unit, ...] = ("epoch", "step")
        for unit in units:
            at = self._at(module, unit)
            if at is not None:
                return at, unit
        return None

    def first_step(self, module: str, horizon: Horizon) -> int | None:
        """Return the first planned update with ``module`` on; None: there is none."""
        time = self.switched_on_at(module)
        if time is None:
            return None
        at, unit = time
        return at if unit == "step" else at * horizon.updates_per_epoch

    def enabled(self, module: str, clock: Clock) -> bool:
        """Say whether ``module`` is on at ``clock``: on as soon as, and as long as, clock >= at."""
        time = self.switched_on_at(module)
        if time is None:
            return False
        at, unit = time
        return (clock.epoch if unit == "epoch" else clock.step) >= at

    def check(self, horizon: Horizon, *, key: str = "schedule") -> None:
        """Refuse what cannot happen within ``horizon``.

        Raises:
            ConfigError: a switch after the end, a warmup as long as the run, a value outside its domain.
        """
        problems = []
        for module in MODULES:
            time = self.switched_on_at(module)
            if time is None:
                continue
            at, unit = time
            length = horizon.length(unit)
            if at >= length:
                problems.append(
                    f"{key}.enable_{module}_at_{unit} = {at} would never happen: the run has {length} {unit}s ({horizon}), "
                    f"so its last {unit} is {length - 1}. Set it to {length - 1} or less, to null to leave {module} off, "
                    "or make the run longer with trainer.max_epochs."
                )
        for name, spec in self.anneals.items():
            problems += spec.problems(f"{key}.{name}", horizon, BINDINGS[name].domain)
        if problems:
            raise ConfigError(*problems)
