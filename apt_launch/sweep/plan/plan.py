"""``plan.yaml``: the jobs of a sweep, each with its whole config, as they were planned."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from apt_launch.sweep.application import HYDRA_MAIN, TRAINER, Awaited, Fork, Program, Resources
from apt_launch.sweep.plan.jobs import Job
from apt_launch.values import flatten, from_yaml, to_yaml, unflatten
from apt_model.errors import ConfigError
from apt_model.files import STRICT, from_json, read_regular, refuse_newer, write_atomic

MOST_BYTES: Final = 1 << 28
"""Of a plan; one of 10,000 jobs has a few per cent of that."""

VERSION: Final = 2
"""Of the format, see docs/reference/files.md; a plan of earlier versions of this program names none, and is of the first.
A plan in which no job begins with updates of another is of the first, too."""

REMEDY: Final = (
    "Restore it from a copy, or start the sweep anew in another folder: each job's folder has its own config.yaml."
)


@dataclass(frozen=True)
class _KeptJob:
    """The schema of a job in ``plan.yaml``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    number: int
    identity: str
    overrides: tuple[str, ...]
    resources: Resources
    steps: int
    config: dict[str, Any]
    folder: str | None = None  # what number and identity say, for people
    fork: Fork | None = None

    def __post_init__(self) -> None:
        """Refuse a job whose folder would lead out of the sweep's, and numbers that mean nothing."""
        if not re.fullmatch("[0-9A-Za-z]+", self.identity):
            raise ValueError(f"its identity {self.identity!r} is no hexadecimal number")
        if min(self.number, self.steps) < 0:
            raise ValueError("its number and its steps cannot be negative")
        if self.folder not in (None, self.job.folder):
            raise ValueError(f"its folder {self.folder!r} is not the one that its number and identity say")
        if self.fork is not None and not self.fork.update <= self.steps:
            raise ValueError(f"it begins at update {self.fork.update}, and has {self.steps}")
        amounts = asdict(self.resources).values()
        if any(not (math.isfinite(amount) and amount >= 0) for amount in amounts if amount is not None):
            raise ValueError("its resources cannot be negative or endless")

    @property
    def job(self) -> Job:
        """The job that it stands for."""
        return Job(self.number, self.identity, self.overrides, self.config, self.resources, self.steps, fork=self.fork)


@dataclass(frozen=True)
class _KeptPlan:
    """The schema of ``plan.yaml``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    id: str
    created: str
    command: tuple[str, ...]
    launcher: Literal["local", "slurm"]
    launcher_values: dict[str, Any]
    cwd: str
    asked: int
    shared: dict[str, Any]
    jobs: tuple[_KeptJob, ...]
    application: str = TRAINER
    flags: tuple[str, ...] = ()
    version: int = VERSION
    program: Program | None = None
    order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a plan without jobs, and one whose jobs share a folder."""
        if not self.jobs:
            raise ValueError("it has no jobs")
        if len({job.number for job in self.jobs}) < len(self.jobs):
            raise ValueError("two of its jobs have one number")
        begins = {job.job.folder: job.job.begins for job in self.jobs}
        for job in self.jobs:
            if job.fork is None or job.fork.sweep is not None:
                continue
            if job.fork.job not in begins or not begins[job.fork.job] < job.fork.update:  # which leaves no circle
                raise ValueError(
                    f"job {job.number} begins with {job.fork.job}, which is no job that comes so far itself"
                )
        if not 1 <= self.version <= VERSION:
            raise ValueError(f"its version cannot be {self.version}")
        if (self.application == HYDRA_MAIN) != (self.program is not None):
            raise ValueError("it names no program, or one that its application does not take")


