"""A trace of a few updates by torch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from apt_model.training.callbacks import Callback, TrainerView

logger = logging.getLogger(__name__)


class Profile(Callback):
    """Records updates ``at`` to ``at + steps - 1``, and writes ``step-AT.json.gz`` into ``folder``: a trace for Perfetto.

    What is trained does not change; recorded updates take longer. After a resume between them the rest is recorded, in a file of
    its own; after one behind them, nothing.
    """

    def __init__(self, folder: Path, *, at: int, steps: int) -> None:
        self.folder = folder
        self.at, self.end = at, at + steps
        self._profiler: Any = None
        self._first = at

    def on_train_begin(self, trainer: TrainerView) -> None:
        """Say so where there is nothing left to record."""
        if trainer.clock.step >= self.end:
            logger.warning(
                "trainer.profile: updates %d to %d are made already; nothing is recorded", self.at, self.end - 1
            )

    def on_batch_begin(self, trainer: TrainerView) -> None:
        """Begin with the first batch of the first update."""
        if self._profiler is None and self.at <= trainer.clock.step < self.end:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if trainer.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._first = trainer.clock.step
            self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
            self._profiler.start()

    def on_step(self, trainer: TrainerView) -> None:
        """Write the trace after the last update."""
        if trainer.clock.step == self.end - 1:
            self._write()

    def on_train_end(self, trainer: TrainerView) -> None:
        """Write what there is, where training ended before."""
        self._write()

    def _write(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        path = self.folder / f"step-{self._first:08d}.json.gz"
        try:
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.error("trainer.profile: no trace was written to %s: %s", path, error)
        else:
            logger.info("trace of updates %d to %d: %s", self._first, self.end - 1, path)
