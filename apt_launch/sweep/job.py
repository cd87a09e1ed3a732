"""What a program may ask for and say while it is a job of a sweep: ``from apt_launch.sweep import job``.

Nothing of it is needed to be swept, and all of it works, and does no harm, in a program that is started by hand.

``job.folder`` (a Path): where the run's files belong; by hand Hydra's output folder, or the working folder without Hydra.
``job.checkpoints`` (a Path): a folder for checkpoints that outlives attempts, made when it is asked for.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from apt_launch.record import Record, read_rows
from apt_model.errors import Interrupted

CHECKPOINTS: Final = "checkpoints"
COUNTED: Final = frozenset({"step", "epoch", "samples", "tokens", "time", "total"})
"""Names in rows that count, and are no results."""


def report(step: int | None = None, total: int | None = None, **metrics: Any) -> None:
    """Record metrics, which status, watch and report read: numbers of Python, numpy or torch.

    Args:
        step: how far the run is, from 0; None: one more than at the last report.
        total: how many steps the run has.
        metrics: by name; for names such as ``val/loss`` write ``report(step, **{"val/loss": 0.5})``.
    """
    if _context is not None:
        _context.report(step, total, metrics)


def stop_requested() -> bool:
    """Return whether the job has been asked to stop: by a cluster, at its time limit, by ``sweep cancel``, or as a loser.

    A program that asks is not interrupted. It writes its checkpoint and returns, or calls :func:`requeue`.
    """
    if _context is None:
        return False
    _context.asks = True
    _context.has_heard = _context.has_heard or _context.stop
    return _context.stop


def requeue() -> None:
    """End this attempt now; the job is started again. By hand it returns, and nothing happens.

    Raises:
        Interrupted: which ends the program; a KeyboardInterrupt, and no Exception.
    """
    if _context is not None:
        _context.interrupted = True
        raise Interrupted("the program asked to be started again")


def __getattr__(name: str) -> Path:
    if name == "folder":
        return _context.output if _context is not None else _by_hand()
    if name == "checkpoints":
        found = (_context.folder if _context is not None else _by_hand()) / CHECKPOINTS
        found.mkdir(parents=True, exist_ok=True)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _by_hand() -> Path:
    hydra = sys.modules.get("hydra.core.hydra_config")
    if hydra is not None and hydra.HydraConfig.initialized():
        return Path(hydra.HydraConfig.get().runtime.output_dir)
    return Path.cwd()


@dataclass
class Context:
    """What the process of a job knows; see :func:`begin`."""

    folder: Path
    output: Path
    first: bool
    began: float = field(default_factory=time.monotonic)
    judge: Callable[[Mapping[str, float]], bool] | None = None  # of each row: whether the job ends as a loser
    lost: bool = False  # it does
    stop: bool = False  # a signal has come
    asks: bool = False  # the program looks for it
    has_heard: bool = False
    interrupted: bool = False
    reports: int = 0
    _last: int = -1
    _record: Record | None = None
    _process: int = field(default_factory=os.getpid)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to continue from."""
        return has_files(self.folder / CHECKPOINTS)

    @property
    def leaves_early(self) -> bool:
        """Whether the program has returned because it was asked to stop."""
        return self.has_heard and self.has_checkpoint

    def asked_to_stop(self, number: int, frame: Any) -> None:
        """Take a signal: the program finds out when it asks, and is interrupted here if it never does."""
        self.stop = True
        if os.getpid() != self._process:  # a process that the program has forked
            os._exit(128 + number)
        if not self.asks and not self.interrupted:
            self.interrupted = True
            raise Interrupted("asked to stop")

    def report(self, step: int | None, total: int | None, metrics: Mapping[str, Any]) -> None:
        """Append a row to the record."""
        self.reports += 1
        self.write(step, metrics if total is None else {"total": total, **metrics})

    def write(self, step: int | None, metrics: Mapping[str, Any]) -> None:
        """Append a row, whoever has it."""
        if not self.first or os.getpid() != self._process:  # ranks after the first, and loaders of data
            return
        if self._record is None:
            path = self.folder / "metrics.jsonl"
            before = read_rows(path) if path.exists() else []
            self._record = Record(path, keep_rows=len(before))
            self._last = max((int(row["step"]) for row in before), default=-1)
        self._last = self._last + 1 if step is None else int(step)
        row: dict[str, float] = {"step": max(0, self._last), "time": round(time.monotonic() - self.began, 3)}
        for name, value in metrics.items():
            try:
                row[name] = value if type(value) is int and abs(value) < 1 << 63 else float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:
                raise TypeError(f"job.report: {name}={value!r} is no number") from error
        self._record.log(row)
        if self.judge is not None and not self.lost and self.judge(row):
            self.lost = True
            os.kill(self._process, signal.SIGUSR1)  # as a cluster asks a job to stop, and heard by the main thread

    def finish(self, numbers: Mapping[str, float]) -> None:
        """Record what the program returned, beside the last that it reported."""
        if numbers:
            path = self.folder / "metrics.jsonl"
            last = self._last if self._record is not None or not path.exists() else None
            self.write(None if last is None else max(0, last), numbers)


_context: Context | None = None


def begin(
    folder: Path, output: Path, *, first: bool, judge: Callable[[Mapping[str, float]], bool] | None = None
) -> Context:
    """Make this process that of the job in ``folder``; ``first``: of several ranks it is the one that writes.

    Args:
        judge: called with each row; True: the job is asked to stop, as one of its sweep's losers.
    """
    global _context
    _context = Context(folder, output, first, judge=judge)
    return _context


def has_files(folder: Path) -> bool:
    """Return whether any file is in ``folder`` or below."""
    return folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))
