"""Follows a sweep in the terminal that waits for it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apt_launch.commands import command
from apt_launch.escapes import visible
from apt_launch.sweep.control.cancel import cancel
from apt_launch.sweep.control.ledger import Ledger, Status, record_ends
from apt_launch.sweep.control.table import show


def say(line: str) -> None:
    """Print a line, now."""
    sys.stdout.write(visible(line) + "\n")
    sys.stdout.flush()


def follow(folder: Path, only: set[str] | None = None, *, record: bool = True) -> int:
    """Print each job as it changes, until all have ended; then show the table. Return the exit code.

    Ctrl-C asks whether to leave the jobs running or to cancel them.

    Args:
        only: the folders of the jobs to follow; None: all.
        record: whether to write the ends of jobs that could not write them.

    Raises:
        KeyboardInterrupt: the user left or cancelled.
    """
    ledger = Ledger(folder)
    shown: dict[str, str] = {}
    # seconds; SLURM's controller is everybody's
    least, most = (0.05, 0.2) if ledger.plan.launcher == "local" else (0.5, 5.0)
    pause = least
    with collected_interrupts() as interrupts:
        while True:
            began = time.process_time()
            statuses = [s for s in ledger.statuses(rows=False) if only is None or s.job.folder in only]
            if record:
                record_ends(statuses)
            for status in statuses:
                name = status.job.folder
                waits = status.state in ("submitted", "pending") or (status.state == "planned" and not status.cause)
                if shown.get(name) != status.state and not waits:
                    say(_line(status, ledger.application.metric))
                    pause = least
                shown[name] = status.state
            if all(status.final or status.state == "planned" for status in statuses):
                break
            looked = time.process_time() - began  # at many jobs it is worth counting: they have the same cores
            until = time.monotonic() + max(pause, 20 * looked)
            while not interrupts and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
            if interrupts:
                interrupts.clear()
                _leave_or_cancel(folder)
            pause = min(pause * 1.2, most)
    if only is None:
        show(ledger.plan, ledger.statuses(), folder)
    return 0 if all(status.state in ("done", "stopped", "dropped") for status in statuses) else 1


@contextmanager
def collected_interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C meanwhile: an exception may come where Python swallows it, in a destructor for instance."""
    interrupts: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def _line(status: Status, metric: str) -> str:
    loss = f"  {metric} {status.loss:.4f}" if status.loss is not None else ""
    again = f" (attempt {status.restarts + 1})" if status.restarts and status.state == "running" else ""
    cause = (
        f": {status.cause}"
        if status.cause and status.state in ("failed", "cancelled", "stopped", "unknown", "planned")
        else ""
    )
    return f"{status.job.number:>4}  {status.state:<9}{again}{loss}  {status.job.label}{cause}"


def _leave_or_cancel(folder: Path) -> None:
    """Ask what Ctrl-C means; without somebody to ask, and after a second Ctrl-C, the jobs continue."""
    left = f"The jobs continue. Look at them by: {command('apt_launch.sweep', 'status', folder)}"
    answer = ""
    if sys.stdin.isatty():
        collecting = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            answer = (
                input("\nLeave the jobs running, cancel them, or continue to wait? [leave/cancel/wait] ")
                .strip()
                .lower()
            )
        except (KeyboardInterrupt, EOFError):
            answer = "leave"
        finally:
            signal.signal(signal.SIGINT, collecting)
    if answer.startswith("w"):
        return
    if answer.startswith("c"):
        cancel(folder)
        say("All cancelled; their checkpoints are kept.")
    else:
        say(left)
    raise KeyboardInterrupt
