"""What Hydra finds: the sweeper ``apt``, and the launchers ``apt_local`` and ``apt_slurm``.

In this project's own application they are ``plan``, ``local`` and ``slurm``, too, with ``launch`` for a job's resources.
Installed, they are ``hydra_plugins/apt_launch.py``, which Hydra imports in every program of the environment. So this module
loads no more than Hydra's own base classes; what a sweep needs is loaded by the one that is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from apt_launch.sweep.application import Program
    from apt_launch.sweep.backends.base import Backend
    from apt_launch.sweep.plan.composer import Composer
    from apt_launch.sweep.plan.plan import Plan

PACKAGE: Final = "hydra_plugins.apt_launch"
"""Where Hydra finds the classes. It builds plugins of this package only, and knows a plugin by its class's module."""

OUTPUT_SUBDIR: Final = ".hydra"
SUBDIR: Final = "${hydra.job.num}"
"""Hydra's defaults of ``hydra.output_subdir`` and ``hydra.sweep.subdir``."""


class PlanSweeper(Sweeper):
    """Composes and checks every job, drops duplicates, freezes the plan, and sends it.

    Args:
        params: what to sweep, by key; the command line wins.
        zip: lists of keys whose values advance together.
        options: see :class:`apt_launch.sweep.options.SweeperOptions`.
    """

    __module__ = PACKAGE

    def __init__(
        self, params: Mapping[str, Any] | None = None, zip: Sequence[Sequence[str]] = (), **options: Any
    ) -> None:
        self.params = dict(params or {})
        self.zip = zip or ()
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives to a sweeper."""
        from hydra.core.plugins import Plugins

        from apt_launch.secrets import current_umask

        self.umask = current_umask()
        self.context = hydra_context
        self.task_function = task_function
        self.given = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Plan what ``arguments`` ask for, and send it.

        Raises:
            ConfigError: a job is wrong, or the folder is taken; nothing has been sent.
        """
        with _reported(self.task_function):
            self._sweep(arguments)

    def _sweep(self, arguments: list[str]) -> None:
        from apt_launch.sweep.application import load
        from apt_launch.sweep.control.extend import reused
        from apt_launch.sweep.control.send import carry_out, show_plan
        from apt_launch.sweep.options import SweeperOptions
        from apt_launch.sweep.plan.expand import make
        from apt_launch.sweep.plan.tree import with_tree
        from apt_model.errors import ConfigError, validated

        options = validated(SweeperOptions, self.options, key="hydra.sweeper")
        if not isinstance(self.launcher, _PlannedLauncher):
            names = ("apt", "apt_local or apt_slurm") if is_foreign(self.task_function) else ("plan", "local or slurm")
            raise ConfigError(
                f"hydra/launcher: hydra/sweeper={names[0]} sends through {names[1]}. For another launcher choose "
                "hydra/sweeper=basic."
            )
        backend = self.launcher.backend
        plan = make(
            arguments,
            target=backend,
            composer=composer_of(self.context, self.task_function, self.given, self.umask),
            params=self.params,
            zipped=self.zip,
        )
        plan = with_tree(plan, load(plan.application, plan.program), reused(plan))
        folder = Path(str(self.given.hydra.sweep.dir)).absolute()
        if options.dry_run:
            show_plan(plan, folder, backend)
        else:
            carry_out(plan, folder, backend, self.launcher.snapshot_mb)


def composer_of(context: HydraContext, task: TaskFunction, config: DictConfig, umask: int) -> Composer:
    """Return what composes a job as Hydra's command line would: same search path, same config."""
    from apt_launch.sweep.application import HYDRA_MAIN, application_of
    from apt_launch.sweep.plan.composer import Composer

    name = application_of(task)
    program = _program_of(task, config, umask) if name == HYDRA_MAIN else None
    return Composer(context.config_loader, config.hydra.job.config_name, name, program, config)


def _program_of(task: TaskFunction, config: DictConfig, umask: int) -> Program:
    """Return how jobs start the program again, with what the sweeper and the launcher say of that."""
    from omegaconf import OmegaConf

    from apt_launch.sweep.options import SnapshotOptions, SweeperOptions
    from apt_launch.sweep.programs.application import program
    from apt_launch.sweep.programs.snapshot import checkout_of
    from apt_model.errors import ConfigError, validated

    node: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    own = {
        key: value for key, value in node.items() if key in SweeperOptions.model_fields
    }  # others have another sweeper's
    launcher: Any = OmegaConf.to_container(config.hydra.launcher, resolve=False)
    asked = {key: launcher[key] for key in SnapshotOptions.model_fields if key in launcher}
    wanted = validated(SnapshotOptions, asked, key="hydra.launcher").snapshot
    if node.get("_target_") == f"{PACKAGE}.{PlanSweeper.__name__}":
        own = validated(SweeperOptions, own, key="hydra.sweeper").model_dump()
    else:
        own = {}
    found = program(task, own, umask)
    if wanted is None:
        wanted = str(launcher.get("_target_")).endswith(f".{SlurmLauncher.__name__}")
        checkout = checkout_of(found, Path.cwd()) if wanted else None
    else:
        checkout = checkout_of(found, Path.cwd()) if wanted else None
        if wanted and checkout is None:
            raise ConfigError("hydra.launcher.snapshot: the program lives in no git checkout. Set it to false.")
    return replace(found, snapshot=checkout)


