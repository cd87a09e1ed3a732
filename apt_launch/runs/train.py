"""Runs a checked config here, and keeps its folder."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from apt_launch.config.corpus import build_corpus
from apt_launch.config.load import RunConfig
from apt_launch.record import Record, read_rows
from apt_launch.runs.build import build_trainer
from apt_launch.runs.drill import Drill, Drilled
from apt_launch.runs.folder import Resume, RunFolder
from apt_launch.sweep.lease import Holder, Lease
from apt_launch.tracking.deliver import Membership, project
from apt_launch.tracking.projection import Tracking
from apt_model.errors import SIGNALS, ConfigError, Interrupted, NonFiniteError, cause_of
from apt_model.files import write_json, write_whole

logger = logging.getLogger(__name__)


class StopRequest:
    """Set by one of ``SIGNALS``: the update in progress is finished first. A second Ctrl-C leaves at once.

    Args:
        own_process: to leave ends the process; else it raises KeyboardInterrupt.
    """

    def __init__(self, *, own_process: bool = True) -> None:
        self.made = False
        self.own_process = own_process

    def __call__(self) -> bool:
        """Say whether a signal has come."""
        return self.made

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to ``SIGNALS`` meanwhile; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.made and number == signal.SIGINT:
            if self.own_process:
                os._exit(130)
            raise KeyboardInterrupt
        if self.made:  # clusters send several signals for one end
            return
        self.made = True
        more = "; once more leaves at once" if number == signal.SIGINT else ""
        told = f"{signal.Signals(number).name}: finishing this update and writing a checkpoint{more}.\n"
        os.write(2, told.encode())  # a handler may interrupt a write: nothing that buffers is safe here


def train(config: RunConfig, path: Path, member: Membership | None = None, *, own_process: bool = True) -> float:
    """Train ``config`` here, into the folder ``path``; return the final validation loss.

    Several ranks train one model; the first of them writes. A job of a sweep holds its folder's lease already. What a second
    Ctrl-C does depends on whether the process is the run's own.

    Raises:
        ConfigError: the folder is taken or not the same on all ranks, or something that only torch can tell is wrong.
        TrainingError: the run failed; ``summary.json`` has the cause.
        Interrupted: it was stopped on request and can go on.
    """
    folder = RunFolder(path)
    folder.check_free(config)
    build_corpus(config.values["data"]).check()
    if "torch" not in sys.modules and member is None:
        logger.info("%s: the config is right. Loading torch ...", config.horizon)
    stop = StopRequest(own_process=own_process)
    with stop.listening():
        from apt_model.layers.backend import onednn_products
        from apt_model.training.device import choose_device
        from apt_model.training.distributed import gathered, process_group
        from apt_model.training.memory import keep_freed_memory

        if config.trainer.keep_freed_memory:
            keep_freed_memory()

        on_cpu = choose_device(config.trainer.device).type == "cpu"
        products = onednn_products if config.trainer.onednn_products and on_cpu else nullcontext
        with products(), process_group(config.trainer.device) as ranks:
            folders = sorted(set(gathered(str(path.absolute()))))
            if len(folders) > 1:
                raise ConfigError(
                    f"hydra.run.dir: {ranks.world} ranks train one model, and want {len(folders)} folders, {folders[0]} for "
                    "one. Name the same for all: hydra.run.dir=runs/a."
                )
            if ranks.rank:
                return _follow_first_rank(config, folder, stop)
            path.mkdir(parents=True, exist_ok=True)
            lease = Lease(path / "lease.json", Holder.this_process()) if member is None else None
            try:
                while True:
                    try:
                        return _run(config, folder, folder.check_free(config), stop, member)
                    except RolledBack:
                        config = config.resuming()
                    except Drilled:
                        if member is not None:  # its launcher gives it a new process
                            raise
                        config = config.resuming()
            finally:
                if lease is not None:
                    lease.release()


class RolledBack(Interrupted):
    """The run goes back to its last checkpoint, and will leave an update out."""


def _follow_first_rank(config: RunConfig, folder: RunFolder, stop: StopRequest) -> float:
    """Do the work of a rank that writes nothing."""
    from apt_model.training.distributed import barrier

    while True:
        barrier()  # the first rank has the lease, and knows what to go on from
        resume = folder.check_free(config)
        left_out = folder.left_out()
        drill = Drill(folder.path, config)
        trainer = build_trainer(
            config,
            log=lambda row: None,
            callbacks=drill.callbacks,
            resume=resume.checkpoint if resume else None,
            leave_out=left_out,
            stop_requested=drill.stop_or(stop),
        )
        try:
            drill.fit(trainer)
        except NonFiniteError:
            if not _may_roll_back(config, left_out):
                raise
            config = config.resuming()
        else:
            return math.nan


MOST_ROLLBACKS = 10
"""After which a run has failed: something is wrong that no batch is to blame for."""


def _may_roll_back(config: RunConfig, left_out: list[tuple[int, int]]) -> bool:
    return config.trainer.on_nonfinite == "rollback" and len(left_out) < MOST_ROLLBACKS


def _run(
    config: RunConfig, folder: RunFolder, resume: Resume | None, stop: StopRequest, member: Membership | None
) -> float:
    from apt_launch.preview.painter import draw_schedule, sheets
    from apt_launch.runs import summary
    from apt_launch.runs.console import progress_callback
    from apt_model.training.checkpoint import Checkpoints
    from apt_model.training.distributed import barrier
    from apt_model.training.watchdogs import CollapseWatch, SpikeWatch, Watchdog

    began = time.time()
    barrier()
    left_out = folder.left_out()
    minutes = config.trainer.stall_minutes
    watchdog = Watchdog(folder.log, stall_seconds=60 * minutes if minutes else None)
    drill = Drill(folder.path, config)
    checkpoints = Checkpoints(
        folder.checkpoints,
        keep_last=config.trainer.keep_last,
        keep_best=config.trainer.keep_best,
        keep_every=config.trainer.keep_every,
        about={
            "identity": config.identity,
            "config": config.result_values,
            "horizon": asdict(config.horizon),
        },
        before=lambda: tracking.record.sync(),
    )
    trainer = build_trainer(  # before anything is written: what it refuses leaves the folder as it was
        config,
        log=lambda row: tracking.log(row),
        callbacks=[progress_callback(), SpikeWatch(), CollapseWatch(), watchdog, *drill.callbacks],
        checkpoints=checkpoints,
        resume=resume.checkpoint if resume else None,
        leave_out=left_out,
        stop_requested=drill.stop_or(stop),
    )
    write_whole(folder.config, OmegaConf.to_yaml(OmegaConf.create(config.values)))
    tokenizer = build_corpus(config.values["data"]).tokenizer_file
    if tokenizer is not None:  # what the weights mean without the corpus
        write_whole(folder.tokenizer, tokenizer.read_text(encoding="utf-8"))
    keep_rows = resume.rows if resume and folder.owns(resume.checkpoint) else 0
    tracking = Tracking(Record(folder.metrics, keep_rows=keep_rows))

    def finish(state: str, cause: str | None = None) -> None:
        checkpoints.wait()
        tracking.close(state)
        content = {
            "state": state,
            "cause": cause,
            "identity": config.identity,
            "steps": trainer.clock.step,
            "seconds": round(time.time() - began, 3),
            "tokens_per_second": round(trainer.tokens_per_second, 1),
        } | summary.summarise(read_rows(folder.metrics))
        try:
            write_json(folder.summary, content)
        except OSError as error:
            logger.error("%s could not be written: %s", folder.summary, error)
        summary.show(content, config, folder)

    def fail(error: BaseException) -> None:
        logger.error("failed: %s", cause_of(error), exc_info=True)
        finish("failed", cause_of(error))

    try:
        write_json(folder.summary, {"state": "running", "identity": config.identity})
        _record_origin(folder, trainer)
        draw_schedule(sheets({"": config.program}), folder.schedule)
        project(tracking, config, folder.path, member)
        for note in (*(resume.notes if resume else ()), *config.program.notes()):
            logger.warning("note: %s", note)
        logger.info(
            "%s%s: %s parameters on %s in %s%s, %s. Folder: %s",
            "resuming " if resume else "",
            config.identity[:8],
            f"{sum(p.numel() for p in trainer.model.parameters()):,}",
            trainer.device,
            str(trainer.autocast_dtype).removeprefix("torch."),
            ", compiled (the first updates of each phase wait for that)" if trainer.compiled else "",
            config.horizon,
            folder.path,
        )
        drill.fit(trainer)
    except Interrupted as interrupted:
        finish("interrupted")
        if not isinstance(interrupted, Drilled) and member is None and stop.own_process:
            logger.info("%s. Go on with: %s", interrupted, folder.going_on())
        raise
    except NonFiniteError as error:
        if not _may_roll_back(config, left_out):
            fail(error)
            raise
        folder.leave_out([*left_out, (trainer.clock.epoch, trainer.batches_done)])
        checkpoints.wait()
        tracking.close("interrupted")
        logger.warning("rolling back to the last checkpoint, from where this update will be left out: %s", error)
        raise RolledBack(str(error)) from None
    except BaseException as error:
        fail(error)
        raise
    finish("done")
    if member is None and stop.own_process and sys.stdout.isatty():
        summary.suggest(folder)
    rows = read_rows(folder.metrics)
    return next((row["val/loss"] for row in reversed(rows) if "val/loss" in row), math.nan)


def _record_origin(folder: RunFolder, trainer: Any) -> None:
    from apt_launch.runs.provenance import provenance

    origin = provenance(Path.cwd()) | {
        "device": str(trainer.device),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "compute_dtype": str(trainer.autocast_dtype).removeprefix("torch."),
    }
    write_json(folder.provenance, origin)
