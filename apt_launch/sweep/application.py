"""What a sweep asks of the program that it runs: the protocol, and how a job's process finds the program again.

``plan.yaml`` names the application by ``module:name``. A sweep's folder comes from many people, so only names listed here are
loaded from one: no file of a folder chooses code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from apt_model.errors import ConfigError, nearest

if TYPE_CHECKING:  # pydantic and omegaconf: a job's process needs neither before its application does
    from omegaconf import DictConfig

    from apt_launch.sweep.options import LaunchConfig

TRAINER: Final = "apt_launch.application:Trainer"
"""The application of plans that name none: earlier versions swept no other."""

KNOWN: Final = (TRAINER,)
"""Applications that a folder may name."""

MARK: Final = "__application__"

Task = TypeVar("Task", bound=Callable[..., Any])


@dataclass(frozen=True)
class Resources:
    """What one job runs with; ``gpus`` and ``mem_gb`` a node, ``cpus`` a task. None: the backend's default."""

    nodes: int = 1
    tasks_per_node: int = 1
    gpus: int | None = None
    cpus: int | None = None
    mem_gb: float | None = None
    hours: float = 24.0
    time_limit_minutes: int | None = None

    @classmethod
    def of(cls, launch: LaunchConfig) -> Resources:
        """Return those that ``launch`` asks for."""
        return cls(**launch.model_dump(include={field.name for field in fields(cls)}))

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
class JobSpec:
    """A checked config, as a sweep sees it."""

    values: Mapping[str, Any]
    """The whole config, resolved and nested as in YAML: what is frozen, and what the job is started with."""
    identity: str
    """Equal for configs that compute the same: hexadecimal digits."""
    resources: Resources
    steps: int = 0
    """Updates that the job plans."""
    wait: bool = False
    """Whether the command should follow the sweep to its end."""
    max_gpu_hours: float | None = None
    """Refuse the sweep if its jobs together could take more."""
    min_ranks: int = 1
    min_ranks_key: str = ""
    """Processes that the job needs at least, and the key that says so; checked when the job is sent."""
    config: Any = field(default=None, repr=False, compare=False)
    """The application's own form of the config, only in the process that planned the job."""


@dataclass(frozen=True)
class JobContext:
    """What a job knows of its sweep and its process."""

    sweep: str
    """The sweep's id."""
    number: int
    overrides: tuple[str, ...]
    """Those by which the job differs from others."""
    rank: int = 0
    attempt: int = 0
    """Attempts before this one."""
    resume: bool = False
    """Whether to continue from the newest checkpoint in the job's folder."""
    cores: int | None = None
    """Cores of this machine that are the job's; None: as the environment says."""


@dataclass(frozen=True)
class Result:
    """What a job returns."""

    value: float
    """What sweepers compare; less is better."""


class Application(Protocol):
    """A program whose jobs a sweep plans, runs and shows."""

    program: tuple[str, ...]
    """The command line that starts it, without overrides."""

    def check(self, cfg: DictConfig | Mapping[str, Any]) -> JobSpec:
        """Check a config: what Hydra composed, or the values of an earlier :class:`JobSpec`.

        Raises:
            ConfigError: with every problem found.
        """

    def explain(self, error: Exception) -> ConfigError:
        """Return an error that Hydra raised while it composed, in the application's words."""

    def is_neutral(self, key: str) -> bool:
        """Return whether the key cannot change a result."""

    def run(self, folder: Path, values: Mapping[str, Any], job: JobContext) -> Result:
        """Run a job in this process, which is the job's own, with the frozen ``values``.

        Raises:
            ConfigError: something that could only be found out here.
            Interrupted: a signal asked it to stop; it can continue from its checkpoint.
            Exception: why it failed.
        """

    def has_checkpoint(self, folder: Path) -> bool:
        """Return whether the job in ``folder`` has anything to continue from."""

    def preload(self, values: Mapping[str, Any]) -> None:
        """Load what every job like ``values`` uses; a local worker does so once, and forks."""

    def phase(self, row: Mapping[str, float]) -> str:
        """Return the part of the run that a row of the record belongs to, for a status line."""

    def shared_updates(self, a: JobSpec, b: JobSpec) -> int:
        """Return the number of first updates that two jobs have in common; 0: nothing can be shared."""


def application(name: str) -> Callable[[Task], Task]:
    """Mark the task function of ``hydra.main`` as that of the application ``name``."""

    def mark(task: Task) -> Task:
        setattr(task, MARK, name)
        return task

    return mark


def application_of(task: Callable[..., Any]) -> str:
    """Return the name of the application that a task function is marked with.

    Raises:
        ConfigError: it is marked with none.
    """
    name = getattr(task, MARK, None)
    if name is None:
        raise ConfigError(
            f"hydra/sweeper: {task.__module__}.{task.__qualname__} belongs to no application whose sweeps can be planned. "
            "Choose hydra/sweeper=basic hydra/launcher=basic."
        )
    return str(name)


def load(name: str) -> Application:
    """Return the application ``name``, as ``plan.yaml`` and a job's ``job.json`` have it.

    Raises:
        ConfigError: it is not one of :data:`KNOWN`.
    """
    if name not in KNOWN:
        raise ConfigError(
            f"application: {name!r} is not known here, and a folder may name no other. {nearest(name, KNOWN)}"
        )
    module, _, attribute = name.partition(":")
    found: Application = getattr(importlib.import_module(module), attribute)()
    return found
