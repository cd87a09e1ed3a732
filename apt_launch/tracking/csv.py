"""CSV: ``metrics.csv`` in the run's folder, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TextIO

from apt_launch.escapes import cell
from apt_launch.record import Row
from apt_model.files import open_new


class CsvTracker:
    """Writes a line a row; metrics that come later in a run are new columns, empty in the lines before."""

    def __init__(self, *, mode: str, folder: Path) -> None:
        self.path = folder / "metrics.csv"
        self.columns: list[str] = []
        self._file: TextIO = io.TextIOWrapper(open_new(self.path), encoding="utf-8", newline="")

    def log(self, row: Row) -> None:
        """Write one row."""
        new = [name for name in row if name not in self.columns]
        if new:
            self._add(new)
        csv.DictWriter(self._file, self.columns).writerow(row)
        self._file.flush()

    def _add(self, columns: list[str]) -> None:
        """Write the file anew, with more columns."""
        self._file.close()
        with self.path.open(newline="", encoding="utf-8") as file:
            next(file, None)  # the names, of which some may have an apostrophe
            rows = list(csv.DictReader(file, self.columns))
        self.columns += columns
        aside = self.path.with_name(f".{self.path.name}.tmp")
        with io.TextIOWrapper(open_new(aside), encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writerow({name: cell(name) for name in self.columns})
            writer.writerows(rows)
        aside.replace(self.path)
        self._file = self.path.open("a", newline="", encoding="utf-8")

    def close(self, state: str) -> None:
        """Close the file."""
        self._file.close()