def is_foreign(task: TaskFunction) -> bool:
    """Return whether the function is that of a program of somebody else, which has no marked application of its own."""
    from apt_launch.sweep.application import HYDRA_MAIN, application_of

    return application_of(task) == HYDRA_MAIN


@contextmanager
def _reported(task: TaskFunction) -> Iterator[None]:
    """Report a user's mistake in a foreign program as this package's commands do; its own application has a way of its own."""
    from apt_launch.command_line import ending
    from apt_launch.secrets import kept_private

    if not is_foreign(task):
        yield
        return
    with ending(), kept_private():
        yield


def refuse_dropped(config: DictConfig, job_logging: Mapping[str, Any] | None) -> None:
    """Refuse what Hydra obeys in a single run, and a planned job, which Hydra does not start, would not.

    Args:
        job_logging: how jobs log, as ``hydra.job_logging`` would say it; None: nobody knows.

    Raises:
        ConfigError: with every such key.
    """
    from omegaconf import OmegaConf

    from apt_model.errors import ConfigError

    node: Any = OmegaConf.to_container(config.hydra, resolve=False)
    job = node.get("job") or {}
    problems = []
    copied = [str(name) for name in job.get("env_copy") or ()]  # Hydra has put them into env_set, too
    if names := ", ".join(name for name in map(str, job.get("env_set") or {}) if name not in copied):
        problems.append(
            f"hydra.job.env_set: jobs of a sweep would not get {names}. Set it in the environment of the command."
        )
    if copied:
        problems.append("hydra.job.env_copy: jobs of a sweep have the environment of the command anyway. Leave it out.")
    if job.get("chdir"):
        problems.append(
            "hydra.job.chdir: jobs of a sweep stay in the folder of the command, where relative paths begin. Leave it out."
        )
    if node.get("output_subdir", OUTPUT_SUBDIR) != OUTPUT_SUBDIR:
        problems.append(f"hydra.output_subdir: jobs of a sweep keep their overrides in {OUTPUT_SUBDIR}. Leave it out.")
    if (node.get("sweep") or {}).get("subdir", SUBDIR) != SUBDIR:
        problems.append(
            "hydra.sweep.subdir: jobs of a sweep have folders named by number and identity. Leave it out; hydra.sweep.dir "
            "names the folder that holds them."
        )
    asked = [str(override).lstrip("+~") for override in (node.get("overrides") or {}).get("hydra") or ()]
    changed = job_logging is not None and node.get("job_logging") != job_logging
    if changed or any(override.startswith(("hydra.job_logging", "hydra/job_logging")) for override in asked):
        problems.append(
            "hydra.job_logging: jobs of a sweep log to train.log and log.txt in their folders. Leave it out."
        )
    if node.get("verbose"):
        problems.append("hydra.verbose: jobs of a sweep log what a run logs. Leave it out, or run one job alone.")
    if problems:
        raise ConfigError(*problems)


class _PlannedLauncher(Launcher):
    """A launcher whose jobs get frozen configs: the common part of both."""

    __module__ = PACKAGE

    name: ClassVar[str]

    def __init__(self, **values: Any) -> None:
        self.values = values

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives to a launcher.

        Raises:
            ConfigError: a value of the launcher is wrong, or a key of Hydra's would be dropped in silence.
        """
        from apt_launch.secrets import current_umask
        from apt_launch.sweep.application import application_of, load
        from apt_launch.sweep.backends.registry import backend
        from apt_launch.sweep.options import JobResources, SnapshotOptions

        self.umask = current_umask()
        apart = {*JobResources.model_fields, *SnapshotOptions.model_fields}
        if not is_foreign(task_function):
            refuse_dropped(config, load(application_of(task_function)).job_logging())
            apart = set()
        values = {key: value for key, value in self.values.items() if key not in apart}
        with _reported(task_function):
            self.backend: Backend = backend(self.name, values)
        self.snapshot_mb = float(self.values.get("snapshot_mb") or 0.0)
        self.context = hydra_context
        self.task_function = task_function
        self.given = config
        self.composer: Composer | None = None
        self.plan: Plan | None = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run these jobs for a sweeper that waits for them; return what came of each.

        Batches of one sweep share a folder and a plan. Equal jobs of a batch run once.

        Raises:
            ConfigError: a job is wrong; none of the batch has been sent.
        """
        with _reported(self.task_function):
            return self._launch(job_overrides, initial_job_idx)

    def _launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hydra.core.utils import JobReturn, JobStatus

        from apt_launch.sweep.control.send import run_batch
        from apt_launch.sweep.plan.composer import overrides_of
        from apt_launch.sweep.plan.expand import of_combinations
        from apt_model.errors import TrainingError

        if self.composer is None:
            self.composer = composer_of(self.context, self.task_function, self.given, self.umask)
        asked = overrides_of(self.given, "task")
        batch = of_combinations(
            [(list(all_of), [one for one in all_of if one not in asked]) for all_of in job_overrides],
            command=asked,
            target=self.backend,
            composer=self.composer,
        )
        folder = Path(str(self.given.hydra.sweep.dir)).absolute()
        self.plan, outcomes = run_batch(self.plan, batch, folder, self.backend, self.snapshot_mb)
        returns = []
        for number, overrides in enumerate(job_overrides):
            outcome = outcomes[self.composer.identities[tuple(overrides)]]
            has_value = outcome.state in ("done", "stopped")  # a loser's last value says enough
            done = JobReturn(
                overrides=list(overrides),
                working_dir=str(folder / outcome.folder),
                task_name=f"apt_launch {initial_job_idx + number}",
                status=JobStatus.COMPLETED if has_value else JobStatus.FAILED,
            )
            done.return_value = outcome.returned if has_value else TrainingError(outcome.summary)
            returns.append(done)
        return returns


