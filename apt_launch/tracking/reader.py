"""A record that is read while it grows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from apt_launch.tracking import Row

CHUNK = 1 << 20


class RecordReader:
    """Reads each row of a record once, however often it is asked.

    A resume cuts the record back to its checkpoint and writes on. That shows where the bytes before the place that reading has
    come to are no longer those that were read; then reading begins anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lives = 0  # how often reading began anew
        self.touched: float | None = None  # when the record was last written, as its file system counts
        self._end = 0  # of the rows that were read, in bytes
        self._last = b""  # the row before it
        self._seen = (0, 0)

    def rows(self) -> Iterator[Row]:
        """Yield the rows that are new; a last line that is not whole yet is left for later, one that is no row is left out."""
        try:
            about = self.path.stat()
            self.touched = about.st_mtime
            if self._seen == (about.st_size, about.st_mtime_ns):
                return
            with self.path.open("rb") as file:
                file.seek(self._end - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self.lives += 1
                    self._end, self._last = 0, b""
                    file.seek(0)
                rest = b""
                while chunk := file.read(CHUNK):
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        self._end += len(line) + 1
                        self._last = line + b"\n"
                        with contextlib.suppress(ValueError):
                            yield json.loads(line)
            self._seen = (about.st_size, about.st_mtime_ns)
        except FileNotFoundError:
            if self._end:
                self.lives += 1
                self._end, self._last, self._seen = 0, b"", (0, 0)
