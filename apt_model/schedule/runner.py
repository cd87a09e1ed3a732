"""Executes a curriculum: before each update it brings the model to what the clock says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from apt_model.errors import ConfigError, nearest
from apt_model.schedule.clock import Clock, Horizon
from apt_model.schedule.spec import Curriculum
from apt_model.schedule.targets import BINDINGS, MODULES


@dataclass(frozen=True)
class Change:
    """Something that ``ScheduleRunner.apply`` has just changed: a module's switch or an anneal's value."""

    name: str
    value: bool | float


class ScheduleRunner:
    """Delivers switches and values at the right update; all of them are pure functions of the clock.

    Args:
        horizon: the planned length of the run.
        curriculum: the keys of :class:`apt_model.schedule.Curriculum`.

    Raises:
        ConfigError: the curriculum is wrong or cannot happen within ``horizon``.
    """

    def __init__(self, *, horizon: Horizon, **curriculum: Any) -> None:
        self.curriculum = Curriculum.read(curriculum)
        self.curriculum.check(horizon)
        self.planned = horizon
        self._curve_horizon = horizon  # differs after a resume with on_horizon_change=keep_absolute
        self._values: dict[str, Callable[[float], None]] = {}
        self._switches: dict[str, Callable[[bool], None]] = {}
        self._in_force: dict[str, bool | float] = {}
        self._applied: Clock | None = None

    def bind(
        self, *, values: Mapping[str, Callable[[float], None]], switches: Mapping[str, Callable[[bool], None]]
    ) -> None:
        """Connect every anneal and switch to the setters of a model.

        Args:
            values: target names, such as ``router.temperature``, to functions that set them.
            switches: module names to functions that enable or disable them.

        Raises:
            ConfigError: the curriculum names something that the model does not have.
        """
        problems = [
            f"schedule.{name}: the model has no value {BINDINGS[name].name!r}. {nearest(BINDINGS[name].name, values)}"
            for name in self.curriculum.anneals
            if BINDINGS[name].name not in values
        ]
        problems += [
            f"schedule.enable_{module}_at_{time[1]}: the model has no module {module!r}. {nearest(module, switches)}"
            for module in MODULES
            if (time := self.curriculum.switched_on_at(module)) and module not in switches
        ]
        if problems:
            raise ConfigError(*problems)
        self._values = {name: values[BINDINGS[name].name] for name in self.curriculum.anneals}
        self._switches = {module: switches[module] for module in MODULES if module in switches}

    def at(self, clock: Clock) -> dict[str, bool | float]:
        """Return what is in force at ``clock``: modules to on or off, anneals to values. Touches nothing."""
        state: dict[str, bool | float] = {module: self.curriculum.enabled(module, clock) for module in MODULES}
        for name, spec in self.curriculum.anneals.items():
            state[name] = spec.value(clock, self._curve_horizon)
        return state

    def apply(self, clock: Clock) -> list[Change]:
        """Bring the model to what is in force at ``clock``; write only what changed, switches before values.

        The first call after construction or :meth:`load_state_dict` writes everything.
        """
        changes = []
        for name, value in self.at(clock).items():
            if name in self._in_force and self._in_force[name] == value:
                continue
            if name in self._switches:
                self._switches[name](bool(value))
            elif name in self._values:
                self._values[name](value)
            self._in_force[name] = value
            changes.append(Change(name, value))
        self._applied = clock
        return changes

    def metrics(self) -> dict[str, float]:
        """Return what is in force as metrics: ``schedule/route_temp``, ``schedule/moe_enabled`` (0 or 1) and so on."""
        return {
            f"schedule/{name}_enabled" if name in MODULES else f"schedule/{name}": float(value)
            for name, value in self._in_force.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs; curve values are no part of it, they are computed anew."""
        return {
            "horizon": asdict(self._curve_horizon),
            "applied": asdict(self._applied) if self._applied else None,
            "enabled": {module: bool(self._in_force.get(module)) for module in MODULES},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; the next :meth:`apply` reconciles the model to the clock, whatever the state held.

        Raises:
            ConfigError: the horizon has changed and ``on_horizon_change`` is ``error``.
        """
        saved = Horizon(**state["horizon"])
        self._in_force = {}
        if saved == self.planned:
            return
        policy = self.curriculum.on_horizon_change
        if policy == "error":
            raise ConfigError(
                f"The checkpoint was made for {saved}, this run has {self.planned}: every anneal would bend. "
                "Say what is meant: schedule.on_horizon_change=rescale computes the curves over the new length, "
                "schedule.on_horizon_change=keep_absolute keeps them as they were and holds their ends."
            )
        if policy == "keep_absolute":
            self._curve_horizon = saved
