"""Runs a checked config here, and keeps its folder."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from apt_launch.build import build, build_trainer
from apt_launch.config import RunConfig
from apt_launch.folder import Resume, RunFolder, write_json, write_whole
from apt_launch.tracking import Record, Tracker, Tracking, read_rows
from apt_model.errors import AptError, Interrupted

logger = logging.getLogger(__name__)


class StopRequest:
    """Set by Ctrl-C or SIGTERM: the update in progress is finished first. A second signal leaves at once."""

    def __init__(self) -> None:
        self.made = False

    def __call__(self) -> bool:
        """Say whether a signal has come."""
        return self.made

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to SIGINT and SIGTERM meanwhile."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.made:
            os._exit(130)
        self.made = True
        told = f"{signal.Signals(number).name}: finishing this update and writing a checkpoint; once more leaves at once.\n"
        os.write(2, told.encode())  # a handler may interrupt a write: nothing that buffers is safe here


def dispatch(config: RunConfig, path: Path) -> float:
    """Train ``config`` here, into the folder ``path``; return the final validation loss.

    Raises:
        ConfigError: the folder is taken, or something that only torch can tell is wrong.
        TrainingError: the run failed; ``summary.json`` has the cause.
        Interrupted: it was stopped on request and can go on.
    """
    folder = RunFolder(path)
    resume = folder.check_free(config)
    stop = StopRequest()
    with stop.listening():
        return _run(config, folder, resume, stop)


def _run(config: RunConfig, folder: RunFolder, resume: Resume | None, stop: StopRequest) -> float:
    from apt_launch import summary
    from apt_launch.console import progress_callback
    from apt_launch.plots import draw_schedule, sheets
    from apt_model.training.checkpoint import Checkpoints

    began = time.time()
    trainer = build_trainer(  # before anything is written: what it refuses leaves the folder as it was
        config,
        log=lambda row: tracking.log(row),
        callbacks=[progress_callback()],
        checkpoints=Checkpoints(
            folder.checkpoints,
            keep_last=config.trainer.keep_checkpoints,
            about={
                "identity": config.identity,
                "config": config.result_values,
                "horizon": asdict(config.horizon),
            },
        ),
        resume=resume.checkpoint if resume else None,
        stop_requested=stop,
    )
    write_whole(folder.config, OmegaConf.to_yaml(OmegaConf.create(config.values)))
    keep_rows = resume.rows if resume and folder.owns(resume.checkpoint) else 0
    tracking = Tracking(Record(folder.metrics, keep_rows=keep_rows))

    def finish(state: str, cause: str | None = None) -> None:
        tracking.close(state)
        content = {
            "state": state,
            "cause": cause,
            "identity": config.identity,
            "steps": trainer.clock.step,
            "seconds": round(time.time() - began, 3),
            "tokens_per_second": round(trainer.tokens_per_second, 1),
        } | summary.summarise(read_rows(folder.metrics))
        write_json(folder.summary, content)
        summary.show(content, config, folder)

    try:
        write_json(folder.summary, {"state": "running", "identity": config.identity})
        _record_origin(folder, trainer)
        draw_schedule(sheets({"": config.program}), folder.schedule)
        tracking.trackers = _trackers(config, folder)
        for note in (*(resume.notes if resume else ()), *config.program.notes()):
            logger.warning("note: %s", note)
        logger.info(
            "%s%s: %s parameters on %s in %s, %s. Folder: %s",
            "resuming " if resume else "",
            config.identity[:8],
            f"{sum(p.numel() for p in trainer.model.parameters()):,}",
            trainer.device,
            str(trainer.autocast_dtype).removeprefix("torch."),
            config.horizon,
            folder.path,
        )
        trainer.fit()
    except Interrupted as interrupted:
        finish("interrupted")
        logger.info("%s. Go on with: trainer.resume=auto hydra.run.dir=%s", interrupted, folder.path)
        raise
    except BaseException as error:
        cause = str(error) if isinstance(error, AptError) else f"{type(error).__name__}: {error}"
        logger.error("failed: %s", cause, exc_info=True)
        finish("failed", cause)
        raise
    finish("done")
    rows = read_rows(folder.metrics)
    return next((row["val/loss"] for row in reversed(rows) if "val/loss" in row), math.nan)


def _record_origin(folder: RunFolder, trainer: Any) -> None:
    from apt_launch.provenance import provenance

    origin = provenance(Path.cwd()) | {
        "device": str(trainer.device),
        "compute_dtype": str(trainer.autocast_dtype).removeprefix("torch."),
    }
    write_json(folder.provenance, origin)


def _trackers(config: RunConfig, folder: RunFolder) -> list[Tracker]:
    """Build what the ``logger`` group names."""
    import hashlib

    if config.logger.target is None or config.values["logger"]["mode"] == "disabled":
        return []
    place = f"{config.identity}:{folder.path.resolve()}"
    tracker = build(
        config.values["logger"],
        folder=folder.path,
        run_id=f"{config.identity[:8]}-{hashlib.sha256(place.encode()).hexdigest()[:8]}",
        config=config.values,
    )
    return [tracker]
