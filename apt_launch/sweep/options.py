"""Keys of a sweep: what its jobs run with (``launch``), and what ``hydra.launcher`` has. Torch stays unloaded."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """Keys read from YAML: unknown ones are errors, nothing is coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def span(value: Any) -> Any:
    """Check a length that a sweep can count: updates, or a share of a job's."""
    updates_of(value, 100)
    return value


def updates_of(value: Any, steps: int) -> int:
    """Return how many updates a length is in a job of ``steps``: ``25%``, or ``500st``, as in a schedule.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value:g} of what? Write {value:g}st for updates, or a share of the run such as 25%")
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)%|(\d+)st)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no length that a sweep can count. Write a share such as 25%, or updates: 500st")
    share, updates = match.groups()
    if share is not None and float(share) > 100:
        raise ValueError(f"{value} is more than the run")
    return int(updates) if share is None else round(float(share) * steps / 100)


def share_of(value: str | float) -> Fraction:
    """Return a share that is written as ``1/2`` or ``0.5``.

    Raises:
        ValueError: it is none, or not between 0 and 1.
    """
    try:
        share = Fraction(value) if isinstance(value, str) else Fraction(value).limit_denominator(10**6)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{value!r} is no share. Write 1/2 or 0.5") from None
    if not 0 < share < 1:
        raise ValueError(f"{value} has to be above 0 and below 1, such as 1/2")
    return share


def _share(value: str | float) -> str | float:
    share_of(value)
    return value


Span = Annotated[Any, BeforeValidator(span)]
ShareText = Annotated[str | float, AfterValidator(_share)]


class StopConfig(Options):
    """``launch.stop``: which settings of a sweep end early. The defaults are what sweeps of earlier versions had: none."""

    rungs: list[Span] = []
    metric: Text = "val/loss"
    keep: ShareText = "1/2"
    group: Literal["seeds"] | None = "seeds"
    grace: Span = "5%"


class ProgramStopConfig(StopConfig):
    """``hydra.launcher.stop``: the same of programs, whose steps nobody knows before they are reported."""

    metric: Text | None = None  # type: ignore[assignment]
    grace: Span = "0st"


class LaunchConfig(Options):
    """``launch``: resources of a sweep's jobs, and how the sweep is followed. No part of a run's identity."""

    nodes: Positive
    tasks_per_node: Positive
    gpus: Annotated[int, Field(ge=0)] | None
    cpus: Positive | None
    mem_gb: PositiveNumber | None
    hours: PositiveNumber
    time_limit_minutes: Positive | None
    max_gpu_hours: PositiveNumber | None
    wait: bool
    drill: bool
    stop: StopConfig = StopConfig()
    share: bool | Literal["auto"] = "auto"
    keep_forks: bool = False
    reuse: Text | None = None


class JobResources(Options):
    """What ``hydra.launcher`` says of each job of a program that has no ``launch`` of its own; values may be interpolations."""

    nodes: Positive = 1
    tasks_per_node: Positive = 1
    gpus: Annotated[int, Field(ge=0)] | None = None
    cpus: Positive | None = None
    mem_gb: PositiveNumber | None = None
    hours: PositiveNumber = 24.0
    time_limit_minutes: Positive | None = None
    max_gpu_hours: PositiveNumber | None = None
    wait: bool = False
    stop: ProgramStopConfig = ProgramStopConfig()


class SnapshotOptions(Options):
    """What ``hydra.launcher`` says of a copy of the program's code."""

    snapshot: bool | None = None
    snapshot_mb: PositiveNumber = 200.0


class SweeperOptions(Options):
    """``hydra/sweeper=apt``, beside what is swept."""

    objective: Text | None = None
    direction: Literal["minimize", "maximize"] = "minimize"
    neutral: list[str] = []
    dry_run: bool = False


class LocalLauncherConfig(Options):
    """``hydra/launcher=local``."""

    max_parallel: Positive | None


class SlurmLauncherConfig(Options):
    """``hydra/launcher=slurm``."""

    partition: Text | None
    account: Text | None
    qos: Text | None
    constraint: Text | None
    exclude: Text | None
    gres: Text | None
    max_parallel: Positive | None
    signal_delay_s: Positive
    setup: list[str]
    srun_args: list[str]
    additional_parameters: dict[str, Any]
    python: Text | None
    retry_minutes: NotNegative
    pack: Positive = 1
