"""A logger of the user's own is shown each row once, however often the run is killed and resumed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from apt_launch.record import Row
from apt_model.files import refuse_links


class OnceEach:
    """Keeps in the run's folder how many rows ``tracker`` was shown, and leaves these out at the next start.

    Rows that a resume computes anew are the same ones. A kill between a row and the note of it shows that row twice.

    Args:
        tracker: has ``log(row)``, and perhaps ``close(state)``.
    """

    def __init__(self, tracker: Any, folder: Path) -> None:
        self.tracker = tracker
        self.path = folder / "logger.rows"
        refuse_links(folder, "hydra.run.dir")
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        said = os.pread(self._file, 32, 0).decode("ascii", errors="replace").strip()
        self.shown = int(said) if said.isdecimal() else 0
        self.seen = 0

    def log(self, row: Row) -> None:
        """Show a row, unless it was shown before."""
        self.seen += 1
        if self.seen <= self.shown:
            return
        self.tracker.log(dict(row))
        self.shown = self.seen
        os.pwrite(self._file, f"{self.shown:<20}\n".encode(), 0)

    def close(self, state: str) -> None:
        """Finish."""
        os.close(self._file)
        close = getattr(self.tracker, "close", None)
        if callable(close):
            close(state)
