"""One attempt of a run: from its trainer to its summary."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from apt_launch.config.run_config import RunConfig
from apt_launch.config.schedule_plot import draw_schedule, sheets
from apt_launch.record import Record, Row, read_rows
from apt_launch.runs import summary
from apt_launch.runs.build import build_trainer
from apt_launch.runs.console import progress_callback
from apt_launch.runs.drill import Drill, Drilled
from apt_launch.runs.folder import Checked, RunFolder, about
from apt_launch.runs.forks import NO_FORKS, Forks
from apt_launch.runs.projections import project
from apt_launch.runs.provenance import provenance
from apt_launch.runs.stop import StopRequest
from apt_launch.runs.utilisation import with_utilisation
from apt_launch.tracking.deliver import Membership
from apt_launch.tracking.projection import Tracking
from apt_model.data.tokenizer import read_tokenizer
from apt_model.errors import Interrupted, NonFiniteError, cause_of
from apt_model.files import write_atomic, write_json

if TYPE_CHECKING:
    from apt_model.training.checkpoint import Checkpoints
    from apt_model.training.trainer import Trainer

logger = logging.getLogger(__name__)

MOST_ROLLBACKS = 10
"""After which a run has failed: something is wrong that no batch is to blame for."""


class RolledBack(Interrupted):
    """The run goes back to its last checkpoint, and will leave an update out."""


def may_roll_back(config: RunConfig, left_out: list[tuple[int, int]]) -> bool:
    """Return whether the run continues from its last checkpoint after an update that is not finite."""
    return config.trainer.on_nonfinite == "rollback" and len(left_out) < MOST_ROLLBACKS


def run_once(
    checked: Checked, folder: RunFolder, stop: StopRequest, member: Membership | None, forks: Forks = NO_FORKS
) -> float:
    """Train until the run is done, and keep its folder; return the final validation loss.

    Raises:
        Drilled: the drill interrupted it.
        RolledBack: it is to continue from its last checkpoint.
        Interrupted: it was stopped on request.
        Exception: why it failed.
    """
    from apt_model.training.checkpoint import Checkpoints
    from apt_model.training.distributed import barrier
    from apt_model.training.profiling import Profile
    from apt_model.training.watchdogs import CollapseWatch, SpikeWatch, Watchdog

    began = time.time()
    barrier()
    config, resume, left_out = checked.config, checked.resume, folder.left_out()
    minutes = config.trainer.stall_minutes
    watchdog = Watchdog(folder.log, stall_seconds=60 * minutes if minutes else None)
    drill = Drill(folder.path, config)
    wanted = config.trainer.profile
    profiles = [Profile(folder.path / "profile", at=wanted.at, steps=wanted.steps)] if wanted else []
    checkpoints = Checkpoints(
        folder.checkpoints,
        keep_last=config.trainer.keep_last,
        keep_best=config.trainer.keep_best,
        keep_every=config.trainer.keep_every,
        about=about(config),
        forks=forks.updates,
        needed=forks.needed,
        after=forks.reached,
    )
    trainer = build_trainer(  # before anything is written: what it refuses leaves the folder as it was
        config,
        callbacks=[progress_callback(), SpikeWatch(), CollapseWatch(), watchdog, *profiles, *drill.callbacks],
        checkpoints=checkpoints,
        resume=resume.checkpoint if resume else None,
        leave_out=left_out,
        stop_requested=drill.stop_or(stop),
        forks=forks.updates,
    )
    session = Session(checked, folder, trainer, checkpoints, began)
    if member is not None and member.judge is not None:
        trainer.log = _judged(trainer.log, member.judge, stop)
    try:
        session.start(member)
        drill.fit(trainer)
    except Interrupted as interrupted:
        session.finish("stopped" if stop.as_loser else "interrupted")
        if not isinstance(interrupted, Drilled) and member is None and stop.own_process:
            logger.info("%s. %s", interrupted, folder.how_to_resume(config))
        raise
    except NonFiniteError as error:
        if not may_roll_back(config, left_out):
            session.fail(error)
            raise
        folder.leave_out([*left_out, (trainer.clock.epoch, trainer.batches_done)])
        session.close("interrupted")
        logger.warning("rolling back to the last checkpoint, from where this update will be left out: %s", error)
        raise RolledBack(str(error)) from None
    except BaseException as error:
        session.fail(error)
        raise
    loss = session.finish("done")
    if member is None and stop.own_process and sys.stdout.isatty():
        summary.suggest(folder)
    return loss


def _judged(
    log: Callable[[Row], None], judge: Callable[[Mapping[str, float]], bool], stop: StopRequest
) -> Callable[[Row], None]:
    """Return ``log``, after which ``judge`` sees each row and may end the run."""

    def log_and_judge(row: Row) -> None:
        log(row)
        if judge(row):
            stop.end_loser()

    return log_and_judge


class Session:
    """Keeps a run's folder: its record and what is shown of it, its config, origin, picture and summary.

    Args:
        checked: what the trainer was built from.
        began: when, in seconds since 1970.
    """

    def __init__(
        self, checked: Checked, folder: RunFolder, trainer: Trainer, checkpoints: Checkpoints, began: float
    ) -> None:
        self.config, self.resume = checked.config, checked.resume
        self.folder = folder
        self.trainer = trainer
        self.checkpoints = checkpoints
        self.began = began
        keep_rows = self.resume.rows if self.resume and folder.owns(self.resume.checkpoint) else 0
        write_atomic(folder.config, OmegaConf.to_yaml(OmegaConf.create(self.config.values)))
        if self.config.corpus.tokenizer_file is not None:  # what the weights mean without the corpus
            write_atomic(folder.tokenizer, read_tokenizer(self.config.corpus.tokenizer_file))
        self.tracking = Tracking(Record(folder.metrics, keep_rows=keep_rows))
        trainer.log = with_utilisation(self.tracking.log, self.config, trainer)
        checkpoints.before = self.tracking.record.sync

    def start(self, member: Membership | None) -> None:
        """Write where the run comes from and what it will do, and say so."""
        config, trainer = self.config, self.trainer
        write_json(
            self.folder.summary,
            {"state": "running", "identity": config.identity, "planned_steps": config.horizon.steps},
        )
        write_json(self.folder.provenance, self._origin())
        draw_schedule(sheets({"": config.program}), self.folder.schedule)
        project(self.tracking, config, self.folder.path, member)
        for note in (*(self.resume.notes if self.resume else ()), *config.program.notes()):
            logger.warning("note: %s", note)
        logger.info(
            "%s%s: %s parameters on %s in %s%s, %s. Folder: %s",
            "resuming " if self.resume else "",
            config.identity[:8],
            f"{sum(p.numel() for p in trainer.model.parameters()):,}",
            trainer.device,
            _name(trainer),
            ", compiled (the first updates of each phase wait for that)" if trainer.compiled else "",
            config.horizon,
            self.folder.path,
        )

    def _origin(self) -> dict[str, object]:
        return provenance(Path.cwd()) | {
            "device": str(self.trainer.device),
            "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "compute_dtype": _name(self.trainer),
        }

    def close(self, state: str) -> None:
        """Wait for the last checkpoint, and for the projections of the record."""
        self.checkpoints.wait()
        self.tracking.close(state)

    def finish(self, state: str, cause: str | None = None) -> float:
        """Close, write and show the summary; return the last validation loss, nan where there is none."""
        self.close(state)
        rows = read_rows(self.folder.metrics)
        content = {
            "state": state,
            "cause": cause,
            "identity": self.config.identity,
            "steps": self.trainer.clock.step,
            "planned_steps": self.config.horizon.steps,
            "seconds": round(time.time() - self.began, 3),
            "tokens_per_second": round(self.trainer.tokens_per_second, 1),
        } | summary.summarise(rows, self.config.program.modules)
        try:
            write_json(self.folder.summary, content)
        except OSError as error:
            logger.error("%s could not be written: %s", self.folder.summary, error)
        summary.show(content, self.config, self.folder)
        return next((row["val/loss"] for row in reversed(rows) if "val/loss" in row), math.nan)

    def fail(self, error: BaseException) -> None:
        """Log what ended the run, and finish."""
        logger.error("failed: %s", cause_of(error), exc_info=True)
        self.finish("failed", cause_of(error))


def _name(trainer: Trainer) -> str:
    return str(trainer.autocast_dtype).removeprefix("torch.")
