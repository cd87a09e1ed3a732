"""Any program with ``@hydra.main`` as an application of sweeps: nothing in it knows of this package."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apt_launch.sweep import job as own_job
from apt_launch.sweep.application import JobContext, JobSpec, Program, Resources, Result
from apt_launch.sweep.programs import output_folder, start
from apt_launch.sweep.programs.freeze import TYPES, Freezer, revealed
from apt_launch.sweep.programs.metrics import Follower
from apt_launch.sweep.programs.secrets import SECRETS, read_secrets
from apt_launch.values import flatten
from apt_model.errors import ConfigError, Interrupted
from apt_model.files import write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from apt_launch.sweep.options import StopConfig

PRELOADED: Final = (
    "numpy",
    "scipy",
    "pandas",
    "torch",
    "torchvision",
    "lightning",
    "pytorch_lightning",
    "transformers",
    "hydra.core.utils",
)
"""Libraries that take long to load and may be loaded before a process forks."""

DECIDES: Final = ("hydra.job.env_set.", "hydra.job.chdir")
"""Keys of Hydra's own that are part of an identity: they change what the program finds."""

COLUMNS: Final = 3
"""Metrics that a table of jobs shows at most."""

RESULT: Final = "result.json"
SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class HydraMain:
    """A program with ``@hydra.main``: plans, runs and shows its jobs."""

    axis = "step"
    trusts_folder = True

    def __init__(self, program: Program) -> None:
        self.about = program
        self.program = program.command
        self.metric = program.objective or "result"
        self.direction = program.direction
        self._freezer = Freezer()

    def check(self, cfg: DictConfig | Mapping[str, Any]) -> JobSpec:
        """Freeze a composed config, or take one that is frozen; its own rules are the program's."""
        from omegaconf import DictConfig

        frozen: Any = self._freeze(cfg) if isinstance(cfg, DictConfig) else cfg
        values: Mapping[str, Any] = frozen
        launcher = values.get("hydra", {}).get("launcher") or {}
        resources = Resources.of_launcher(launcher)
        return JobSpec(
            values=values,
            identity=self._identity(values),
            resources=resources,
            wait=bool(launcher.get("wait")),
            max_gpu_hours=launcher.get("max_gpu_hours"),
            secrets=dict(self._freezer.kept),
            stop=self._stop(launcher.get("stop") or {}),
        )

    def _stop(self, asked: Mapping[str, Any]) -> StopConfig:
        """Return where settings are judged, by what the program reports."""
        from apt_launch.sweep.options import ProgramStopConfig, StopConfig
        from apt_model.errors import validated

        stop = validated(ProgramStopConfig, asked, key="hydra.launcher.stop")
        metric = stop.metric or self.about.objective
        problems = [
            f"hydra.launcher.stop.{key}: {length}: nobody knows how many steps a program makes. Write steps, as it reports "
            "them: 500st."
            for key, length in (*(("rungs", rung) for rung in stop.rungs), ("grace", stop.grace))
            if length.endswith("%")
        ]
        if stop.rungs and metric is None:
            problems.append("hydra.launcher.stop.metric: name a metric that the program reports by job.report.")
        if problems:
            raise ConfigError(*problems)
        return StopConfig(**{**stop.model_dump(), "metric": metric or self.metric})

    def _freeze(self, cfg: DictConfig) -> dict[str, Any]:
        with output_folder.asked_by_interpolations(cfg):
            return self._freezer.freeze(cfg)

    def _identity(self, values: Mapping[str, Any]) -> str:
        flat = {key: value for key, value in flatten(values).items() if not self.is_neutral(key)}
        text = json.dumps(flat, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def explain(self, error: Exception) -> ConfigError:
        """Return an error of Hydra's with its cause, which names the key."""
        cause = error.__cause__
        text = str(error).strip() + (f" ({str(cause).strip()})" if cause is not None and str(cause) else "")
        return ConfigError(" ".join(text.split()))

    def is_neutral(self, key: str) -> bool:
        """Return whether a key is Hydra's own, or one that the sweep was told to leave out of identities."""
        if key.startswith("hydra."):
            return not key.startswith(DECIDES)
        if key == TYPES:
            return True  # values of other classes have other keys, or are used alike
        return any(fnmatchcase(key, one) or key.startswith(f"{one}.") for one in self.about.neutral)

    def composing(self, flags: Sequence[str]) -> AbstractContextManager[tuple[Any, str]]:
        """Refuse: only the program itself knows where its configs are.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "extend: a sweep of another program cannot grow. Start the program anew, with what is missing."
        )

    def job_logging(self) -> None:
        """Return None: a program logs as its config says."""

    def run(self, folder: Path, values: Mapping[str, Any], job: JobContext) -> Result:
        """Run the program in this process, as by hand, with the frozen config.

        Raises:
            ReportedError: its function raised.
            Interrupted: it was asked to stop.
        """
        os.umask(self.about.umask)
        for handler in list(logging.root.handlers):  # a program finds logging as Python leaves it
            logging.root.removeHandler(handler)
        logging.root.setLevel(logging.WARNING)
        if (
            job.cores is not None and "torch" in sys.modules
        ):  # the worker that this process was forked from has loaded it
            sys.modules["torch"].set_num_threads(job.cores)
        values = output_folder.at(self._revealed(values, folder.parent), folder.parent)
        job_id = _job_id(job.number)
        first = output_folder.expected(values, job.number, job_id) or folder  # until Hydra has made it
        context = own_job.begin(folder, first, first=job.rank == 0, judge=job.judge)

        def on_output(found: Path) -> None:
            context.output = found
            if job.rank == 0:
                output_folder.keep(folder, found)

        call = start.Call(values, folder.parent, job.number, job_id, job.overrides, on_output)
        if self.about.snapshot is not None:
            _say(f"code: a copy of {self.about.snapshot}, see {folder.parent / 'snapshot.json'}")
        _say_how_it_begins(job, context.has_checkpoint)
        for number in SIGNALS:
            signal.signal(number, context.asked_to_stop)
        try:
            with Follower(context):
                start.start(self.about, call, _copies(self.about, folder.parent))
        except Interrupted:
            _say_how_it_ends(context.has_checkpoint)
            raise
        except BaseException:
            if context.interrupted:  # the program has made something else of it
                _say_how_it_ends(context.has_checkpoint)
                raise Interrupted("asked to stop") from None
            raise
        if context.interrupted or context.leaves_early or context.lost:
            _say_how_it_ends(context.has_checkpoint)
            raise Interrupted("asked to stop")
        value, numbers = self._result(call.returned)
        if job.rank == 0:
            if call.returned is not None:
                write_json(folder / RESULT, {"value": value, "returned": _as_json(call.returned)})
            context.finish(numbers)
        return Result(value)

    def _revealed(self, values: Mapping[str, Any], sweep: Path) -> Mapping[str, Any]:
        try:
            found: Mapping[str, Any] = revealed(values, read_secrets(sweep))
            return found
        except KeyError as error:
            raise ConfigError(
                f"{sweep / SECRETS}: it lacks the secret {error.args[0]} that the job's config has. Put the file back, or start "
                "a new sweep."
            ) from None

    def _result(self, returned: Any) -> tuple[float | None, dict[str, float]]:
        """Return what is compared, and all numbers that the function returned, by name."""
        named = {str(key): _number(value) for key, value in returned.items()} if isinstance(returned, Mapping) else {}
        numbers = {key: value for key, value in named.items() if value is not None}
        if isinstance(returned, Mapping):
            name = self.about.objective or (next(iter(numbers)) if len(numbers) == 1 else None)
            if name is None or name not in numbers:
                wanted = f"none of them is {name!r}" if name else "hydra.sweeper.objective names none of them"
                _say(f"The function returned {', '.join(named) or 'an empty mapping'}, and {wanted}.")
                return None, numbers
            return numbers[name], {**numbers, self.metric: numbers[name]}
        value = _number(returned)
        return value, {} if value is None else {self.metric: value}

    def has_checkpoint(self, folder: Path) -> bool:
        """Return whether the program has written into ``job.checkpoints``."""
        return own_job.has_files(folder / own_job.CHECKPOINTS)

    def preload(self, values: Mapping[str, Any]) -> None:
        """Load the libraries that the program had loaded when the sweep was planned, as far as they may be."""
        import importlib

        for name in ("hydra.core.utils", *self.about.preload):
            if name in PRELOADED:
                try:
                    importlib.import_module(name)
                except ImportError as error:  # the job says so itself, if it wants it
                    sys.stderr.write(f"{name} cannot be loaded here: {error}\n")

    def phase(self, row: Mapping[str, float]) -> str:
        """Return nothing: programs have no phases."""
        return ""

    def columns(self, rows: Sequence[Mapping[str, float]]) -> Sequence[tuple[str, str]]:
        """Return what decides, and the first other metrics that the jobs have recorded."""
        names = dict.fromkeys(name for row in rows for name in row if name not in own_job.COUNTED)
        first = [self.metric] if self.metric in names else []
        return [(name, ".5g") for name in [*first, *(name for name in names if name not in first)][:COLUMNS]]

    def output(self, folder: Path, values: Mapping[str, Any], number: int) -> Path:
        """Return the output folder that Hydra gives to the job; the job's own if nobody knows it before the job runs."""
        return (
            output_folder.kept(folder)
            or output_folder.expected(output_folder.at(values, folder.parent), number, str(number))
            or folder
        )

    def shared_updates(self, a: JobSpec, b: JobSpec) -> int:
        """Return 0: nobody knows what programs could share."""
        return 0

    def why_alone(self, spec: JobSpec) -> str | None:
        """Return that nobody knows what the program computes."""
        return "nobody knows what the program computes"

    def fork_points(self, folder: Path) -> Sequence[int]:
        """Return none."""
        return ()

    def graft(self, folder: Path, values: Mapping[str, Any], source: Path, update: int) -> None:
        """Refuse: programs share nothing.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a program's jobs share nothing")

    def prune_forks(self, folder: Path) -> None:
        """Do nothing."""

    def environment(self) -> Mapping[str, str]:
        """Return nothing: jobs have what backends pass on."""
        return {}


def program(task: Any, sweeper: Mapping[str, Any], umask: int) -> Program:
    """Return the program that has called ``task``, with what ``hydra.sweeper`` says of its sweep."""
    loaded = [name for name in PRELOADED if name in sys.modules and "." not in name]
    return start.program_of(
        task,
        objective=sweeper.get("objective"),
        direction=sweeper.get("direction") or "minimize",
        neutral=tuple(map(str, sweeper.get("neutral") or ())),
        preload=tuple(loaded),
        umask=umask,
    )


def _copies(program: Program, sweep: Path) -> Mapping[str, str]:
    from apt_launch.sweep.programs.snapshot import CODE

    return {} if program.snapshot is None else {program.snapshot: str(sweep / CODE)}


def _job_id(number: int) -> str:
    """Return what ``hydra.job.id`` is: SLURM's number of the job, elsewhere its place in the sweep, as in Hydra's launchers."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array and "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", str(number))


def _say_how_it_begins(job: JobContext, has_checkpoint: bool) -> None:
    if job.attempt:
        how = "its checkpoints are in job.checkpoints" if has_checkpoint else "it has none, and starts anew"
        _say(f"attempt {job.attempt + 1}: {how}")


def _say_how_it_ends(has_checkpoint: bool) -> None:
    how = (
        "it will continue from what it has written into job.checkpoints"
        if has_checkpoint
        else "it has written nothing into job.checkpoints, and will start anew"
    )
    _say(f"asked to stop: {how}")


def _say(line: str) -> None:
    """Write a line to the job's log."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _number(value: Any) -> float | None:
    """Return a number of Python's, numpy's or torch's as a float; None: it is none."""
    if isinstance(value, bool | str) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    number = _number(value)
    return number if number is not None else repr(value)[:1000]