@dataclass(frozen=True)
class Plan:
    """A sweep. ``shared`` are the values that all jobs have, flat; a job's config is these and what ``differs``."""

    id: str
    created: str
    command: tuple[str, ...]
    launcher: str
    launcher_values: Mapping[str, Any]
    cwd: str  # where relative paths start
    asked: int
    application: str  # see apt_launch.sweep.application.load
    shared: Mapping[str, Any]
    jobs: tuple[Job, ...]
    flags: tuple[str, ...] = ()  # of the command: where configs are
    program: Program | None = None  # of applications that stand for any
    order: tuple[str, ...] = ()  # of keys, where it means something; others follow
    secrets: Mapping[str, Any] = field(
        default_factory=dict, repr=False, compare=False
    )  # of configs, by number; not written here

    @cached_property
    def by_folder(self) -> dict[str, Job]:
        """The jobs by the names of their folders."""
        return {job.folder: job for job in self.jobs}

    @property
    def summary(self) -> str:
        """How many jobs were asked for, and how many differ."""
        return f"{self.asked} asked, {len(self.jobs)} unique"

    @property
    def gpu_hours(self) -> float:
        """The most that all jobs together may take."""
        return sum(job.resources.gpu_hours for job in self.jobs)

    def awaited(self, job: Job) -> tuple[Awaited, ...]:
        """Return the updates of ``job`` from which others begin."""
        found = self._begun.get(job.folder, {})
        return tuple(Awaited(update, tuple(found[update])) for update in sorted(found))

    @cached_property
    def _begun(self) -> dict[str, dict[int, list[str]]]:
        """By folder and update, the jobs that begin with what another one was then."""
        found: dict[str, dict[int, list[str]]] = {}
        for job in self.jobs:
            if job.fork is not None and job.fork.sweep is None:
                found.setdefault(job.fork.job, {}).setdefault(job.fork.update, []).append(job.folder)
        return found

    def check_numbers(self, numbers: Sequence[int]) -> None:
        """Make sure that there are jobs with these numbers.

        Raises:
            ConfigError: one is no job's.
        """
        known = {job.number for job in self.jobs}
        if missing := sorted({*numbers} - known):
            raise ConfigError(
                f"there is no job {missing[0]} in this sweep; its jobs have the numbers 0 to {max(known)}."
            )

    def values(self, job: Job) -> dict[str, Any]:
        """Return the job's whole config, nested as in YAML."""
        flat = {**self.shared, **job.differs}
        return unflatten({key: flat[key] for key in self.order if key in flat} | flat)

    def write(self, folder: Path) -> None:
        """Freeze it as ``plan.yaml`` in ``folder``."""
        content: dict[str, Any] = {
            "version": VERSION if any(job.fork is not None for job in self.jobs) else 1,
            "id": self.id,
            "created": self.created,
            "command": list(self.command),
            "flags": list(self.flags),
            "launcher": self.launcher,
            "launcher_values": dict(self.launcher_values),
            "cwd": self.cwd,
            "asked": self.asked,
            "application": self.application,
            "shared": unflatten(self.shared),
            "jobs": [
                {
                    "number": job.number,
                    "folder": job.folder,
                    "identity": job.identity,
                    "overrides": list(job.overrides),
                    "resources": asdict(job.resources),
                    "steps": job.steps,
                    "config": dict(job.differs),
                }
                | ({} if job.fork is None else {"fork": asdict(job.fork)})
                for job in self.jobs
            ],
        }
        if self.program is not None:
            content["program"] = asdict(self.program) | {
                key: list(getattr(self.program, key)) for key in ("neutral", "preload")
            }
            content["order"] = list(self.order)
        head = f"# {self.summary}. A job's config: what all share, and under its own config, by dotted key, what differs.\n"
        write_atomic(folder / "plan.yaml", head + to_yaml(content))

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read the plan of the sweep in ``folder``.

        Raises:
            ConfigError: there is none, it is damaged, or of a later version.
        """
        path = folder / "plan.yaml"
        try:
            content = from_yaml(read_regular(path, MOST_BYTES).decode("utf-8"))
            refuse_newer(content, VERSION, str(path))
            kept = from_json(json.dumps(content), _KeptPlan, where=str(path), remedy=REMEDY)
            return cls(
                id=kept.id,
                created=kept.created,
                command=kept.command,
                flags=kept.flags,
                launcher=kept.launcher,
                launcher_values=kept.launcher_values,
                cwd=kept.cwd,
                asked=kept.asked,
                application=kept.application,
                program=kept.program,
                order=kept.order,
                shared=flatten(kept.shared),
                jobs=tuple(job.job for job in kept.jobs),
            )
        except FileNotFoundError:
            near = sorted(p.parent for p in folder.parent.glob("*/plan.yaml")) if folder.parent.is_dir() else []
            hint = f" There is one in {near[-1]}." if near else ""
            raise ConfigError(f"{folder}: there is no sweep here, for it has no plan.yaml.{hint}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: damaged ({error}). {REMEDY}") from None

    def joined(self, other: Plan) -> Plan:
        """Return this plan with the jobs of ``other`` after its own, for a sweeper that asks in batches."""
        all_of = [(job, {**plan.shared, **job.differs}) for plan in (self, other) for job in plan.jobs]
        numbered = [(replace(job, number=number), values) for number, (job, values) in enumerate(all_of)]
        joined = replace(self.with_values(numbered), asked=self.asked + other.asked)
        return replace(joined, secrets={**self.secrets, **other.secrets})

    def with_values(self, jobs: Sequence[tuple[Job, Mapping[str, Any]]]) -> Plan:
        """Return this plan with ``jobs``, each with its whole config, flat."""
        shared = shared_values([values for _, values in jobs])
        return replace(self, shared=shared, jobs=tuple(replace(j, differs=without(v, shared)) for j, v in jobs))


def merged_order(flats: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the keys of all of ``flats``, each after the one that it follows where it was first seen."""
    after: dict[str | None, list[str]] = {None: []}
    for flat in flats:
        before: str | None = None
        for key in flat:
            if key not in after:
                after[before].insert(0, key)
                after[key] = []
            before = key
    ordered: list[str] = []
    waiting = list(reversed(after[None]))
    while waiting:
        key = waiting.pop()
        ordered.append(key)
        waiting += reversed(after[key])
    return tuple(ordered)


def shared_values(flats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all of ``flats`` have, with equal types, also within lists: ``[1]`` is not ``[1.0]``, and 0.0 not -0.0."""
    first, *others = flats
    found = {}
    for key, value in first.items():
        written = repr(value)
        if all(key in flat and repr(flat[key]) == written for flat in others):
            found[key] = value
    return found


def without(flat: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``flat`` has and ``shared`` has not."""
    return {key: value for key, value in flat.items() if key not in shared}
