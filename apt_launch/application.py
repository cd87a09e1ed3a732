"""The trainer as an application of sweeps: what :class:`apt_launch.sweep.application.Application` asks of a program."""

from __future__ import annotations

import logging.config
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_launch.escapes import escape_logs
from apt_launch.rows import phase_of
from apt_launch.sweep.application import Awaited, JobContext, JobSpec, Resources, Result
from apt_launch.sweep.jobs.trunk import needed
from apt_launch.values import from_yaml
from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from apt_launch.config.corpus import Counts
    from apt_launch.config.run_config import RunConfig
    from apt_launch.runs.forks import Forks

# Imports inside functions: Hydra, pydantic and torch are loaded by who plans or runs jobs, and not to show a status line.


class Trainer:
    """Plans and runs training runs."""

    program = ("python", "-m", "apt_launch")
    metric = "val/loss"
    direction = "minimize"
    axis = "tokens"
    trusts_folder = False

    def __init__(self) -> None:
        self._counts: Counts = {}  # tokens of corpora: many jobs read one text

    def check(self, cfg: DictConfig | Mapping[str, Any]) -> JobSpec:
        """Check a run's config; see :func:`apt_launch.config.load.load`."""
        from omegaconf import DictConfig

        from apt_launch.config.load import load, parse

        config = load(cfg, self._counts) if isinstance(cfg, DictConfig) else parse(dict(cfg), self._counts)
        return JobSpec(
            values=config.values,
            identity=config.identity,
            resources=Resources.of(config.launch),
            steps=config.horizon.steps,
            wait=config.launch.wait,
            max_gpu_hours=config.launch.max_gpu_hours,
            stop=config.launch.stop,
            min_ranks=config.trainer.expert_parallel,
            min_ranks_key="trainer.expert_parallel",
            share=config.launch.share,
            reuse=config.launch.reuse,
            config=config,
        )

    def explain(self, error: Exception) -> ConfigError:
        """Return an error of Hydra's in the project's words, with the nearest valid names."""
        from apt_launch.config.explain import explained

        return explained(error)

    def is_neutral(self, key: str) -> bool:
        """Return whether a key cannot change what a run computes."""
        from apt_launch.config.run_config import is_neutral

        return is_neutral(key)

    @contextmanager
    def composing(self, flags: Sequence[str]) -> Iterator[tuple[Any, str]]:
        """Open ``conf/``, and the folder of a user's own options that ``flags`` name."""
        from apt_launch.config import guard
        from apt_launch.config.composing import config_loader
        from apt_launch.config.menu import CONF
        from apt_launch.sweep.plugins import register

        own = [value for flag, value in pairwise(flags) if flag == "--config-dir"]
        register()
        with guard.installed(), config_loader(CONF, Path(own[-1]) if own else None) as loader:
            yield loader, "config"

    def job_logging(self) -> Mapping[str, Any]:
        """Return how jobs log: as a run does."""
        return from_yaml(_logging_as_written())

    def columns(self, rows: Sequence[Mapping[str, float]]) -> Sequence[tuple[str, str]]:
        """Return the losses, and the speed."""
        return (("train/loss", ".4f"), ("val/loss", ".4f"), ("tokens_per_second", ",.0f"))

    def output(self, folder: Path, values: Mapping[str, Any], number: int) -> Path:
        """Return the job's own folder."""
        return folder

    def run(self, folder: Path, values: Mapping[str, Any], job: JobContext) -> Result:
        """Train in this process; return the final validation loss."""
        from apt_launch.config.load import parse
        from apt_launch.runs.train import train
        from apt_launch.tracking.deliver import Membership

        _configure_logging(folder if job.rank == 0 else None)
        if job.cores is not None:
            import torch

            torch.set_num_threads(job.cores)  # the worker that this process was forked from has loaded it
        config = parse(dict(values))
        if job.resume:
            config = config.resuming()
        forks = replace(_forks(config, folder, job.forks), reached=job.on_fork)
        return Result(train(config, folder, Membership(job.sweep, job.overrides, job.judge), forks=forks))

    def has_checkpoint(self, folder: Path) -> bool:
        """Return whether the run in ``folder`` has a checkpoint."""
        from apt_model.training.checkpoint import Checkpoints

        return bool(Checkpoints(folder / "checkpoints").all())

    def preload(self, values: Mapping[str, Any]) -> None:
        """Load torch and what else every run uses."""
        import importlib

        from apt_launch.drawing import load_matplotlib
        from apt_launch.runs.provenance import packages

        load_matplotlib()
        for name in (
            "torch._dynamo",
            *("apt_launch.runs.train", "apt_launch.runs.summary", "apt_launch.runs.drill", "apt_launch.runs.console"),
            *("apt_model.gpt", "apt_model.training.trainer"),
            *(["wandb"] if "wandb" in str(values["logger"]["_target_"]) else []),
        ):
            importlib.import_module(name)
        packages()

    def phase(self, row: Mapping[str, float]) -> str:
        """Return the modules that are enabled, as the curriculum's phase."""
        return phase_of(row)

    def shared_updates(self, a: JobSpec, b: JobSpec) -> int:
        """Return the number of first updates of ``a`` that are those of ``b``."""
        from apt_model.schedule.prefix import shared_updates

        return 0 if self.why_alone(a) or self.why_alone(b) else shared_updates(a.config.course, b.config.course)

    def why_alone(self, spec: JobSpec) -> str | None:
        """Return why a run's first updates cannot be another's; None: they can."""
        from apt_launch.config.schema import EXTRAS

        config: RunConfig = spec.config
        if type(config.trainer) in EXTRAS:
            return f"trainer={EXTRAS[type(config.trainer)][0]} cannot go on from a checkpoint"
        if config.values.get("callbacks"):
            return "callbacks of your own would miss the updates that they watch"
        return None if config.trainer.resume is None else "trainer.resume says where the run begins"

    def fork_points(self, folder: Path) -> Sequence[int]:
        """Return the updates before which the run in ``folder`` has a checkpoint."""
        from apt_model.training.checkpoint import Checkpoints

        return Checkpoints(folder / "checkpoints").steps()

    def graft(self, folder: Path, values: Mapping[str, Any], source: Path, update: int) -> None:
        """Give the run in ``folder`` the first updates of that in ``source``; see :func:`apt_launch.runs.graft.graft`."""
        from apt_launch.config.load import parse
        from apt_launch.runs.folder import RunFolder
        from apt_launch.runs.graft import graft

        graft(parse(dict(values)), RunFolder(folder), RunFolder(source), update)

    def prune_forks(self, folder: Path) -> None:
        """Remove the checkpoints that the run in ``folder`` keeps for others that need them no more."""
        from apt_launch.config.load import parse
        from apt_launch.sweep.jobs.process import About
        from apt_launch.values import read_frozen
        from apt_model.files import read_json
        from apt_model.training.checkpoint import Checkpoints

        config = parse(read_frozen(folder / "config.yaml"))
        job = read_json(folder / "job.json", About, remedy="sweep resume writes it anew.")
        forks = _forks(config, folder, job.forks)
        Checkpoints(
            folder / "checkpoints",
            keep_last=config.trainer.keep_last,
            keep_best=config.trainer.keep_best,
            keep_every=config.trainer.keep_every,
            forks=forks.updates,
            needed=forks.needed,
        ).prune()

    def environment(self) -> Mapping[str, str]:
        """Return the packages that this process allows, as its jobs inherit the word of who sends them."""
        from apt_launch.allow import VARIABLE, word

        return {VARIABLE: word()}


def _forks(config: RunConfig, folder: Path, awaited: Sequence[Awaited]) -> Forks:
    """Return where others begin, and for a sweep that grows where modules are switched: those checkpoints stay."""
    from apt_launch.runs.forks import Forks

    begun = frozenset(fork.update for fork in awaited)
    if not config.launch.keep_forks:
        return Forks(begun, needed=lambda: needed(folder.parent, awaited))
    switched = {clock.step for clock in config.program.fired.values() if 0 < clock.step < config.horizon.steps}
    return Forks(begun | switched, needed=lambda: begun | switched)


def _configure_logging(folder: Path | None) -> None:
    """Log as a run of the command does; see ``conf/hydra/job_logging``. None: of a rank that writes nothing."""
    settings = from_yaml(_logging_as_written().replace("${hydra.runtime.output_dir}", str(folder)))
    if folder is None:
        del settings["handlers"]["file"]
        settings["root"]["handlers"] = ["console"]
    logging.config.dictConfig(settings)
    escape_logs(logging.root.handlers)


def _logging_as_written() -> str:
    from apt_launch.config.menu import CONF

    return (CONF / "hydra" / "job_logging" / "train_log.yaml").read_text(encoding="utf-8")
