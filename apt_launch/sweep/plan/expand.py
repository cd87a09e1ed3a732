"""From overrides to a plan: every combination composed and checked, each different config once."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from apt_launch.commands import config_flags
from apt_launch.commands import override as quoted
from apt_launch.sweep.application import JobSpec, Resources
from apt_launch.sweep.plan.composer import Composer
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan, merged_order, shared_values, without
from apt_launch.values import flatten
from apt_model.errors import ConfigError, nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

MOST_PROBLEMS = 12
"""Problems of one sweep that are listed; more of them are counted."""


class Target(Protocol):
    """Where the jobs of a plan are to run; a backend is one."""

    name: str
    values: dict[str, Any]

    def has_gpus(self) -> bool:
        """Return whether jobs can have GPUs there."""


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
            if not options[name]:
                asked = str(override.input_line).partition("=")[2]
                raise ConfigError(f"{name}: {asked} stands for no value. Give one or more.")
            varied.append(name)
        else:
            raise ConfigError(
                f"{name}: an interval has no list of values to go through. Give values (a,b or range(a,b)), or let a sweeper "
                "choose: hydra/sweeper=optuna."
            )
    bundles: dict[str, list[tuple[str, ...]]] = {
        name: [(value,) for value in values] for name, values in options.items()
    }
    bare = {name.lstrip("+~"): name for name in options}
    if not _is_list(zipped) or not all(_is_list(names) and names for names in zipped):
        raise ConfigError(f"{key}: {zipped} is no list of lists with keys. Write it as [[lr,seed]].")
    together = [str(name) for names in zipped for name in names]
    if twice := [name for name in together if together.count(name) > 1]:
        raise ConfigError(f"{key}: {twice[0]} stands there twice. A key advances in one list.")
    for names in (list(map(str, names)) for names in zipped):
        if missing := [name for name in names if name not in bare]:
            raise ConfigError(f"{key}: {missing[0]} is not among what is swept. {nearest(missing[0], list(bare))}")
        lists = [options[bare[name]] for name in names]
        if len({len(values) for values in lists}) != 1:
            lengths = ", ".join(f"{name} has {len(values)}" for name, values in zip(names, lists, strict=True))
            raise ConfigError(f"{key}: lists that advance together need equal lengths: {lengths} values.")
        for name in names:
            del bundles[bare[name]]
        bundles[bare[names[0]]] = list(zip(*lists, strict=True))
    combinations = [list(itertools.chain(*chosen)) for chosen in itertools.product(*bundles.values())]
    return [(all_of, [part for part in all_of if part.split("=", 1)[0] in varied]) for all_of in combinations]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def make(
    overrides: Sequence[str],
    *,
    target: Target,
    composer: Composer,
    params: Mapping[str, Any] | None = None,
    zipped: Sequence[Sequence[str]] = (),
) -> Plan:
    """Plan the sweep that ``overrides`` ask for.

    Args:
        overrides: of the command line.
        target: where the jobs are to run.
        composer: makes a checked config of overrides.
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
        expand(composer.parse([*kept, *overrides]), zipped), command=overrides, target=target, composer=composer
    )


def of_command(arguments: Sequence[str], *, composer: Composer, target: Callable[[DictConfig], Target]) -> Plan:
    """Plan what the command line ``arguments`` would sweep.

    Args:
        target: returns where jobs run, by what the command line composes.

    Raises:
        ConfigError: see :func:`make`.
    """
    from omegaconf import OmegaConf

    parsed = composer.parse(arguments)
    composer.search_as(parsed)
    composed = composer.compose([str(o.input_line) for o in parsed if not o.is_sweep_override()])
    sweeper: Any = OmegaConf.to_container(composed.hydra.sweeper, resolve=True)
    return make(
        [str(o.input_line) for o in parsed if not o.key_or_group.startswith(("hydra.", "hydra/"))],
        target=target(composed),
        composer=composer,
        params=sweeper.get("params"),
        zipped=sweeper.get("zip") or (),
    )