class JobSweeper(Sweeper):
    """What a job's process chooses, in which Hydra starts a user's program again; see :mod:`apt_launch.sweep.programs.start`."""

    __module__ = PACKAGE

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives to a sweeper."""
        self.context = hydra_context
        self.task_function = task_function

    def sweep(self, arguments: list[str]) -> None:
        """Call the program's function with the job's frozen config."""
        from apt_launch.sweep.programs.start import take

        take().perform(self.context, self.task_function)


class LocalLauncher(_PlannedLauncher):
    """``hydra/launcher=apt_local``: this machine's cores and GPUs."""

    __module__ = PACKAGE
    name = "local"


class SlurmLauncher(_PlannedLauncher):
    """``hydra/launcher=apt_slurm``: job arrays on a cluster."""

    __module__ = PACKAGE
    name = "slurm"


_RESOURCES: Final[dict[str, Any]] = {
    **{"nodes": 1, "tasks_per_node": 1, "gpus": None, "cpus": None, "mem_gb": None},
    **{"hours": 24.0, "time_limit_minutes": None, "max_gpu_hours": None, "wait": False},
    **{"snapshot": None, "snapshot_mb": 200.0},
    "stop": {"rungs": [], "metric": None, "keep": "1/2", "group": "seeds", "grace": "0st"},
}

OPTIONS: Final[dict[tuple[str, str], dict[str, Any]]] = {
    ("hydra/sweeper", "apt"): {
        "_target_": f"{PACKAGE}.PlanSweeper",
        "_convert_": "all",
        **{"params": None, "zip": [], "objective": None, "direction": "minimize", "neutral": [], "dry_run": False},
    },
    ("hydra/sweeper", "apt_job"): {"_target_": f"{PACKAGE}.JobSweeper"},
    ("hydra/launcher", "apt_local"): {
        "_target_": f"{PACKAGE}.LocalLauncher",
        "_convert_": "all",
        "max_parallel": None,
        **_RESOURCES,
    },
    ("hydra/launcher", "apt_slurm"): {
        "_target_": f"{PACKAGE}.SlurmLauncher",
        "_convert_": "all",
        **{"partition": None, "account": None, "qos": None, "constraint": None, "exclude": None, "gres": None},
        **{"max_parallel": None, "signal_delay_s": 90, "setup": [], "srun_args": [], "additional_parameters": {}},
        **{"python": None, "retry_minutes": 10, "pack": 1},
        **_RESOURCES,
    },
}
"""The options that every program has, by group and name; docs/howto/any_application.md explains each key."""


def store_options() -> None:
    """Give Hydra the options: done where it finds the plugins."""
    from hydra.core.config_store import ConfigStore

    for (group, name), node in OPTIONS.items():
        ConfigStore.instance().store(group=group, name=name, node=dict(node), provider="apt_launch")


def register() -> None:
    """Make the plugins known to Hydra where it cannot find them by itself: in a checkout that is not installed.

    Hydra takes plugins from the package ``hydra_plugins`` only, and imports their classes from there by name. So the folder
    with that package goes to the end of ``sys.path``; ``Plugins.register``, Hydra's public way, is for a process in which
    Hydra has looked for plugins before.
    """
    import importlib
    import sys

    from hydra.core.plugins import Plugins

    folder = str(Path(__file__).parent / "namespace")
    try:
        importlib.import_module(PACKAGE)
    except ModuleNotFoundError:
        sys.path.append(folder)
    for plugin in (PlanSweeper, JobSweeper, LocalLauncher, SlurmLauncher):
        Plugins.instance().register(plugin)
