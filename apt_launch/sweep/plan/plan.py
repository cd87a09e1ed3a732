"""What a sweep does: every job composed and checked before one is sent, each different one once, frozen in ``plan.yaml``."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_launch.config.run_config import RunConfig
from apt_launch.sweep.plan.composer import Composer, groups_of
from apt_launch.sweep.values import flatten, from_yaml, to_yaml, unflatten
from apt_model.errors import ConfigError, nearest
from apt_model.files import write_whole

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from apt_launch.config.schema import LaunchConfig
    from apt_launch.sweep.control.send import Place

MOST_PROBLEMS = 12
"""Problems told of one sweep; more of them are counted."""


@dataclass(frozen=True)
class Resources:
    """What one job gets; ``gpus`` and ``mem_gb`` a node, ``cpus`` a task. None: what the place gives by itself."""

    nodes: int = 1
    tasks_per_node: int = 1
    gpus: int | None = None
    cpus: int | None = None
    mem_gb: float | None = None
    hours: float = 24.0
    time_limit_minutes: int | None = None

    @classmethod
    def of(cls, launch: LaunchConfig, gpus: int | None) -> Resources:
        """Return what ``launch`` says, but with ``gpus``."""
        return cls(**launch.model_dump(include={field.name for field in fields(cls)}) | {"gpus": gpus})

    @property
    def gpu_hours(self) -> float:
        """The most that the job may take."""
        return self.nodes * (self.gpus or 0) * self.hours

    @property
    def ranks(self) -> int:
        """How many processes the job has."""
        return self.nodes * self.tasks_per_node

    def __str__(self) -> str:
        parts = [f"{self.nodes} nodes" if self.nodes > 1 else "", f"{self.ranks} ranks" if self.ranks > 1 else ""]
        parts += [f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} a node" if self.gpus else ""]
        parts += [f"{self.cpus} cores a task" if self.cpus else "", f"{self.mem_gb:g} GB" if self.mem_gb else ""]
        return ", ".join([*filter(None, parts), f"at most {self.hours:g} h"])


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int
    identity: str
    overrides: tuple[str, ...]  # what it was asked for by, of those that vary
    differs: Mapping[str, Any]  # dotted key to value, of every key that is not the same in all jobs
    resources: Resources
    steps: int = 0  # updates that it plans
    config: RunConfig | None = field(default=None, repr=False, compare=False)  # only where the plan was made

    @property
    def folder(self) -> str:
        """The name of its folder, inside the sweep's."""
        return f"{self.number}-{self.identity[:8]}"

    @property
    def label(self) -> str:
        """What tells it from the others, in the user's words."""
        return " ".join(self.overrides)


def short_key(key: str) -> str:
    """Return the part of a key that tells it from others: ``route_temp.end``, ``lr``, ``study`` of ``+sweeps/study``."""
    parts = key.lstrip("+").rpartition("/")[2].split(".")
    return ".".join(parts[-2:] if parts[-1] in ("start", "end", "warmup", "by", "type", "at") else parts[-1:])


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
    shared: Mapping[str, Any]
    jobs: tuple[Job, ...]

    @cached_property
    def by_folder(self) -> dict[str, Job]:
        """The jobs by the names of their folders."""
        return {job.folder: job for job in self.jobs}

    @property
    def told(self) -> str:
        """How many jobs were asked for, and how many differ."""
        return f"{self.asked} asked, {len(self.jobs)} unique"

    @property
    def gpu_hours(self) -> float:
        """The most that all jobs together may take."""
        return sum(job.resources.gpu_hours for job in self.jobs)

    def values(self, job: Job) -> dict[str, Any]:
        """Return the job's whole config, nested as in YAML."""
        return unflatten({**self.shared, **job.differs})

    def write(self, folder: Path) -> None:
        """Freeze it as ``plan.yaml`` in ``folder``."""
        content = {
            "id": self.id,
            "created": self.created,
            "command": list(self.command),
            "launcher": self.launcher,
            "launcher_values": dict(self.launcher_values),
            "cwd": self.cwd,
            "asked": self.asked,
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
                for job in self.jobs
            ],
        }
        head = (
            f"# {self.told}. A job's config: what all share, and under its own config, by dotted key, what differs.\n"
        )
        write_whole(folder / "plan.yaml", head + to_yaml(content))

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read the plan of the sweep in ``folder``.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        path = folder / "plan.yaml"
        try:
            content = from_yaml(path.read_text(encoding="utf-8"))
            jobs = tuple(
                Job(
                    job["number"],
                    job["identity"],
                    tuple(job["overrides"]),
                    job["config"],
                    Resources(**job["resources"]),
                    job["steps"],
                )
                for job in content["jobs"]
            )
            kept = {key: content[key] for key in ("id", "created", "launcher", "launcher_values", "cwd", "asked")}
            return cls(command=tuple(content["command"]), shared=flatten(content["shared"]), jobs=jobs, **kept)
        except FileNotFoundError:
            near = sorted(p.parent for p in folder.parent.glob("*/plan.yaml")) if folder.parent.is_dir() else []
            hint = f" There is one in {near[-1]}." if near else ""
            raise ConfigError(f"{folder}: there is no sweep here, for it has no plan.yaml.{hint}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: damaged ({type(error).__name__}: {error}).") from None

    def joined(self, other: Plan) -> Plan:
        """Return this plan with the jobs of ``other`` after its own, for a sweeper that asks in batches."""
        all_of = [(job, {**plan.shared, **job.differs}) for plan in (self, other) for job in plan.jobs]
        numbered = [(replace(job, number=number), values) for number, (job, values) in enumerate(all_of)]
        return replace(self.with_values(numbered), asked=self.asked + other.asked)

    def with_values(self, jobs: Sequence[tuple[Job, Mapping[str, Any]]]) -> Plan:
        """Return this plan with ``jobs``, each with its whole config, flat."""
        shared = _shared([values for _, values in jobs])
        return replace(self, shared=shared, jobs=tuple(replace(j, differs=_without(v, shared)) for j, v in jobs))


