"""Where metrics go: ``metrics.jsonl`` is the record, everything else a projection of it.

A projection reads the record in a thread of its own, from the first row on, and skips what it has already. So training
never waits for a service, a resume brings every projection up to date, and ``python -m apt_launch.sync`` does the same
later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from apt_launch.record import Record, RecordReader, Row

logger = logging.getLogger(__name__)

PATIENCE = {"done": 60.0, "failed": 60.0, "interrupted": 15.0, "stopped": 60.0}
"""Seconds that a run waits at its end for a service to take the last rows, by its state; nowhere else does it wait."""


class Tracker(Protocol):
    """A service that is shown the rows of a run, all of them at each start. It may fail; the run continues."""

    def log(self, row: Row) -> None:
        """Take one row, or skip one that it has; ``row["step"]`` never falls."""

    def close(self, state: str) -> None:
        """Finish; ``state`` is done, failed, interrupted or stopped, as a loser of its sweep."""


class Projection:
    """Shows the rows of a record to one tracker, in a thread of its own.

    Args:
        path: of the record.
        make: builds the tracker, in that thread; it may take its time, or fail.
        name: of the tracker, for messages.
        remedy: how to deliver later what could not be delivered now.
    """

    def __init__(self, path: Path, make: Callable[[], Tracker], *, name: str, remedy: str = "") -> None:
        self.path = path
        self.make = make
        self.name = name
        self.remedy = remedy
        self._state: str | None = None
        self._news = threading.Event()
        self._shown = -1.0  # the last step
        self._thread = threading.Thread(target=self._run, name="projection", daemon=True)
        self._thread.start()

    def notice(self) -> None:
        """Wake the thread: the record has grown."""
        self._news.set()

    def close(self, state: str) -> None:
        """Show the rest and finish; wait no longer than :data:`PATIENCE` says."""
        self._state = state
        self._news.set()
        self._thread.join(PATIENCE[state])
        if self._thread.is_alive():
            logger.warning(
                "not all rows could be shown in %g s; metrics.jsonl has them. %s", PATIENCE[state], self.remedy
            )

    def _run(self) -> None:
        try:
            tracker = self.make()
            for row in self._rows():
                tracker.log(row)
                self._shown = row["step"]
            tracker.close(str(self._state))
        except Exception as error:
            logger.warning(
                "%s failed %s and is shown no more rows (%s: %s). metrics.jsonl still gets all of them. %s",
                self.name,
                "at its start" if self._shown < 0 else f"after step {self._shown:.0f}",
                type(error).__name__,
                str(error).strip(),
                self.remedy,
            )

    def _rows(self) -> Iterator[Row]:
        """Yield every row of the record, those to come as they come, until it is closed."""
        reader = RecordReader(self.path)
        while True:
            last = self._state is not None
            self._news.clear()
            yield from reader.rows()
            if last:
                return
            if self._state is None:
                self._news.wait()


class Tracking:
    """Logs every row to the record, which projections follow."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.projections: list[Projection] = []

    def project(self, make: Callable[[], Tracker], *, name: str, remedy: str = "") -> None:
        """Show the rows, from the first on, to what ``make`` builds; see :class:`Projection`."""
        self.projections.append(Projection(self.record.path, make, name=name, remedy=remedy))

    def log(self, row: Row) -> None:
        """Log ``row``."""
        self.record.log(row)
        for projection in self.projections:
            projection.notice()

    def close(self, state: str) -> None:
        """Close everything."""
        self.record.close()
        for projection in self.projections:
            projection.close(state)
