"""What a sweep asks of the program that it runs: the protocol, and how a job's process finds the program again.

``plan.yaml`` names the application by ``module:name``. A sweep's folder comes from many people, so only names listed here are
loaded from one: no file of a folder chooses code.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, TypeVar

from apt_model.errors import ConfigError, nearest
from apt_model.files import STRICT

if TYPE_CHECKING:  # pydantic and omegaconf: a job's process needs neither before its application does
    from omegaconf import DictConfig

    from apt_launch.sweep.options import LaunchConfig, StopConfig

TRAINER: Final = "apt_launch.application:Trainer"
"""The application of plans that name none: earlier versions swept no other."""

HYDRA_MAIN: Final = "apt_launch.sweep.programs.application:HydraMain"
"""The application of every other program with ``@hydra.main``."""

KNOWN: Final = (TRAINER, HYDRA_MAIN)
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

    @classmethod
    def of_launcher(cls, launcher: Mapping[str, Any]) -> Resources:
        """Return those that the node ``hydra.launcher`` asks for.

        Raises:
            ConfigError: a value is wrong.
        """
        from apt_launch.sweep.options import JobResources
        from apt_model.errors import validated

        given = {key: value for key, value in launcher.items() if key in JobResources.model_fields}
        asked = validated(JobResources, given, key="hydra.launcher")
        return cls(**asked.model_dump(include={field.name for field in fields(cls)}))

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
class Program:
    """How a job starts a user's program again, and what the sweep wants of it. The schema in ``plan.yaml`` and ``job.json``.

    One of ``script`` and ``module`` is given. What is read here only names a program; a job alone starts it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    script: str | None = None
    """The file that ``python`` was started with."""
    module: str | None = None
    """The module that ``python -m`` was started with or, with ``function``, the one that has it."""
    function: str | None = None
    """The qualified name of what is called in ``module``, which is imported; None: the module or script is run."""
    objective: str | None = None
    """Which of several results decides; None: there is one."""
    direction: Literal["minimize", "maximize"] = "minimize"
    neutral: tuple[str, ...] = ()
    """Patterns of keys that are no part of an identity."""
    preload: tuple[str, ...] = ()
    """Libraries of a known list that a worker loads once for all jobs."""
    umask: int = 0o077
    """Of the files that the program writes."""
    snapshot: str | None = None
    """The folder whose files are taken from the copy in the sweep's folder; None: there is no copy."""

    def __post_init__(self) -> None:
        """Refuse one that starts nothing, or two things."""
        if (self.script is None) == (self.module is None) or (self.function is not None and self.module is None):
            raise ValueError("a program is a script, a module, or a function of a module")
        if not 0 <= self.umask <= 0o777:
            raise ValueError(f"its umask {self.umask} is no mode of files")

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that starts it, without overrides."""
        if self.script is not None:
            return ("python", self.script)
        if self.function is not None:
            return ("python", "-c", f"from {self.module} import {self.function}; {self.function}()")
        return ("python", "-m", str(self.module))


def is_job_folder(name: str) -> bool:
    """Return whether ``name`` is that of a job's folder: its number and its identity; nothing else leads anywhere."""
    return re.fullmatch("[0-9]+-[0-9A-Za-z]+", name) is not None


@dataclass(frozen=True)
class Fork:
    """Where a job begins: with what another job was after its first ``update`` updates. The schema of all files."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    job: str
    """The name of the other job's folder."""
    update: int
    sweep: str | None = None
    """The folder of the other job's sweep; None: the same sweep."""

    def __post_init__(self) -> None:
        """Refuse what leads out of a sweep's folder, and what saves nothing."""
        if not is_job_folder(self.job):
            raise ValueError(f"{self.job!r} is no name of a job's folder")
        if self.update < 1:
            raise ValueError(f"a job cannot begin at update {self.update} of another")

    def place(self, sweep: Path) -> Path:
        """Return the other job's folder, for a job of ``sweep``."""
        return (sweep if self.sweep is None else Path(self.sweep)) / self.job