def _as_override(value: Any) -> str:
    """Return a kept sweep's values as the command line would have them: a list's members are choices."""
    if isinstance(value, list | tuple):
        return ",".join(map(_as_choice, value))
    return "null" if value is None else str(value)


def _as_choice(value: Any) -> str:
    """Return one value in Hydra's grammar; text that is several there, or none, is quoted."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_as_choice(member)}" for key, member in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_as_choice, value)) + "]"
    if not isinstance(value, str):
        return str(value)
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        is_one = value != "" and not OverridesParser.create().parse_override(f"x={value}").is_sweep_override()
    except HydraException:
        is_one = False
    return value if is_one else quoted("", value)[1:]


def of_combinations(
    combinations: Iterable[tuple[Sequence[str], Sequence[str]]],
    *,
    command: Sequence[str],
    target: Target,
    composer: Composer,
) -> Plan:
    """Plan a job for each different config among ``combinations``; see :func:`make` and :func:`expand`."""
    gpus_where_any = cache(lambda: 1 if target.has_gpus() else 0)  # what launch.gpus=null stands for
    asked = 0
    problems: dict[str, list[str]] = {}
    found: dict[tuple[str, Resources], tuple[JobSpec, Sequence[str]]] = {}
    for all_of, varying in combinations:
        asked += 1
        try:
            spec = composer(all_of)
        except ConfigError as error:
            for problem in error.problems:
                label = " ".join(map(composer.shown, varying))
                problems.setdefault(problem, []).append(f"job {asked - 1} ({label})" if varying else "")
            continue
        resources = spec.resources
        if resources.gpus is None:
            resources = replace(resources, gpus=gpus_where_any())
        found.setdefault((spec.identity, resources), (spec, varying))
    if problems:
        raise ConfigError(*_summary(problems, asked))
    flats = [flatten(spec.values) for spec, _ in found.values()]
    shared = shared_values(flats)
    jobs = tuple(
        Job(number, identity, tuple(map(composer.shown, varying)), without(flat, shared), resources, spec.steps, spec)
        for number, (((identity, resources), (spec, varying)), flat) in enumerate(
            zip(found.items(), flats, strict=True)
        )
    )
    created = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    plan = Plan(
        id=hashlib.sha256(f"{created} {os.getpid()} {command}".encode()).hexdigest()[:8],
        created=created,
        command=tuple(map(composer.shown, command)),
        flags=tuple(config_flags()),
        launcher=target.name,
        launcher_values=target.values,
        cwd=str(Path.cwd()),
        asked=asked,
        application=composer.application,
        program=composer.program,
        order=merged_order(flats) if composer.program is not None else (),
        shared=shared,
        jobs=jobs,
        secrets={number: value for spec, _ in found.values() for number, value in spec.secrets.items()},
    )
    _check_cost(plan)
    return plan


def _summary(problems: Mapping[str, list[str]], asked: int) -> list[str]:
    """Return each problem with the jobs that have it; one that all jobs have is listed once."""
    lines = []
    for problem, jobs in problems.items():
        more = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
        lines.append(problem if len(jobs) == asked or not jobs[0] else f"{jobs[0]}{more}: {problem}")
    left = len(lines) - MOST_PROBLEMS
    return [*lines[:MOST_PROBLEMS], f"... and {left} more problems."] if left > 0 else lines


def _check_cost(plan: Plan) -> None:
    limits = [job.spec.max_gpu_hours for job in plan.jobs if job.spec is not None]
    limit = min((most for most in limits if most is not None), default=None)
    if limit is not None and plan.gpu_hours > limit:
        raise ConfigError(
            f"launch.max_gpu_hours: {len(plan.jobs)} jobs could take {plan.gpu_hours:g} GPU-hours (nodes x launch.gpus x "
            f"launch.hours each), more than {limit:g}. Ask for less launch.hours or fewer values, or raise it."
        )
