"""A curriculum bound to a horizon: the scheduled values at a clock, and everything that can be said before a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from operator import attrgetter
from typing import Any

from apt_model.errors import ConfigError, nearest
from apt_model.schedule.clock import Clock, Horizon
from apt_model.schedule.spec import Curriculum, When
from apt_model.schedule.targets import ALIASED, BINDINGS, DOMAINS, MODULES, OF_EXPERTS, Domain, common, covers, matching
from apt_model.schedule.times import Time


@dataclass(frozen=True)
class Subject:
    """What switches: a module (``enabled``, ``grown16``) or the parameters that a pattern means (``frozen``)."""

    name: str
    state: str  # enabled, frozen, grown16: to 16 experts

    @classmethod
    def of(cls, label: str) -> Subject:
        """Return the subject with that :attr:`label`."""
        return cls(*label.rsplit("_", 1))

    @property
    def experts(self) -> int | None:
        """How many experts it has once it has grown; None: this is no growth."""
        return int(self.state.removeprefix("grown")) if self.state.startswith("grown") else None

    @property
    def label(self) -> str:
        """Its name among scheduled values and metrics: ``moe_enabled``."""
        return f"{self.name}_{self.state}"

    def event(self, on: bool) -> str:
        """The name that times after it use: ``moe.enabled``, ``blocks.0.unfrozen``."""
        verbs = {("enabled", False): "disabled", ("frozen", False): "unfrozen"}
        return f"{self.name}.{verbs.get((self.state, on), self.state)}"

    def words(self, on: bool) -> str:
        """Return the switch as messages name it: ``moe enabled``, ``blocks.0 trained again``, ``moe grown to 16 experts``."""
        if self.experts is not None:
            return f"{self.name} {'grown to' if on else 'below'} {self.experts} experts"
        verbs = ("enabled", "disabled") if self.state == "enabled" else ("frozen", "trained again")
        return f"{self.name} {verbs[0] if on else verbs[1]}"


def grown_to(subjects: Iterable[Subject]) -> int:
    """Return how many experts there are by what has happened to ``subjects``; 0: none has grown."""
    return max((subject.experts or 0 for subject in subjects), default=0)


@dataclass(frozen=True)
class Switch:
    """One timed event of a subject."""

    key: str
    at: Time
    on: bool


@dataclass(frozen=True)
class LatchState:
    """What a latch remembers."""

    on: bool = False
    smoothed: float | None = None
    flipped: Clock | None = None  # the last time it changed
    first_on: Clock | None = None
    first_off: Clock | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatchState:
        """Undo :meth:`as_dict`."""
        clocks = {
            name: Clock(**values[name]) if values[name] else None for name in ("flipped", "first_on", "first_off")
        }
        return cls(on=values["on"], smoothed=values["smoothed"], **clocks)


SwitchLine = tuple[str, Callable[[Clock], Any], Callable[[Any], bool]]
ValueLine = tuple[str, Callable[[Clock], Any], Callable[[float], float]]


class Program:
    """Pure functions of the clock (and of what latches remember) for one curriculum over one horizon.

    Args:
        key: where the curriculum stands in the config.
        modules: names of what can be enabled.

    Raises:
        ConfigError: something of the curriculum cannot happen within the horizon.
    """

    def __init__(
        self, curriculum: Curriculum, horizon: Horizon, *, key: str = "schedule", modules: Iterable[str] = MODULES
    ) -> None:
        self.curriculum = curriculum
        self.horizon = horizon
        self.key = key
        self.modules = tuple(modules)
        self.switches: dict[Subject, list[Switch]] = {Subject(module, "enabled"): [] for module in self.modules}
        self.latches: dict[Subject, When] = {}
        self._latch_keys: dict[Subject, str] = {}
        problems = self._read_events()
        self._deciding = self._put_wholes_first()
        self.fired, unresolved = self._fire_planned()
        self._check_names(unresolved, problems)
        problems += [*self._misplaced_events(), *self._misplaced_freezes()]
        for name, spec in curriculum.all_anneals.items():
            domain = DOMAINS.get(curriculum.target_of(name))
            problems += spec.problems(curriculum.key_of(name, key), horizon, domain, self.fired)
        if problems:
            raise ConfigError(*problems)
        # laid out once: names, what of the clock they go by, and the function of it
        self._off: dict[str, bool | float] = {subject.label: False for subject in self.switches}
        self.switch_lines = [
            self._switch_line(subject, switches)
            for subject, switches in self._deciding.items()
            if switches and all(self._is_planned(switch.at) for switch in switches)
        ]
        self.value_lines = self._lay_out_values(self.fired)
        self._value_lines_after = {frozenset(self.fired.items()): self.value_lines}  # by what has happened when

    def _switch_line(self, subject: Subject, switches: list[Switch]) -> SwitchLine:
        thresholds = [(*self._threshold(switch.at), switch.on) for switch in self._in_order(switches, self.fired)]
        unit, count, on = thresholds[0]
        if len(thresholds) == 1 and on:
            return subject.label, attrgetter(unit), count.__le__
        return subject.label, lambda clock: clock, _last_reached(thresholds)

    def _lay_out_values(self, fired: Mapping[str, Clock]) -> list[ValueLine]:
        return [
            (name, attrgetter(spec.by), spec.curve(self.horizon, fired).at)
            for name, spec in self.curriculum.all_anneals.items()
        ]

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read_events(self) -> list[str]:
        """Sort events by subject; one arbiter each: times, or one latch."""
        problems = []
        latched = self._latch_keys
        for name, event in self.curriculum.all_events().items():
            where = f"{self.key}.{name}"
            state, on = event.state
            subject = Subject(event.subject, state)
            if state != "frozen" and subject.name not in self.modules:
                problems.append(
                    f"{where}: there is no module {subject.name!r}. {nearest(subject.name, self.modules)}"
                    + ("" if self.modules else " Begin with schedule=none.")
                )
                continue
            if event.when is not None:
                if subject in latched or self.switches.get(subject):
                    other = latched.get(subject) or self.switches[subject][0].key
                    problems.append(self._two_writers(subject, other, where))
                    continue
                latched[subject] = where
                self.latches[subject] = event.when
                self.switches.setdefault(subject, [])
            else:
                assert event.at is not None
                if subject in latched:
                    problems.append(self._two_writers(subject, latched[subject], where))
                    continue
                self.switches.setdefault(subject, []).append(Switch(where, event.at, on))
        return problems

    def _put_wholes_first(self) -> dict[Subject, list[Switch]]:
        """Put freezes of whole things before those of their parts; return the switches by which each subject goes.

        Those of what is frozen are its own and those of all that it is a part of: the last one in time decides, and at one
        update that of the smallest part.
        """
        wholes = {
            subject: [one for one in self.switches if one.state == "frozen" and covers(one.name, subject.name)]
            for subject in self.switches
            if subject.state == "frozen"
        }
        self.switches = dict(sorted(self.switches.items(), key=lambda item: len(wholes.get(item[0], []))))
        return {
            subject: [s for one, own in self.switches.items() if one in wholes.get(subject, [subject]) for s in own]
            for subject in self.switches
        }

    def _two_writers(self, subject: Subject, one: str, other: str) -> str:
        return f"{other}: {subject.name} is switched by {one} already, and a latch shares a module with nothing. Remove one."

    def _fire_planned(self) -> tuple[dict[str, Clock], list[Switch]]:
        """Find when events happen that no latch decides; also the switches that wait for something else."""
        fired: dict[str, Clock] = {}
        waiting = [(subject, switch) for subject, switches in self.switches.items() for switch in switches]
        while True:
            ready = [
                (subject, switch)
                for subject, switch in waiting
                if switch.at.anchor is None or switch.at.anchor in fired
            ]
            if not ready:
                return fired, [switch for _, switch in waiting]
            waiting = [entry for entry in waiting if entry not in ready]
            for subject, switch in ready:
                step = switch.at.step(self.horizon, fired)
                assert step is not None
                name = subject.event(switch.on)
                if name not in fired or step < fired[name].step:
                    fired[name] = self.horizon.clock_at(step)

    def _check_names(self, unresolved: list[Switch], problems: list[str]) -> None:
        """Refuse times after an event that nothing causes."""
        known = {subject.event(on) for subject in self.switches for on in (True, False)}
        known &= {*self.fired, *(subject.event(on) for subject in self.latches for on in (True, False))}
        waiting = [(switch.key, switch.at.anchor) for switch in unresolved]
        for name, spec in self.curriculum.all_anneals.items():
            waiting += [(self.curriculum.key_of(name, self.key), anchor) for anchor in spec.anchors()]
        for where, anchor in waiting:
            if anchor is not None and anchor not in known:
                problems.append(f"{where}: waits for {anchor}, which nothing brings about. {nearest(anchor, known)}")

    def _misplaced_events(self) -> list[str]:
        """Refuse events after the end, two at once, and latches that cannot act."""
        problems = []
        steps = self.horizon.steps
        for subject, switches in self.switches.items():
            taken: dict[int, str] = {}
            for switch in switches:
                step = switch.at.step(self.horizon, self.fired)
                if step is None:
                    continue
                if step >= steps:
                    problems.append(self._too_late(switch, subject, step))
                elif step in taken:
                    problems.append(f"{switch.key}: {subject.name} is switched at step {step} by {taken[step]}, too.")
                taken.setdefault(step, switch.key)
        problems += self._misplaced_growth()
        for subject, when in self.latches.items():
            first = when.not_before.step(self.horizon, self.fired)
            if first is not None and first >= steps:
                problems.append(
                    f"{self.key}: the latch of {subject.name} may act from {when.not_before} = step {first} on, but the run "
                    f"has {self.horizon}. Set not_before earlier."
                )
            deadline = when.deadline.step(self.horizon, self.fired) if when.deadline is not None else None
            if first is not None and deadline is not None and deadline < first:
                problems.append(
                    f"{self.key}: the latch of {subject.name} has its deadline at {when.deadline} = step {deadline}, before "
                    f"{when.not_before} = step {first}, from which on it may act. Set not_before earlier or deadline later."
                )
        return problems

    def _misplaced_freezes(self) -> list[str]:
        """Refuse freezes that meet in parameters where none is of a part of the other, and what trains again without one."""
        problems = []
        frozen = {subject: switches for subject, switches in self.switches.items() if subject.state == "frozen"}
        for one, other in combinations(frozen, 2):
            shared = common(one.name, other.name)
            keys = [self._latch_keys.get(subject) or frozen[subject][0].key for subject in (one, other)]
            if shared is not None and (one in self.latches or other in self.latches):
                problems.append(
                    f"{keys[1]}: {other.name} and {one.name} ({keys[0]}) have {shared} in common, and a latch shares parameters "
                    "with nothing. Remove one."
                )
            elif shared not in (None, one.name, other.name):
                problems.append(
                    f"{keys[1]}: {other.name} and {one.name} ({keys[0]}) have {shared} in common, and neither is a part of the "
                    f"other. In place of one of them name its parts without {shared}."
                )
        for subject, switches in frozen.items():
            begins = [
                (switch.at.step(self.horizon, self.fired) or 0) if switch.on else self.horizon.steps
                for other, others in frozen.items()
                if common(other.name, subject.name) is not None
                for switch in others
            ]
            for switch in switches:
                step = switch.at.step(self.horizon, self.fired)
                if not switch.on and min(begins) > (self.horizon.steps - 1 if step is None else step):
                    when = "" if step is None else f" before step {step}"
                    problems.append(
                        f"{switch.key}: nothing freezes {subject.name}{when}, so it cannot train again. Freeze it earlier, such "
                        f"as with {{freeze: {subject.name}, at: 0st}}, or remove this."
                    )
        return problems

    def growths(self, module: str) -> list[Subject]:
        """Return the growths of ``module``, by how many experts it then has."""
        found = [subject for subject in self.switches if subject.name == module and subject.experts is not None]
        return sorted(found, key=lambda subject: subject.experts or 0)

    def _misplaced_growth(self) -> list[str]:
        """Refuse growth of what is not enabled, and that which does not go upwards."""
        problems = []
        for module in self.modules:
            growths = self.growths(module)
            before, what = self.first_step(module), f"{module} is enabled"
            for subject in growths:
                key = self.switches[subject][0].key
                clock = self.fired.get(subject.event(True))
                if not self.ever_enabled(module):
                    problems.append(
                        f"{key}: {module} is never enabled, so it cannot grow. Enable it before, or remove this."
                    )
                elif clock is None and len(growths) > 1:
                    problems.append(
                        f"{key}: when it happens is not known, and {module} grows more than once. Give it a time."
                    )
                elif clock is not None and before is not None and clock.step <= before:
                    problems.append(
                        f"{key}: {module} would grow to {subject.experts} experts at step {clock.step}, and not after step "
                        f"{before}, at which {what}. Let it grow later, or leave it out."
                    )
                before = before if clock is None else clock.step
                what = f"it grows to {subject.experts}"
        return problems

    def _too_late(self, switch: Switch, subject: Subject, step: int) -> str:
        unit = "epoch" if switch.at.unit == "epoch" and switch.at.anchor is None else "step"
        length = self.horizon.length("epoch" if unit == "epoch" else "step")
        at = f"{switch.at.amount}" if switch.key.endswith(("_epoch", "_step")) else f"{switch.at} (step {step})"
        remedy = f"Set it to {length - 1} or less, to null to leave {subject.name} as it is"
        if not switch.key.endswith(("_epoch", "_step")):
            remedy = f"Set its time to {self.horizon.steps - 1}st or earlier, or remove it"
        return (
            f"{switch.key} = {at} would never happen: the run has {length} {unit}s ({self.horizon}), so its last {unit} is "
            f"{length - 1}. {remedy}, or make the run longer with trainer.max_epochs."
        )

    def check_targets(self, targets: Mapping[str, Domain], parameters: Iterable[str] = ()) -> None:
        """Check what the curriculum writes and freezes against what a model has.

        Args:
            targets: every target of the model and its domain.
            parameters: names of modules and parameters that can be frozen; empty: not checked.

        Raises:
            ConfigError: a name means nothing, a value leaves its domain, or two anneals write one target.
        """
        problems: list[str] = []
        writers: dict[str, str] = {}
        for name, spec in self.curriculum.all_anneals.items():
            where = self.curriculum.key_of(name, self.key)
            pattern = self.curriculum.target_of(name)
            meant = matching(pattern, targets)
            if not meant:
                what = (
                    f"the model has no {ALIASED[pattern]}" if pattern in ALIASED else f"nothing is called {pattern!r}"
                )
                problems.append(f"{where}.target: {what}. {nearest(pattern, targets)}")
                continue
            domain = targets[meant[0]]
            problems += spec.problems(where, self.horizon, domain, self.fired)
            for target in meant:
                if target in writers:
                    problems.append(f"{where}: {target} is written by {writers[target]} already. Remove one of them.")
                writers.setdefault(target, where)
        names = list(parameters)
        for subject, switches in self.switches.items():
            if names and subject.state == "frozen" and not matching(subject.name, names):
                key = switches[0].key if switches else self._latch_keys[subject]
                problems.append(f"{key}: no parameters are called {subject.name!r}. {nearest(subject.name, names)}")
        if problems:
            raise ConfigError(*dict.fromkeys(problems))

    # --- scheduled values --------------------------------------------------------------------------------------------

    def _is_planned(self, at: Time) -> bool:
        return at.anchor is None or at.anchor in self.fired

    def _in_order(self, switches: list[Switch], fired: Mapping[str, Clock]) -> list[Switch]:
        return sorted(switches, key=lambda switch: switch.at.step(self.horizon, fired) or 0)

    def _threshold(self, at: Time) -> tuple[str, int]:
        """Return a planned time as the clock's field and the count from which on it is reached."""
        if at.anchor is None and (
            at.unit in ("step", "sample", "token") or (at.unit == "epoch" and at.amount.denominator == 1)
        ):
            return at.unit, math.ceil(at.amount)
        step = at.step(self.horizon, self.fired)
        assert step is not None
        return "step", step

    def at(self, clock: Clock, latches: Mapping[Subject, LatchState] | None = None) -> dict[str, bool | float]:
        """Return the scheduled values at ``clock``: labels of subjects to on or off, then names of anneals to values.

        A pure function of its arguments, in whatever order it is asked.
        """
        state = self._off.copy()
        for name, part, on in self.switch_lines:
            state[name] = on(part(clock))
        value_lines = self.value_lines
        if self.latches:
            fired = self._fired_with(latches or {})
            self._add_latched(state, clock, latches or {}, fired)
            value_lines = self._value_lines(fired)
        for name, part, value in value_lines:
            state[name] = value(part(clock))
        return state

    def _value_lines(self, fired: dict[str, Clock]) -> list[ValueLine]:
        """Return the curves once ``fired`` has happened: those that wait for an event begin with it."""
        happened = frozenset(fired.items())
        if happened not in self._value_lines_after:
            self._value_lines_after[happened] = self._lay_out_values(fired)
        return self._value_lines_after[happened]

    def _add_latched(
        self,
        state: dict[str, bool | float],
        clock: Clock,
        latches: Mapping[Subject, LatchState],
        fired: Mapping[str, Clock],
    ) -> None:
        """Add to ``state`` what latches decide, and what waits for them."""
        for subject, switches in self._deciding.items():
            if subject in self.latches:
                state[subject.label] = latches.get(subject, LatchState()).on
            elif not all(self._is_planned(switch.at) for switch in switches):
                reached = [switch for switch in switches if switch.at.reached(clock, self.horizon, fired)]
                if reached:
                    state[subject.label] = self._in_order(reached, fired)[-1].on

    def _fired_with(self, latches: Mapping[Subject, LatchState]) -> dict[str, Clock]:
        """Return when events happened, those of latches and what came after them included."""
        fired = dict(self.fired)
        for subject, latch in latches.items():
            for on, clock in ((True, latch.first_on), (False, latch.first_off)):
                if clock is not None:
                    fired[subject.event(on)] = clock
        for subject, switches in self.switches.items():
            for switch in switches:
                step = switch.at.step(self.horizon, fired)
                if step is not None and not self._is_planned(switch.at):
                    fired.setdefault(subject.event(switch.on), self.horizon.clock_at(step))
        return fired

    def advance(self, latches: Mapping[Subject, LatchState], clock: Clock) -> dict[Subject, LatchState]:
        """Let every latch decide at ``clock`` by what it has seen; return the new states."""
        decided = dict(latches)
        for subject, when in self.latches.items():
            state = decided.get(subject, LatchState())
            fired = self._fired_with(decided)
            wanted = state.on
            if (
                when.deadline is not None
                and state.first_on is None
                and when.deadline.reached(clock, self.horizon, fired)
            ):
                wanted = True
            elif state.smoothed is not None and when.not_before.reached(clock, self.horizon, fired):
                held = state.flipped is None or replace(when.hold, anchor="flip").reached(
                    clock, self.horizon, {"flip": state.flipped}
                )
                if held:
                    wanted = when.triggered(state.smoothed) if not state.on else not when.released(state.smoothed)
            if wanted != state.on:
                decided[subject] = replace(
                    state,
                    on=wanted,
                    flipped=clock,
                    first_on=state.first_on or (clock if wanted else None),
                    first_off=state.first_off or (None if wanted else clock),
                )
            else:
                decided[subject] = state
        return decided

    def observe(self, latches: Mapping[Subject, LatchState], metrics: Mapping[str, float]) -> dict[Subject, LatchState]:
        """Let every latch see ``metrics``; return the new states."""
        seen = dict(latches)
        for subject, when in self.latches.items():
            if when.metric in metrics:
                state = seen.get(subject, LatchState())
                value = metrics[when.metric]
                smoothed = value if state.smoothed is None else when.smooth * state.smoothed + (1 - when.smooth) * value
                seen[subject] = replace(state, smoothed=smoothed)
        return seen

    @property
    def watched(self) -> set[str]:
        """The metrics that latches need after each update."""
        return {when.metric for when in self.latches.values()}

    # --- before a run ------------------------------------------------------------------------------------------------

    def first_step(self, module: str) -> int | None:
        """Return the first planned update with ``module`` enabled; None: never, or a latch decides."""
        clock = self.fired.get(f"{module}.enabled")
        return clock.step if clock and Subject(module, "enabled") not in self.latches else None

    def notes(self) -> list[str]:
        """Return what is allowed and probably a mistake: values that never change, anneals that nothing reads, duplicates."""
        notes = []
        steps = self.horizon.steps
        samples = sorted({*range(0, steps, max(1, steps // 256)), steps - 1})
        clocks = [self.horizon.clock_at(step) for step in samples]
        drawn: dict[tuple[float, ...], str] = {}
        for name, spec in self.curriculum.all_anneals.items():
            where = self.curriculum.key_of(name, self.key)
            curve = spec.curve(self.horizon, self.fired)
            values = tuple(curve(getattr(clock, spec.by)) for clock in clocks)
            waits = any(anchor not in self.fired for anchor in spec.anchors())
            if len(set(values)) == 1 and not waits and steps > 1:
                notes.append(f"{where} never changes: it is {values[0]:g} over the whole run.")
            elif values in drawn:
                notes.append(f"{where} has the values of {drawn[values]} over the whole run.")
            drawn.setdefault(values, where)
            module = reader_of(self.curriculum, name)
            if module is not None and not self.ever_enabled(module):
                notes.append(f"{where} anneals what nothing reads: {module} is never enabled.")
        for subject, switches in self.switches.items():
            if subject.state == "enabled" and switches and not any(switch.on for switch in switches):
                notes.append(f"{switches[0].key} disables {subject.name}, which nothing enables.")
        for subject, when in self.latches.items():
            deadline = when.deadline.step(self.horizon, self.fired) if when.deadline is not None else None
            if deadline is not None and deadline >= steps:
                notes.append(
                    f"{self.key}: the deadline of {subject.name}'s latch is after the run's end ({self.horizon})."
                )
        return notes

    def ever_enabled(self, module: str) -> bool:
        """Return whether ``module`` can be enabled at some update."""
        subject = Subject(module, "enabled")
        return subject in self.latches or any(switch.on for switch in self.switches.get(subject, []))


def reader_of(curriculum: Curriculum, anneal: str) -> str | None:
    """Return the module that reads what ``anneal`` writes; None: it is always read."""
    if anneal in BINDINGS:
        return BINDINGS[anneal][1]
    target = curriculum.target_of(anneal)
    first, last = target.split(".")[0], target.rsplit(".", 1)[-1]
    if first in ("align", "voter"):
        return first
    return "moe" if last in OF_EXPERTS else None


def _last_reached(thresholds: list[tuple[str, int, bool]]) -> Callable[[Clock], bool]:
    def on(clock: Clock) -> bool:
        state = False
        for unit, count, value in thresholds:
            if getattr(clock, unit) >= count:
                state = value
        return state

    return on
