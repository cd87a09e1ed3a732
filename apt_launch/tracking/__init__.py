"""Where metrics go: ``metrics.jsonl`` is the record, everything else a projection of it.

A projection reads the record in a thread of its own, from the first row on, and skips what it has already. So training
never waits for a service, a resume brings every projection up to date, and ``python -m apt_launch.sync`` does the same
later.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

Row = dict[str, float]

PATIENCE = {"done": 60.0, "failed": 60.0, "interrupted": 15.0}
"""Seconds that a run waits at its end for a service to take the last rows, by its state; nowhere else does it wait."""


class Tracker(Protocol):
    """A service that is shown the rows of a run, all of them at each start. It may fail; the run goes on."""

    def log(self, row: Row) -> None:
        """Take one row, or skip one that it has; ``row["step"]`` never falls."""

    def close(self, state: str) -> None:
        """Finish; ``state`` is done, failed or interrupted."""


class Record:
    """``metrics.jsonl``: one JSON object a row, on its way to disk as soon as it is logged.

    Where the disk takes no more, rows stay in memory until it does, and training goes on.

    Args:
        keep_rows: rows that stay from before, when a run is resumed; later ones will be computed again.
    """

    def __init__(self, path: Path, *, keep_rows: int = 0) -> None:
        self.path = path
        kept = path.read_bytes().splitlines(keepends=True)[:keep_rows] if path.exists() and keep_rows else []
        if kept and not kept[-1].endswith(b"\n"):  # torn by a crash
            kept.pop()
        if len(kept) < keep_rows:
            logger.warning("%s has %d rows, but the checkpoint knew %d.", path, len(kept), keep_rows)
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_bytes(b"".join(kept))
        aside.replace(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._unwritten = b""
        self._lock = threading.Lock()
        self._warned = False

    def log(self, row: Row) -> None:
        """Append ``row``."""
        with self._lock:
            self._unwritten += json.dumps(row).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not self._warned:
                logger.warning("%s cannot be written (%s): its rows are kept in memory until it can.", self.path, error)
            self._warned = True

    def _write(self) -> None:
        with self._lock:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def sync(self) -> None:
        """Make sure that all rows are on the disk.

        Raises:
            OSError: they are not.
        """
        self._write()
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        try:
            self._write()
        except OSError as error:
            lost = self._unwritten.count(b"\n")
            logger.error("%s: the last %d rows could not be written (%s).", self.path, lost, error)
        os.close(self._file)


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
        """Say that the record has grown."""
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
                "%s failed %s and is shown no more rows (%s: %s). metrics.jsonl goes on with all of them. %s",
                self.name,
                "at its start" if self._shown < 0 else f"after step {self._shown:.0f}",
                type(error).__name__,
                str(error).strip(),
                self.remedy,
            )

    def _rows(self) -> Iterator[Row]:
        """Yield every row of the record, those to come as they come, until it is closed."""
        with self.path.open("rb") as file:
            rest = b""
            while True:
                last = self._state is not None
                self._news.clear()
                while chunk := file.read(1 << 16):
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from map(json.loads, lines)
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


def read_rows(path: Path) -> list[Row]:
    """Return the rows of ``metrics.jsonl``; a last line torn by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
