"""The output of a run while it trains: a progress bar on a terminal, a plain line every so often elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from apt_launch.config.token_progress import can_redraw
from apt_launch.escapes import console, visible
from apt_launch.rows import enabled, scheduled_values
from apt_model.schedule import Change
from apt_model.training.callbacks import Callback

if TYPE_CHECKING:
    from apt_model.training.callbacks import TrainerView

    _Handler = logging.StreamHandler[IO[str]]
else:  # Python 3.10 cannot say of what
    _Handler = logging.StreamHandler

logger = logging.getLogger(__name__)


class Stdout(_Handler):
    """Logs to whatever ``sys.stdout`` is at the time, so that a progress bar can keep its line to itself.

    Tracebacks are for the log file; what a user should know of an error is printed where the command ends.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave out records with a traceback."""
        return record.exc_info is None and bool(super().filter(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without what a terminal would obey."""
        return visible(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Ignore a closed output: the run and its log file do not depend on it."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
        else:
            super().handleError(record)

    @property
    def stream(self) -> IO[str]:  # type: ignore[override]
        """The current standard output."""
        return sys.stdout


def progress_callback() -> Callback:
    """Return the bar for a terminal, else the plain lines."""
    screen = console()
    return ProgressBar(screen) if can_redraw(screen) else PlainLines()


class _Announcements(Callback):
    """Logs when a module is enabled or disabled, and the validation loss."""

    shows_values = True

    def on_schedule(self, trainer: TrainerView, changes: Sequence[Change]) -> None:
        for change in changes:
            if isinstance(change.value, bool) and (change.value or trainer.clock.step):
                logger.info("%s: %s", trainer.clock, change.switch)

    def on_epoch_end(self, trainer: TrainerView) -> None:
        state = curriculum_state(trainer, values=self.shows_values)
        logger.info("%s: val/loss %.4f  (%s)", trainer.clock, trainer.last_row["val/loss"], state)


class PlainLines(_Announcements):
    """A line at most every ``seconds``, beside the announcements."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.last = 0.0
        self.began_at = (0.0, 0)

    def on_train_begin(self, trainer: TrainerView) -> None:
        self.began_at = (time.monotonic(), trainer.clock.step)
        self.last = time.monotonic()

    def on_step(self, trainer: TrainerView) -> None:
        now = time.monotonic()
        if now - self.last < self.seconds or "train/loss" not in trainer.last_row:
            return
        self.last = now
        began, first = self.began_at
        total, done = trainer.schedule.planned.steps, trainer.clock.step + 1
        left = (now - began) / max(1, done - first) * (total - done)
        row = trainer.last_row
        logger.info(
            "step %d/%d  loss %.4f  %s tokens/s  %s left  (%s)",
            done,
            total,
            row["train/loss"],
            f"{row['tokens_per_second']:,.0f}",
            f"{int(left) // 60}:{int(left) % 60:02d}",
            curriculum_state(trainer),
        )


class _TwoLines(Progress):
    """A progress bar with a line of text below."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return both lines, the lower one cut where the terminal ends."""
        yield from super().get_renderables()
        yield Text(self.below, style="dim", no_wrap=True, overflow="ellipsis")


class ProgressBar(_Announcements):
    """A bar with loss, tokens a second and the time left; below it the enabled modules, and the values that move."""

    shows_values = False

    def __init__(self, console: Console) -> None:
        whole = Column(no_wrap=True)
        self.progress = _TwoLines(
            TextColumn("epoch {task.fields[epoch]}", table_column=whole),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=whole),
            TextColumn("{task.fields[numbers]}", table_column=whole),
            TimeRemainingColumn(table_column=whole),
            TextColumn("left", table_column=whole),
            console=console,
            transient=True,
        )
        self.task: TaskID | None = None

    def on_train_begin(self, trainer: TrainerView) -> None:
        self.task = self.progress.add_task(
            "train",
            total=trainer.schedule.planned.steps,
            completed=trainer.clock.step,
            epoch=self._epoch(trainer),
            numbers="first update ...",
        )
        self.progress.below = curriculum_state(trainer)
        self.progress.start()

    def on_step(self, trainer: TrainerView) -> None:
        row = trainer.last_row
        assert self.task is not None
        self.progress.below = curriculum_state(trainer)
        self.progress.update(self.task, completed=trainer.clock.step + 1, epoch=self._epoch(trainer))
        if "train/loss" in row:
            loss = float(trainer.last_loss) if trainer.reads_every_update else row["train/loss"]
            numbers = f"loss {loss:.3f}  {row['tokens_per_second']:,.0f} tok/s"
            self.progress.update(self.task, numbers=numbers)

    def on_train_end(self, trainer: TrainerView) -> None:
        self.progress.stop()

    @staticmethod
    def _epoch(trainer: TrainerView) -> str:
        return f"{min(trainer.clock.epoch + 1, trainer.max_epochs)}/{trainer.max_epochs}"


def curriculum_state(trainer: TrainerView, *, values: bool = True) -> str:
    """Return the scheduled values in one short line: modules that are enabled, then ``values``."""
    metrics = trainer.schedule.metrics()
    modules = " + ".join(enabled(metrics))
    moving = [f"{name} {value:.3g}" for name, value in scheduled_values(metrics).items()] if values else []
    return ", ".join([f"{modules} enabled" if modules else "dense", *moving])
