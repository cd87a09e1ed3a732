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


class _PlannedLauncher(Launcher):
    """A launcher whose jobs get frozen configs: the common part of both."""

    __module__ = PACKAGE

    name: ClassVar[str]

    def __init__(self, **values: Any) -> None:
        self.values = values

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives to a launcher.

        Raises:
            ConfigError: a value of the launcher is wrong.
        """
        from apt_launch.sweep.backends.registry import backend

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
