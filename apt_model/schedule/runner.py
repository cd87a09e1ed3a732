"""Executes a curriculum: before each update it sets the model to the scheduled values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from apt_model.errors import ConfigError, nearest
from apt_model.schedule.clock import Clock, Horizon
from apt_model.schedule.program import LatchState, Program, Subject, grown_to
from apt_model.schedule.spec import Curriculum
from apt_model.schedule.targets import MODULES, Domain, matching


class Change(NamedTuple):
    """Something that has just changed: a switch (``moe_enabled``), or an anneal's value."""

    name: str
    value: bool | float

    @property
    def switch(self) -> str:
        """A switch in words: ``moe enabled``; see :meth:`Subject.words`."""
        return Subject.of(self.name).words(bool(self.value))


class ScheduleRunner:
    """Delivers switches and values at the right update.

    All are pure functions of the clock, but for latches, which also remember what they saw.

    Args:
        horizon: the planned length of the run.
        modules: names of what the model can enable and disable; those of this project unless said otherwise.
        broadcast: maps a metric that a latch watches to the one that decides: in distributed training that of rank 0, so
            that all ranks switch together.
        program: of the same curriculum over the same horizon, where it was made already.
        curriculum: the keys of :class:`apt_model.schedule.Curriculum`.

    Raises:
        ConfigError: the curriculum is wrong or cannot happen within ``horizon``.
    """

    def __init__(
        self,
        *,
        horizon: Horizon,
        modules: Iterable[str] = MODULES,
        broadcast: Callable[[float], float] = lambda value: value,
        program: Program | None = None,
        **curriculum: Any,
    ) -> None:
        self.program = program or Program(Curriculum.read(curriculum), horizon, modules=modules)
        self.curriculum = self.program.curriculum
        self.planned = horizon
        self.broadcast = broadcast
        self._setters: dict[str, Callable[[Any], None]] = {}
        self._freezers: dict[str, Callable[[bool], None]] = {}  # whole things before their parts
        self._resize: Callable[..., None] | None = None
        self._values: dict[str, bool | float] = {}
        self._latches: dict[Subject, LatchState] = {}
        self._applied: Clock | None = None
        self.targets: list[str] = []  # what anneals write, known once bound

    def bind(
        self,
        *,
        values: Mapping[str, Callable[[float], None]],
        switches: Mapping[str, Callable[[bool], None]],
        freeze: Callable[[str, bool], None] | None = None,
        resize: Callable[..., None] | None = None,
        domains: Mapping[str, Domain] | None = None,
        parameters: Iterable[str] = (),
    ) -> None:
        """Connect the curriculum to the setters of a model.

        Args:
            values: target names, such as ``blocks.0.ffn.temperature``, to functions that set them. An anneal's target may
                be a pattern that means several.
            switches: module names to functions that enable or disable them.
            freeze: called with a pattern of parameters and whether they are frozen.
            resize: called with ``at_least`` or ``at_most`` how many experts there are from now on; None of them at most: as
                many as they began with.
            domains: of the targets, where they are known.
            parameters: names that can be frozen.

        Raises:
            ConfigError: the curriculum names something that the model does not have.
        """
        domains = {name: (domains or {}).get(name, Domain()) for name in values}
        self.program.check_targets(domains, parameters)
        setters: dict[str, Callable[[Any], None]] = {}
        freezers: dict[str, Callable[[bool], None]] = {}
        problems = []
        for subject, events in self.program.switches.items():
            used = bool(events) or subject in self.program.latches
            key = events[0].key if events else "schedule.events"
            if subject.state == "frozen":
                if freeze is None:
                    problems.append(f"{key}: this model has no parameters that can be frozen.")
                    continue
                freezers[subject.label] = _freezer(freeze, subject.name)
            elif subject.experts is not None:
                if resize is None:
                    problems.append(f"{key}: this model has no experts that can become more.")
                    continue
                setters[subject.label] = _grower(resize, subject)
            elif subject.name in switches:
                setters[subject.label] = switches[subject.name]
            elif used:
                problems.append(f"{key}: the model has no module {subject.name!r}. {nearest(subject.name, switches)}")
        if problems:
            raise ConfigError(*problems)
        for name in self.curriculum.all_anneals:
            meant = matching(self.curriculum.target_of(name), values)
            setters[name] = values[meant[0]] if len(meant) == 1 else _all_of([values[target] for target in meant])
            self.targets += meant
        self._setters = setters
        self._freezers = freezers
        self._resize = resize

    def at(self, clock: Clock) -> dict[str, bool | float]:
        """Return the scheduled values at ``clock``, given what latches remember; changes nothing."""
        return self.program.at(clock, self._latches)

    def apply(self, clock: Clock) -> list[Change]:
        """Set the model to the scheduled values of ``clock`` and return what changed; switches come before values.

        The first call after construction writes everything.
        """
        self._applied = clock
        values = self._values
        if values and not self.program.latches:  # what has no line never changes again
            changes: list[Change] = []
            for name, part, is_on in self.program.switch_lines:
                on = is_on(part(clock))
                if values.get(name) != on:
                    self._deliver(name, on, changes)
            if changes:
                self._refreeze(changes)
            setters = self._setters
            for name, part, value_of in self.program.value_lines:
                value = value_of(part(clock))
                if values.get(name) != value:
                    if name in setters:
                        setters[name](value)
                    values[name] = value
                    changes.append(Change(name, value))
            return changes
        if self.program.latches:
            self._latches = self.program.advance(self._latches, clock)
        return self._write(clock)

    def _deliver(self, name: str, value: bool | float, changes: list[Change]) -> None:
        if name in self._setters:
            self._setters[name](value)
        self._values[name] = value
        changes.append(Change(name, value))

    def _refreeze(self, changes: list[Change]) -> None:
        """Freeze anew where anything was switched: parameters that appeared, too, and each part after what it is a part of."""
        if any(isinstance(value, bool) for _, value in changes):
            for label, freeze in self._freezers.items():
                freeze(bool(self._values[label]))

    def reconcile(self) -> list[Change]:
        """After :meth:`load_state_dict`: set the model to what the last update had, whatever the checkpoint held."""
        return self._write(self._applied) if self._applied is not None else []

    def _write(self, clock: Clock) -> list[Change]:
        changes: list[Change] = []
        now = self.program.at(clock, self._latches)
        if not self._values and self._resize is not None:  # weights that were loaded may have grown
            grown = grown_to(subject for subject in self.program.switches if now[subject.label])
            self._resize(at_most=grown or None)
        for name, value in now.items():
            if self._values.get(name) != value:  # no value equals None
                self._deliver(name, value, changes)
        self._refreeze(changes)
        return changes

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Show latches the metrics of the update just made; they decide before the next one."""
        if self.program.latches:
            seen = {name: self.broadcast(metrics[name]) for name in sorted(self.program.watched) if name in metrics}
            self._latches = self.program.observe(self._latches, seen)

    def metrics(self) -> dict[str, float]:
        """Return the scheduled values as metrics: ``schedule/route_temp``, ``schedule/moe_enabled`` (0 or 1) and so on."""
        return {f"schedule/{name}": float(value) for name, value in self._values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs; curve values are no part of it, they are computed anew."""
        return {
            "horizon": asdict(self.program.horizon),
            "applied": asdict(self._applied) if self._applied else None,
            "on": {name: value for name, value in self._values.items() if isinstance(value, bool)},
            "latches": {subject.label: state.as_dict() for subject, state in self._latches.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state; then :meth:`reconcile` sets the model to it.

        Raises:
            ConfigError: the horizon has changed and ``on_horizon_change`` is ``error``.
        """
        saved = Horizon(**state["horizon"])
        self._values = {}
        self._applied = Clock(**state["applied"]) if state["applied"] else None
        labels = {subject.label: subject for subject in self.program.latches}
        self._latches = {
            labels[label]: LatchState.from_dict(values) for label, values in state["latches"].items() if label in labels
        }
        if saved == self.planned:
            return
        policy = self.curriculum.on_horizon_change
        if policy == "error":
            raise ConfigError(horizon_changed(saved, self.planned))
        if policy == "keep_absolute":
            self.program = Program(self.curriculum, saved, modules=self.program.modules)


def horizon_changed(saved: Horizon, planned: Horizon) -> str:
    """Return the message of a resume that has another length than its checkpoint."""
    return (
        f"The checkpoint was made for {saved}, this run has {planned}: every anneal would bend. "
        "Say what is meant: schedule.on_horizon_change=rescale computes the curves over the new length, "
        "schedule.on_horizon_change=keep_absolute keeps them as they were and holds their ends."
    )


def _freezer(freeze: Callable[[str, bool], None], pattern: str) -> Callable[[bool], None]:
    return lambda frozen: freeze(pattern, frozen)


def _grower(resize: Callable[..., None], subject: Subject) -> Callable[[bool], None]:
    def set_grown(on: bool) -> None:
        if on:
            resize(at_least=subject.experts)

    return set_grown


def _all_of(setters: list[Callable[[float], None]]) -> Callable[[float], None]:
    def set_all(value: float) -> None:
        for setter in setters:
            setter(value)

    return set_all
