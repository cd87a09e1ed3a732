"""Keys of a sweep: what its jobs run with (``launch``), and what ``hydra.launcher`` has. Torch stays unloaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """Keys read from YAML: unknown ones are errors, nothing is coerced, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
