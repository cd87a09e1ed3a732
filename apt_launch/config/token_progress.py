"""The progress of reading a corpus' tokens, on standard error."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


def can_redraw(console: Console) -> bool:
    """Return whether what was shown can be overwritten: at a terminal, and not in a log that is made to have colours."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


class TokenProgress:
    """Shows on standard error how many tokens have been read: a bar a split on a terminal, else a line every ``seconds``."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self.said = time.monotonic()
        self.progress = Progress(
            TextColumn("tokens of {task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, int]] = {}

    def show(self, split: str, done: float, tokens: int) -> None:
        """Show that ``done`` of ``split`` (0 to 1; nan: unknown) is ready, ``tokens`` so far; 1 comes once, at the end."""
        now = time.monotonic()
        terminal = can_redraw(self.progress.console)
        if split not in self.tasks:
            if terminal:
                self.progress.start()
            self.tasks[split] = self.progress.add_task(split, total=None, numbers="")
            self.began[split] = (now, tokens)
        began, first = self.began[split]
        speed = (tokens - first) / max(1e-3, now - began)
        self.progress.update(
            self.tasks[split],
            total=None if math.isnan(done) else 1.0,
            completed=None if math.isnan(done) else done,
            numbers=f"{tokens:,} tokens, {speed:,.0f} a second",
        )
        if not terminal and (done == 1 or now - self.said >= self.seconds):
            self.said = now
            self.progress.console.print(f"tokens of {split}: {tokens:,}, {speed:,.0f} a second", highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.progress.stop()