def _shared(flats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, *others = flats
    return {
        key: value
        for key, value in first.items()
        if all(key in flat and flat[key] == value and type(flat[key]) is type(value) for flat in others)
    }


def _without(flat: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat.items() if key not in shared}


def expand(
    overrides: Sequence[Override], zipped: Sequence[Sequence[str]] = (), key: str = "hydra.sweeper.zip"
) -> list[tuple[list[str], list[str]]]:
    """Return every combination of the overrides' values: all its overrides, and those of them that vary.

    Args:
        overrides: parsed; the last of those with one key counts.
        zipped: lists of keys whose values advance together, instead of in every combination.
        key: where ``zipped`` stands in the config.

    Raises:
        ConfigError: a continuous interval, or lists to zip that have different lengths.
    """
    options: dict[str, list[str]] = {}
    varied: list[str] = []
    for override in overrides:
        name = override.get_key_element()
        if override.is_delete():
            options[name] = [str(override.input_line)]
        elif not override.is_sweep_override():
            options[name] = [f"{name}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            options[name] = [f"{name}={value}" for value in override.sweep_string_iterator()]
            varied.append(name)
        else:
            raise ConfigError(
                f"{name}: an interval has no list of values to go through. Give values (a,b or range(a,b)), or let a sweeper "
                "choose: hydra/sweeper=optuna."
            )
    bundles: dict[str, list[tuple[str, ...]]] = {
        name: [(value,) for value in values] for name, values in options.items()
    }
    for names in zipped:
        bare = {name.lstrip("+~"): name for name in options}
        if missing := [name for name in names if name not in bare]:
            raise ConfigError(f"{key}: {missing[0]} is not among what is swept. {nearest(missing[0], list(bare))}")
        lists = [options[bare[name]] for name in names]
        if len({len(values) for values in lists}) != 1:
            told = ", ".join(f"{name} has {len(values)}" for name, values in zip(names, lists, strict=True))
            raise ConfigError(f"{key}: lists that advance together need equal lengths: {told} values.")
        for name in names:
            del bundles[bare[name]]
        bundles[bare[names[0]]] = list(zip(*lists, strict=True))
    combinations = [list(itertools.chain(*chosen)) for chosen in itertools.product(*bundles.values())]
    return [(all_of, [part for part in all_of if part.split("=", 1)[0] in varied]) for all_of in combinations]


def make(
    overrides: Sequence[str],
    *,
    place: Place,
    composer: Composer,
    parse: Callable[[list[str]], list[Override]],
    params: Mapping[str, Any] | None = None,
    zipped: Sequence[Sequence[str]] = (),
) -> Plan:
    """Plan the sweep that ``overrides`` ask for.

    Args:
        overrides: of the command line.
        place: where the jobs are to run.
        composer: makes a checked config of overrides.
        parse: Hydra's parser, which knows the groups' options.
        params: a kept sweep's values by key; the command line wins over them.
        zipped: see :func:`expand`.

    Raises:
        ConfigError: with the problems of every job, each with the job's name.
    """
    asked_for = {override.lstrip("+~").split("=", 1)[0] for override in overrides}
    kept = [
        f"{key}={_as_override(value)}" for key, value in (params or {}).items() if key.lstrip("+~") not in asked_for
    ]
    return of_combinations(
        expand(parse([*kept, *overrides]), zipped), command=overrides, place=place, composer=composer
    )


def _as_override(value: Any) -> str:
    """Return a kept sweep's values as the command line would have them: a list's members are choices."""
    if isinstance(value, list | tuple):
        return ",".join("null" if member is None else str(member) for member in value)
    return "null" if value is None else str(value)


def of_combinations(
    combinations: Iterable[tuple[Sequence[str], Sequence[str]]],
    *,
    command: Sequence[str],
    place: Place,
    composer: Composer,
) -> Plan:
    """Plan a job for each different config among ``combinations``; see :func:`make` and :func:`expand`."""
    gpus_where_any = cache(lambda: 1 if place.has_gpus() else 0)  # what launch.gpus=null stands for
    asked = 0
    problems: dict[str, list[str]] = {}
    found: dict[tuple[str, Resources], tuple[RunConfig, Sequence[str]]] = {}
    for all_of, varying in combinations:
        asked += 1
        try:
            config = composer(all_of)
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(f"job {asked - 1} ({' '.join(varying)})" if varying else "")
            continue
        gpus = gpus_where_any() if config.launch.gpus is None else config.launch.gpus
        found.setdefault((config.identity, Resources.of(config.launch, gpus)), (config, varying))
    if problems:
        raise ConfigError(*_told(problems, asked))
    flats = [flatten(config.values) for config, _ in found.values()]
    shared = _shared(flats)
    jobs = tuple(
        Job(number, identity, tuple(varying), _without(flat, shared), resources, config.horizon.steps, config)
        for number, (((identity, resources), (config, varying)), flat) in enumerate(
            zip(found.items(), flats, strict=True)
        )
    )
    created = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    plan = Plan(
        id=hashlib.sha256(f"{created} {os.getpid()} {command}".encode()).hexdigest()[:8],
        created=created,
        command=tuple(command),
        launcher=place.name,
        launcher_values=place.values,
        cwd=str(Path.cwd()),
        asked=asked,
        shared=shared,
        jobs=jobs,
    )
    _check_cost(plan)
    return plan


def _told(problems: Mapping[str, list[str]], asked: int) -> list[str]:
    """Name the job of each problem; one that all jobs have is told once."""
    told = []
    for problem, jobs in problems.items():
        more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
        told.append(problem if len(jobs) == asked or not jobs[0] else f"{jobs[0]}{more}: {problem}")
    left = len(told) - MOST_PROBLEMS
    return [*told[:MOST_PROBLEMS], f"... and {left} more problems."] if left > 0 else told


def _check_cost(plan: Plan) -> None:
    limits = [job.config.launch.max_gpu_hours for job in plan.jobs if job.config is not None]
    limit = min((most for most in limits if most is not None), default=None)
    if limit is not None and plan.gpu_hours > limit:
        raise ConfigError(
            f"launch.max_gpu_hours: {len(plan.jobs)} jobs could take {plan.gpu_hours:g} GPU-hours (nodes x launch.gpus x "
            f"launch.hours each), more than {limit:g}. Ask for less launch.hours or fewer values, or raise it."
        )


def gather(arguments: Sequence[str], own_options: Path | None = None) -> Plan:
    """Plan what ``python -m apt_launch --multirun ARGUMENTS`` would send, outside of Hydra's command.

    Args:
        own_options: a folder of groups and options, as ``--config-dir`` gives it.

    Raises:
        ConfigError: as :func:`make` does, and where there is no such folder.
        HydraException: an override that means nothing; see :func:`apt_launch.config.explain.explained`.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from apt_launch.config.load import CONF
    from apt_launch.sweep.plugins import OwnOptions, place_of, register

    if own_options is not None and not own_options.is_dir():
        raise ConfigError(f"--config-dir: there is no folder {str(own_options)!r} (looked in {Path.cwd()}).")
    register()
    OwnOptions.folder = own_options and own_options.absolute()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        OwnOptions.folder = None
        loader = GlobalHydra.instance().config_loader()
        parser = OverridesParser.create(config_loader=loader)
        parsed = parser.parse_overrides(list(arguments))
        fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
        hydra = compose("config", overrides=fixed, return_hydra_config=True).hydra
        sweeper = OmegaConf.to_container(hydra.sweeper, resolve=True)
        launcher = OmegaConf.to_container(hydra.launcher, resolve=True)
        assert isinstance(sweeper, dict)
        assert isinstance(launcher, dict)
        return make(
            [str(o.input_line) for o in parsed if not o.key_or_group.startswith(("hydra.", "hydra/"))],
            place=place_of(hydra.runtime.choices["hydra/launcher"], {str(key): launcher[key] for key in launcher}),
            composer=Composer(lambda chosen: compose("config", overrides=chosen), groups_of(loader)),
            parse=parser.parse_overrides,
            params=sweeper.get("params"),
            zipped=sweeper.get("zip") or (),
        )
