"""Up to which update two runs are one run: all that is computed before it is equal, to the bit.

The scheduled values at an update are a pure function of the clock, and a resume is exact. So what two runs have in common can
be trained once, and each continue from there (stage trees: Hippo, arXiv:2006.11972, which merges equal values). Here a value
counts only where it is read: a router's temperature is not, while the layers are dense.
"""

from __future__ import annotations

import hashlib
import itertools
import marshal
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

from apt_model.schedule.clock import Clock
from apt_model.schedule.program import Program, reader_of


class Reach(Enum):
    """Which updates a key of the config can change."""

    ALL = "all"
    NONE = "none"
    SCHEDULED = "as the curriculum, the learning rate and the length that follow from it say"
    MOE = "those at which moe is enabled"
    ALIGN = "those at which align is enabled"
    VOTER = "those at which voter is enabled"

    @property
    def module(self) -> str | None:
        """The module without which nothing reads the key."""
        return self.name.lower() if self in (Reach.MOE, Reach.ALIGN, Reach.VOTER) else None


class Update(NamedTuple):
    """An update, as far as a config says."""

    computes: bytes
    """A digest of what is read at it, in the form in which it is read: equal ones compute the same."""
    states: Mapping[str, bool]
    """Whether each module is enabled, and what is frozen, by label."""
    has_row: bool
    """Whether the record has a row of it."""


@dataclass(frozen=True)
class Course:
    """What a run will do, as far as its config says.

    Args:
        program: its curriculum over its length.
        values: what decides its result: dotted keys to values.
        reach: of each of these keys.
        lr: the learning rate at a clock.
        log_every: updates between two rows of the record.
    """

    program: Program
    values: Mapping[str, Any]
    reach: Callable[[str], Reach]
    lr: Callable[[Clock], float]
    log_every: int

    @cached_property
    def foreseen(self) -> _Foreseen:
        """What is computed up to the first update at which a latch may act; one course is compared with many."""
        by_module: dict[str | None, list[Any]] = {}
        for key in sorted(self.values):
            reach, value = self.reach(key), self.values[key]
            if value is not None and (reach is Reach.ALL or reach.module is not None):
                by_module.setdefault(reach.module, []).append((key, _plain(value)))
        modules = {f"{name}_enabled": _digest(values) for name, values in by_module.items() if name is not None}
        before = _digest((by_module.get(None), sorted(_remembered(self.program).items())))
        digests, rows = [], []
        for update in itertools.islice(self.walk(), _foreseen(self.program)):
            read = [digest for name, digest in modules.items() if update.states.get(name)]
            before = _digest((before, update.computes, read))
            digests.append(before)
            rows.append("1" if update.has_row else "0")
        return _Foreseen(tuple(digests), int("".join(reversed(rows)) or "0", 2))

    def walk(self) -> Iterator[Update]:
        """Yield each update."""
        program = self.program
        read_by = {name: reader_of(program.curriculum, name) for name in program.curriculum.all_anneals}
        double = {name for name in read_by if program.curriculum.target_of(name).startswith("optimizer.")}
        before: dict[str, bool | float] = {}
        states: dict[str, bool] = {}
        epochs = program.horizon.updates_per_epoch
        for step in range(program.horizon.steps):
            clock = program.horizon.clock_at(step)
            now = program.at(clock)
            states_now = {name: value for name, value in now.items() if isinstance(value, bool)}
            switched = states_now != states
            states = states_now if switched else states  # one for many updates
            regular = step % self.log_every == 0 or (step + 1) % epochs == 0 or switched
            # buffers hold float32; the optimizer takes the number as it is
            read = tuple(
                (program.curriculum.target_of(name), float(value) if name in double else struct.pack("f", value))
                for name, value in now.items()
                if name in read_by and (read_by[name] is None or now.get(f"{read_by[name]}_enabled", True))
            )
            everything = (
                clock.epoch,
                clock.step,
                clock.sample,
                clock.token,
                sorted(states.items()),
                read,
                float(self.lr(clock)),
                regular,
            )
            yield Update(_digest(everything), states, regular or now != before)
            before = now


class _Foreseen(NamedTuple):
    """The first updates of a course."""

    digests: tuple[bytes, ...]
    """Of each update and all before it, with the values of the config that they read."""
    rows: int
    """A bit for each, from the lowest on: whether the record has a row of it."""


def _digest(content: Any) -> bytes:
    """Return a digest of plain values; of the second format, which goes by values alone."""
    return hashlib.blake2b(marshal.dumps(content, 2), digest_size=16).digest()


def _plain(value: Any) -> Any:
    """Return a value of a config in a form that is the same for equal ones: 1 and 1.0 are."""
    if isinstance(value, Mapping):
        return sorted((key, _plain(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return float(value) if isinstance(value, int) and abs(value) < 1 << 53 else value


def shared_updates(whole: Course, fork: Course) -> int:
    """Return how many first updates of ``whole`` are those of ``fork``, its rows of the record among them.

    Latches go by what is measured: nothing is shared from the first update on at which one may act, nor where they remember
    different things.
    """
    (ours, our_rows), (theirs, their_rows) = whole.foreseen, fork.foreseen
    equal = bisect_left(range(min(len(ours), len(theirs))), True, key=lambda step: ours[step] != theirs[step])
    lacking = their_rows & ~our_rows & ((1 << equal) - 1)
    return equal if not lacking else (lacking & -lacking).bit_length() - 1


def _remembered(program: Program) -> dict[str, tuple[str, float]]:
    """Return of which metric each latch remembers what, by what it switches."""
    return {subject.label: (when.metric, when.smooth) for subject, when in program.latches.items()}


def _foreseen(program: Program) -> int:
    """Return the number of updates before the first at which a latch may act."""
    firsts = [program.horizon.steps]
    for when in program.latches.values():
        for time in (when.not_before, when.deadline):
            if time is not None:
                step = time.step(program.horizon, program.fired)
                firsts.append(0 if step is None else step)
    return min(firsts)