@dataclass(frozen=True)
class Awaited:
    """An update of a job from which others begin. The schema in ``job.json``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    update: int
    jobs: tuple[str, ...]
    """The names of the others' folders."""


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
    stop: StopConfig | None = None
    """Which settings of the sweep end early; None: the application's jobs cannot."""
    min_ranks: int = 1
    min_ranks_key: str = ""
    """Processes that the job needs at least, and the key that says so; checked when the job is sent."""
    share: bool | Literal["auto"] = False
    """Whether its first updates may be those of another job, trained once: ``auto``, where that is worth it."""
    reuse: str | None = None
    """The folder of another sweep whose jobs may have trained them."""
    secrets: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What stands in ``values`` by number alone; a file of its own keeps it, which jobs read."""
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
    judge: Callable[[Mapping[str, float]], bool] | None = None
    """Called with each row once the record has it; True: the job ends here as a loser, with a checkpoint, by Interrupted."""
    forks: tuple[Awaited, ...] = ()
    """Updates of this job from which others begin."""
    on_fork: Callable[[int], None] = lambda update: None
    """Called when the job can begin others from an update."""


@dataclass(frozen=True)
class Result:
    """What a job returns."""

    value: float | None
    """What is compared; None: the job has no result but that it is done."""


class Application(Protocol):
    """A program whose jobs a sweep plans, runs and shows."""

    program: tuple[str, ...]
    """The command line that starts it, without overrides."""
    metric: str
    """The metric that decides which job is best, unless a command says otherwise."""
    direction: str
    """``minimize`` or ``maximize``: which values of :attr:`metric` are better."""
    axis: str
    """The metric along which a job is followed."""
    trusts_folder: bool
    """Whether a sweep's folder names the code that its jobs run, so that nobody else may be able to write there."""

    def check(self, cfg: DictConfig | Mapping[str, Any]) -> JobSpec:
        """Check a config: what Hydra composed, or the values of an earlier :class:`JobSpec`.

        Raises:
            ConfigError: with every problem found.
        """

    def explain(self, error: Exception) -> ConfigError:
        """Return an error that Hydra raised while it composed, in the application's words."""

    def is_neutral(self, key: str) -> bool:
        """Return whether the key cannot change a result."""

    def composing(self, flags: Sequence[str]) -> AbstractContextManager[tuple[Any, str]]:
        """Open the application's configs meanwhile: Hydra's loader, and the name of the primary config.

        Args:
            flags: of the command that planned a sweep, which say where configs are.

        Raises:
            ConfigError: they cannot be opened outside of the application's own command.
        """

    def job_logging(self) -> Mapping[str, Any] | None:
        """Return how jobs log, as ``hydra.job_logging`` says it: a sweep refuses another; None: it is not compared."""

    def columns(self, rows: Sequence[Mapping[str, float]]) -> Sequence[tuple[str, str]]:
        """Return the metrics that a table of jobs shows, each with its format, given the jobs' last rows."""

    def output(self, folder: Path, values: Mapping[str, Any], number: int) -> Path:
        """Return where a job with the frozen ``values`` writes what it is asked for; ``folder`` is the job's own."""

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

    def why_alone(self, spec: JobSpec) -> str | None:
        """Return why a job can have no updates of others, nor others its; None: it can."""

    def fork_points(self, folder: Path) -> Sequence[int]:
        """Return the updates from which other jobs can begin, by what the job in ``folder`` has kept."""

    def graft(self, folder: Path, values: Mapping[str, Any], source: Path, update: int) -> None:
        """Give the job in ``folder`` the first updates of the job in ``source``, as if it had made them itself.

        Raises:
            ConfigError: what that job has kept cannot be read, or does not fit.
        """

    def prune_forks(self, folder: Path) -> None:
        """Remove what the job in ``folder``, which has ended, keeps for others that need it no more."""

    def environment(self) -> Mapping[str, str]:
        """Return variables of this process that jobs sent from it have, too, wherever they run; no file keeps them."""


def application(name: str) -> Callable[[Task], Task]:
    """Mark the task function of ``hydra.main`` as that of the application ``name``."""

    def mark(task: Task) -> Task:
        setattr(task, MARK, name)
        return task

    return mark


def application_of(task: Callable[..., Any]) -> str:
    """Return the name of the application of a task function: the one that it is marked with, else :data:`HYDRA_MAIN`."""
    return str(getattr(task, MARK, HYDRA_MAIN))


def load(name: str, program: Program | None = None) -> Application:
    """Return the application ``name``, as ``plan.yaml`` and a job's ``job.json`` have it.

    Args:
        program: what :data:`HYDRA_MAIN` stands for there.

    Raises:
        ConfigError: it is not one of :data:`KNOWN`.
    """
    if name not in KNOWN:
        raise ConfigError(
            f"application: {name!r} is not known here, and a folder may name no other. {nearest(name, KNOWN)}"
        )
    module, _, attribute = name.partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    if name != HYDRA_MAIN:
        found: Application = kind()
        return found
    if program is None:
        raise ConfigError("program: it is missing, and without it nobody knows what the jobs run.")
    wrapped: Application = kind(program)
    return wrapped
