"""``metrics.jsonl``, the record of a run: one JSON object a row. Here is the only writer of it, and the only reader.

The first row says the version of the format under :data:`NAMED`. That is no metric, and readers here leave it out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from apt_model.errors import ConfigError
from apt_model.files import open_new, open_regular, refuse_newer

logger = logging.getLogger(__name__)

Row = dict[str, float]
"""Metrics by name, with ``step``."""

VERSION: Final = 1
"""Of the format, see docs/reference/files.md; a record that names none is of the first."""

NAMED: Final = "$version"
"""The key for that, in the first row alone."""

COUNTERS = ("step", "epoch", "samples", "tokens", "time")
"""What counts how far a run is: finite in every row that has it."""

LONGEST_LINE = 1 << 24
"""Bytes of a line; a longer one is damage, and is not kept in memory to see where it ends."""

CHUNK = 1 << 20
TAIL = 1 << 18
"""Bytes that are read at once: of a record from its beginning, and of its end alone."""


def as_record(rows: Sequence[Row]) -> str:
    """Return the text of a record with ``rows``."""
    return "".join(json.dumps({NAMED: VERSION, **row} if row is rows[0] else row) + "\n" for row in rows)


class Record:
    """Writes a record: each row is on its way to the disk as soon as it is logged.

    Where the disk takes no more, rows stay in memory until it does, and training continues.

    Args:
        keep_rows: rows that stay from before, when a run is resumed; later ones will be computed again.

    Raises:
        ConfigError: what is there is of a later version of the format.
    """

    def __init__(self, path: Path, *, keep_rows: int = 0) -> None:
        self.path = path
        kept = _first_lines(path, keep_rows) if path.exists() and keep_rows else []
        while kept and not kept[-1].endswith(b"\n"):  # cut off by a crash, or longer than any row
            kept.pop()
        if kept:
            _row(kept[0], path)
        if len(kept) < keep_rows:
            logger.warning("%s has %d rows, but the checkpoint knew %d.", path, len(kept), keep_rows)
        aside = path.with_name(f".{path.name}.tmp")
        with open_new(aside) as file:
            file.write(b"".join(kept))
        aside.replace(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self._begun = bool(kept)
        self._unwritten = b""
        self._lock = threading.Lock()
        self._warned = False

    def log(self, row: Row) -> None:
        """Append ``row``."""
        with self._lock:
            if not self._begun:
                row, self._begun = {NAMED: VERSION, **row}, True
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


class RecordReader:
    """Reads a record while it grows: each row once, however often it is asked.

    A last line without its end is left for later. A whole line that is no row is left out; ``damaged`` has its number.

    A resume cuts the record back to its checkpoint and appends to that. The reader finds out by the bytes before the position
    that it has come to, which are then no longer those that it read; it reads from the beginning again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.restarts = 0
        """How often reading began again."""
        self.touched: float | None = None
        """When the record was last written, as its file system counts."""
        self.damaged: list[int] = []
        """Numbers of the damaged lines, from 1."""
        self.problem: str | None = None
        """Why the record cannot be read at all."""
        self._lines = self._end = 0  # that were read, and where they end, in bytes
        self._last = b""  # the line before that
        self._seen = (0, 0)

    def rows(self) -> Iterator[Row]:
        """Yield the rows that are new; none where there is no record."""
        try:
            self.problem = None
            about = self.path.stat()
            self.touched = about.st_mtime
            if self._seen == (about.st_size, about.st_mtime_ns):
                return
            with open_regular(self.path) as file:
                file.seek(self._end - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._begin_again()
                    file.seek(0)
                rest, cut_off = b"", 0  # of a line whose end has not been read; bytes of it that are too many
                while chunk := file.read(CHUNK):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        row = None if cut_off else _row(line, self.path)
                        self._lines += 1
                        self._end += cut_off + len(line) + 1
                        self._last = line + b"\n"
                        cut_off = 0
                        if row is None:
                            self.damaged.append(self._lines)
                        else:
                            yield row
                    if len(rest) > LONGEST_LINE:
                        cut_off, rest = cut_off + len(rest), b""
            self._seen = (about.st_size, about.st_mtime_ns)
        except ConfigError as error:
            self.problem = str(error)
        except FileNotFoundError:
            if self._end:
                self._begin_again()

    @property
    def lines(self) -> int:
        """How many lines were read."""
        return self._lines

    def _begin_again(self) -> None:
        self.restarts += 1
        self.damaged = []
        self._lines, self._end, self._last, self._seen = 0, 0, b"", (0, 0)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a record, without a last line that was cut off; damaged rows are left out, with a warning.

    Raises:
        FileNotFoundError: there is no record.
        ConfigError: it is no regular file, is of a later version, or cannot be read.
    """
    path.stat()
    reader = RecordReader(path)
    rows = list(reader.rows())
    if reader.problem is not None:
        raise ConfigError(reader.problem)
    if reader.damaged:
        first, more = reader.damaged[0], len(reader.damaged) - 1
        logger.warning("%s: line %d%s is damaged and left out.", path, first, f" (and {more} more)" if more else "")
    return rows


class Tail(NamedTuple):
    """The end of a record."""

    row: Row
    """The newest value of each metric; empty: there is no row yet."""
    lines: int
    """Whole lines that were read."""
    damaged: int
    """Those of them that are no rows, and were left out."""


def read_tail(path: Path) -> Tail:
    """Return what the last lines of a record say; it reads the end alone.

    Raises:
        ConfigError: it is no regular file, is of a later version, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            size, length = path.stat().st_size, TAIL
            if size > length:
                _row(file.readline(LONGEST_LINE), path)  # which says the version
            while True:
                file.seek(max(0, size - length))
                *lines, _ = file.read().split(b"\n")
                if length < size:  # the first one may lack its beginning
                    lines = lines[1:]
                found = [row for row in (_row(line, path) for line in lines) if row is not None]
                if found or length >= min(size, LONGEST_LINE):
                    break
                length *= 4
    except FileNotFoundError:
        return Tail({}, 0, 0)
    newest = {name: value for row in found for name, value in row.items()}
    return Tail(newest, len(lines), len(lines) - len(found))


def _first_lines(path: Path, count: int) -> list[bytes]:
    lines: list[bytes] = []
    with open_regular(path) as file:
        while len(lines) < count and (line := file.readline(LONGEST_LINE)):
            lines.append(line)
    return lines


def _row(line: bytes, path: Path) -> Row | None:
    """Return the row that a whole line has; None: it is damaged.

    Raises:
        ConfigError: it says that the record is of a later version.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(row, dict) and NAMED in row:
        refuse_newer(row, VERSION, str(path), NAMED)
        del row[NAMED]
    if not isinstance(row, dict) or "step" not in row or not all(map(_is_metric, row.values())):
        return None
    counted = all(math.isfinite(row[name]) and row[name] >= 0 for name in COUNTERS if name in row)
    return row if counted else None


def _is_metric(value: object) -> bool:
    """Return whether ``value`` is a number that fits a float; not a number and infinity are what a loss may become."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)
