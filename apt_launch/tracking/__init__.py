"""Where metrics go: ``metrics.jsonl`` is the record, everything else is shown a copy."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)

Row = dict[str, float]


class Tracker(Protocol):
    """A service that is shown the rows of a run. It may fail; the run goes on."""

    def log(self, row: Row) -> None:
        """Take one row; ``row["step"]`` never falls."""

    def close(self, state: str) -> None:
        """Finish; ``state`` is done, failed or interrupted."""


class Record:
    """``metrics.jsonl``: one JSON object a row, on its way to disk as soon as it is logged.

    Args:
        keep_rows: rows that stay from before, when a run is resumed; later ones will be computed again.
    """

    def __init__(self, path: Path, *, keep_rows: int = 0) -> None:
        kept = path.read_bytes().splitlines(keepends=True)[:keep_rows] if path.exists() and keep_rows else []
        if kept and not kept[-1].endswith(b"\n"):  # torn by a crash
            kept.pop()
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_bytes(b"".join(kept))
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        """Append ``row``."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tracking:
    """Logs every row to the record first, then to each tracker; a tracker that fails is left out from there on."""

    def __init__(self, record: Record, trackers: Sequence[Tracker] = ()) -> None:
        self.record = record
        self.trackers = list(trackers)

    def log(self, row: Row) -> None:
        """Log ``row`` everywhere."""
        self.record.log(row)
        for tracker in list(self.trackers):
            try:
                tracker.log(row)
            except Exception as error:
                self.trackers.remove(tracker)
                logger.warning(
                    "%s failed at step %d and is shown no more rows (%s: %s). metrics.jsonl goes on with all of them.",
                    type(tracker).__name__,
                    row["step"],
                    type(error).__name__,
                    error,
                )

    def close(self, state: str) -> None:
        """Close everything."""
        for tracker in self.trackers:
            try:
                tracker.close(state)
            except Exception as error:
                logger.warning("%s could not be closed (%s: %s).", type(tracker).__name__, type(error).__name__, error)
        self.record.close()


def read_rows(path: Path) -> list[Row]:
    """Return the rows of ``metrics.jsonl``; a last line torn by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            rows.append(json.loads(line))
    return rows
