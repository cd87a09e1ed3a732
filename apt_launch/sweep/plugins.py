"""What Hydra finds: the sweeper ``plan``, and the launchers ``local`` and ``slurm``.

Installed, they are ``hydra_plugins/apt_launch.py``, which Hydra imports in every program of the environment. So this module
loads no more than Hydra's own base classes; what a sweep needs is loaded by the one that is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

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
    """

    __module__ = PACKAGE

    def __init__(self, params: Mapping[str, Any] | None = None, zip: Sequence[Sequence[str]] = ()) -> None:
        self.params = dict(params or {})
        self.zip = [list(names) for names in zip]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives to a sweeper."""
        from hydra.core.plugins import Plugins

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
        from apt_launch.sweep.control.send import carry_out
        from apt_launch.sweep.plan.expand import make
        from apt_model.errors import ConfigError

        if not isinstance(self.launcher, _PlannedLauncher):
            raise ConfigError(
                "hydra/launcher: hydra/sweeper=plan sends through local or slurm. For another launcher choose "
                "hydra/sweeper=basic."
            )
        backend = self.launcher.backend
        plan = make(
            arguments,
            target=backend,
            composer=composer_of(self.context, self.task_function, self.given),
            params=self.params,
            zipped=self.zip,
        )
        carry_out(plan, Path(str(self.given.hydra.sweep.dir)).absolute(), backend)


def composer_of(context: HydraContext, task: TaskFunction, config: DictConfig) -> Composer:
    """Return what composes a job as Hydra's command line would: same search path, same config."""
    from apt_launch.sweep.application import application_of
    from apt_launch.sweep.plan.composer import Composer

    return Composer(context.config_loader, config.hydra.job.config_name, application_of(task))


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
        from apt_launch.sweep.application import application_of, load
        from apt_launch.sweep.backends.registry import backend

        refuse_dropped(config, load(application_of(task_function)).job_logging())
        self.backend: Backend = backend(self.name, self.values)
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
        from hydra.core.utils import JobReturn, JobStatus

        from apt_launch.sweep.control.send import run_batch
        from apt_launch.sweep.plan.expand import of_combinations
        from apt_model.errors import TrainingError

        if self.composer is None:
            self.composer = composer_of(self.context, self.task_function, self.given)
        asked = [str(override) for override in self.given.hydra.overrides.task]
        batch = of_combinations(
            [(list(all_of), [one for one in all_of if one not in asked]) for all_of in job_overrides],
            command=asked,
            target=self.backend,
            composer=self.composer,
        )
        folder = Path(str(self.given.hydra.sweep.dir)).absolute()
        self.plan, outcomes = run_batch(self.plan, batch, folder, self.backend)
        returns = []
        for number, overrides in enumerate(job_overrides):
            outcome = outcomes[self.composer(list(overrides)).identity]
            done = JobReturn(
                overrides=list(overrides),
                working_dir=str(folder / outcome.folder),
                task_name=f"apt_launch {initial_job_idx + number}",
                status=JobStatus.COMPLETED if outcome.state == "done" else JobStatus.FAILED,
            )
            done.return_value = outcome.loss if outcome.state == "done" else TrainingError(outcome.summary)
            returns.append(done)
        return returns


class LocalLauncher(_PlannedLauncher):
    """``hydra/launcher=local``: this machine's cores and GPUs."""

    __module__ = PACKAGE
    name = "local"


class SlurmLauncher(_PlannedLauncher):
    """``hydra/launcher=slurm``: job arrays on a cluster."""

    __module__ = PACKAGE
    name = "slurm"


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
    for plugin in (PlanSweeper, LocalLauncher, SlurmLauncher):
        Plugins.instance().register(plugin)
