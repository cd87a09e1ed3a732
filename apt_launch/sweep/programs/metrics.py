"""Metrics that programs write by themselves: Lightning's ``metrics.csv`` and TensorBoard's event files."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from apt_launch.sweep.job import Context

SECONDS: Final = 5.0
"""Between two looks for new rows."""

DEPTH: Final = 5
"""Folders below the output folder in which files are looked for."""

Found = tuple[int, dict[str, float]]


class Follower:
    """Copies what the program writes into its job's record, as long as it does not report by itself."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.began = time.time()
        self._ended = threading.Event()
        self._sources: dict[Path, CsvMetrics | EventMetrics] = {}
        self._thread = threading.Thread(target=self._follow, name="metrics", daemon=True)

    def __enter__(self) -> Follower:
        if self.context.first:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.context.first:
            self.look()

    def _follow(self) -> None:
        while not self._ended.wait(SECONDS):
            self.look()

    def look(self) -> None:
        """Copy what is new."""
        if self.context.reports:
            return
        with suppress(OSError):
            for path in self._files():
                if path not in self._sources:
                    self._sources[path] = CsvMetrics(path) if path.suffix == ".csv" else EventMetrics(path)
        for source in self._sources.values():
            with suppress(OSError, ValueError):
                for step, row in source.rows():
                    self.context.write(step, row)

    def _files(self) -> Iterator[Path]:
        """Yield files that are as young as this attempt; CSV alone where the program writes both."""
        found = [
            path
            for path in _below(self.context.output, DEPTH)
            if (path.name == "metrics.csv" or path.name.startswith("events.out.tfevents."))
            and path.stat().st_mtime >= self.began - 2
        ]
        tables = [path for path in found if path.suffix == ".csv"]
        yield from sorted(tables or found)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            if depth and not path.name.startswith("."):
                yield from _below(path, depth - 1)
        elif path.is_file():
            yield path


class CsvMetrics:
    """The new rows of a ``metrics.csv``, whose columns may become more while it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0

    def rows(self) -> Iterator[Found]:
        """Yield step and metrics of each row that is new and whole."""
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = list(csv.DictReader(io.StringIO(whole)))
        for row in rows[self._count :]:
            self._count += 1
            numbers = {name: value for name, cell in row.items() if name and (value := _number(cell)) is not None}
            step = numbers.pop("step", None)
            if numbers:
                yield (self._count - 1 if step is None else int(step)), numbers


class EventMetrics:
    """The new scalars of a TensorBoard event file, read by TensorBoard itself where it is installed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loader: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

            self._loader = EventFileLoader(str(path))

    def rows(self) -> Iterator[Found]:
        """Yield step and metrics, those of one step together."""
        if self._loader is None:
            return
        from tensorboard.util import tensor_util

        found: dict[int, dict[str, float]] = {}
        for event in self._loader.Load():
            for value in event.summary.value:
                number = None
                if value.HasField("simple_value"):
                    number = float(value.simple_value)
                elif value.HasField("tensor") and value.metadata.plugin_data.plugin_name in ("", "scalars"):
                    with suppress(TypeError, ValueError):
                        number = float(tensor_util.make_ndarray(value.tensor))
                if number is not None:
                    found.setdefault(int(event.step), {})[value.tag] = number
        yield from found.items()


def _number(cell: Any) -> float | None:
    if not isinstance(cell, str) or not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return None if math.isinf(value) else value
