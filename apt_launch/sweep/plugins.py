"""What Hydra finds: the sweeper ``plan``, the launchers ``local`` and ``slurm``, and a folder of one's own options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from apt_launch.sweep.control.send import Place
    from apt_launch.sweep.plan.composer import Composer
    from apt_launch.sweep.plan.plan import Plan


def register() -> None:
    """Make them known to Hydra, under the names that ``conf/hydra`` has, and have it judge what it composes.

    Hydra builds plugins of the package ``hydra_plugins`` only; this module takes a place there, beside those installed.
    """
    import importlib
    import sys
    from types import ModuleType

    from hydra.core.plugins import Plugins

    from apt_launch.config import guard

    try:
        package = importlib.import_module("hydra_plugins")
    except ImportError:
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        package.__path__ = []
    sys.modules["hydra_plugins.apt_launch"] = package.apt_launch = sys.modules[__name__]  # type: ignore[attr-defined]
    for plugin in (OwnOptions, PlanSweeper, LocalLauncher, SlurmLauncher):
        Plugins.instance().register(plugin)
    guard.install()


class OwnOptions(SearchPathPlugin):
    """Looks for groups and options in ``folder``, too: for commands whose line Hydra does not read itself."""

    __module__ = "hydra_plugins.apt_launch"
    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put the folder behind those of the product."""
        if self.folder is not None:
            search_path.append("command-line", f"file://{self.folder}")


class PlanSweeper(Sweeper):
    """Composes and checks every job, drops duplicates, freezes the plan, and sends it off.

    Args:
        params: what to sweep, by key; the command line wins.
        zip: lists of keys whose values advance together.
    """

    __module__ = "hydra_plugins.apt_launch"

    def __init__(self, params: Mapping[str, Any] | None = None, zip: Sequence[Sequence[str]] = ()) -> None:
        self.params = dict(params or {})
        self.zip = [list(names) for names in zip]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take note of where Hydra stands."""
        from hydra.core.plugins import Plugins

        self.context = hydra_context
        self.given = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Plan what ``arguments`` ask for, and send it.

        Raises:
            ConfigError: a job is wrong, or the folder is taken; nothing has been sent.
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from apt_launch.sweep.control.send import carry_out
        from apt_launch.sweep.plan import plan
        from apt_model.errors import ConfigError

        if not isinstance(self.launcher, _PlannedLauncher):
            raise ConfigError(
                "hydra/launcher: hydra/sweeper=plan sends through local or slurm. For another launcher choose "
                "hydra/sweeper=basic."
            )
        place = self.launcher.place
        made = plan.make(
            arguments,
            place=place,
            composer=composer_of(self.context, self.given),
            parse=OverridesParser.create(config_loader=self.context.config_loader).parse_overrides,
            params=self.params,
            zipped=self.zip,
        )
        carry_out(made, Path(str(self.given.hydra.sweep.dir)), place)


def composer_of(context: HydraContext, config: DictConfig) -> Composer:
    """Return what composes a job as Hydra's command line would: same search path, same config."""
    from hydra.types import RunMode

    from apt_launch.sweep.plan.composer import Composer, groups_of

    loader = context.config_loader
    name = config.hydra.job.config_name
    return Composer(
        lambda overrides: loader.load_configuration(name, overrides, run_mode=RunMode.RUN), groups_of(loader)
    )


class _PlannedLauncher(Launcher):
    """A launcher whose jobs get frozen configs: what both of ours have in common."""

    __module__ = "hydra_plugins.apt_launch"

    name: ClassVar[str]

    def __init__(self, **values: Any) -> None:
        self.values = values

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take note of where Hydra stands.

        Raises:
            ConfigError: a value of the launcher is wrong.
        """
        from apt_launch.sweep.control.send import place

        self.place: Place = place(self.name, self.values)
        self.context = hydra_context
        self.given = config
        self.composer: Composer | None = None
        self.plan: Plan | None = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run these jobs for a sweeper that waits for them; return what really came of each.

        Batches of one sweep share a folder and a plan. Equal jobs of a batch run once.

        Raises:
            ConfigError: a job is wrong; none of the batch has been sent.
        """
        from hydra.core.utils import JobReturn, JobStatus

        from apt_launch.sweep.control import send as dispatch
        from apt_launch.sweep.plan import plan
        from apt_model.errors import TrainingError

        if self.composer is None:
            self.composer = composer_of(self.context, self.given)
        asked = [str(override) for override in self.given.hydra.overrides.task]
        made = plan.of_combinations(
            [(list(all_of), [one for one in all_of if one not in asked]) for all_of in job_overrides],
            command=asked,
            place=self.place,
            composer=self.composer,
        )
        folder = Path(str(self.given.hydra.sweep.dir))
        self.plan, results = dispatch.run_batch(self.plan, made, folder, self.place)
        returns = []
        for number, overrides in enumerate(job_overrides):
            identity = self.composer(list(overrides)).identity
            result = results[identity]
            done = JobReturn(
                overrides=list(overrides),
                working_dir=str(folder / result.folder),
                task_name=f"apt_launch {initial_job_idx + number}",
                status=JobStatus.COMPLETED if result.state == "done" else JobStatus.FAILED,
            )
            done.return_value = result.loss if result.state == "done" else TrainingError(result.told)
            returns.append(done)
        return returns


class LocalLauncher(_PlannedLauncher):
    """``hydra/launcher=local``: this machine's cores and GPUs."""

    __module__ = "hydra_plugins.apt_launch"
    name = "local"


class SlurmLauncher(_PlannedLauncher):
    """``hydra/launcher=slurm``: job arrays on a cluster."""

    __module__ = "hydra_plugins.apt_launch"
    name = "slurm"


def place_of(chosen: str, values: Mapping[str, Any]) -> Place:
    """Return the place that a launcher's config stands for, whatever the option is called that has it.

    Args:
        chosen: that option, of ``hydra/launcher``.

    Raises:
        ConfigError: it is no launcher of ours, or a value is wrong.
    """
    from apt_launch.sweep.control.send import place

    ours = {f"{launcher.__module__}.{launcher.__name__}": launcher.name for launcher in (LocalLauncher, SlurmLauncher)}
    return place(ours.get(str(values.get("_target_")), chosen), values)
