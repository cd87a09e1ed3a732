"""Runs a checked config here, and keeps its folder."""

from __future__ import annotations

import logging
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from apt_launch.command_line import make_folder
from apt_launch.config.run_config import RunConfig
from apt_launch.lease import Holder, Lease
from apt_launch.runs.alone import alone_in_process
from apt_launch.runs.build import build_trainer
from apt_launch.runs.drill import Drill, Drilled
from apt_launch.runs.folder import Checked, RunFolder
from apt_launch.runs.forks import NO_FORKS, Forks
from apt_launch.runs.session import RolledBack, may_roll_back, run_once
from apt_launch.runs.stop import StopRequest
from apt_launch.tracking.deliver import Membership
from apt_model.errors import ConfigError, NonFiniteError

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    path: Path,
    member: Membership | None = None,
    *,
    checked: Checked | None = None,
    own_process: bool = True,
    alone: bool = False,
    forks: Forks = NO_FORKS,
) -> float:
    """Train ``config`` here, into the folder ``path``; return the final validation loss.

    Several ranks train one model; the first of them writes. A job of a sweep holds its folder's lease already.

    Args:
        member: which job of which sweep the run is.
        checked: that ``config`` may be run in ``path``, where that was checked already.
        own_process: whether the process is the run's own, which a second Ctrl-C ends.
        alone: whether the caller keeps other runs out of this process already; see :func:`alone_in_process`.
        forks: where other runs begin.

    Raises:
        ConfigError: the folder is taken or not the same on all ranks, another run is under way in this process, or something
            that only torch can find out is wrong.
        TrainingError: the run failed; ``summary.json`` has the cause.
        Interrupted: it was stopped on request and can continue.
    """
    with nullcontext() if alone else alone_in_process():
        return _train(config, path, member, checked=checked, own_process=own_process, forks=forks)


def _train(
    config: RunConfig,
    path: Path,
    member: Membership | None,
    *,
    checked: Checked | None,
    own_process: bool,
    forks: Forks,
) -> float:
    folder = RunFolder(path)
    checked = checked or folder.check(config)
    config.corpus.check()
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
                return _follow_first_rank(checked, folder, stop, forks)
            make_folder(path, "hydra.run.dir")
            lease = Lease(path / "lease.json", Holder.this_process()) if member is None else None
            try:
                checked = folder.still(checked)
                while True:
                    try:
                        return run_once(checked, folder, stop, member, forks)
                    except RolledBack:
                        pass
                    except Drilled:
                        if member is not None:  # its launcher gives it a new process
                            raise
                    checked = folder.check(config.resuming())
            finally:
                if lease is not None:
                    lease.release()


def _follow_first_rank(checked: Checked, folder: RunFolder, stop: StopRequest, forks: Forks) -> float:
    """Train as a rank that writes nothing."""
    from apt_model.training.distributed import barrier

    while True:
        barrier()  # the first rank has the lease, and knows what to continue from
        checked = folder.still(checked)
        config, left_out = checked.config, folder.left_out()
        drill = Drill(folder.path, config)
        trainer = build_trainer(
            config,
            callbacks=drill.callbacks,
            resume=checked.resume.checkpoint if checked.resume else None,
            leave_out=left_out,
            stop_requested=drill.stop_or(stop),
            forks=forks.updates,
        )
        try:
            drill.fit(trainer)
        except NonFiniteError:
            if not may_roll_back(config, left_out):
                raise
            checked = replace(checked, config=config.resuming(), held=())
        else:
            return math.nan
