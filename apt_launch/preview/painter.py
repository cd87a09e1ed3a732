"""Draws a preview in a process of its own, which loads matplotlib on another core while the command composes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from apt_launch.config.schedule_plot import Sheet, draw_schedule
from apt_launch.drawing import Drawing


class Painter:
    """Draws in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "apt_launch.preview.painter"], stdin=subprocess.PIPE, text=True
        )

    def draw(self, drawn: Sequence[Sheet], path: Path) -> None:
        """Begin to draw; see :func:`draw_schedule`."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and said why
            json.dump({"path": str(path), "sheets": [asdict(sheet) for sheet in drawn]}, self.process.stdin)
            self.process.stdin.close()

    def wait(self) -> None:
        """Wait until the picture is there, or the process has said why it cannot be drawn."""
        self.process.wait()

    def close(self) -> None:
        """End the process, also where nothing was drawn."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def _paint() -> None:
    """Draw what comes on standard input; nothing, where nothing comes."""
    with Drawing(Path("preview.png")):  # loads all that draws
        pass
    read = sys.stdin.read()
    if read:
        content = json.loads(read)
        draw_schedule([Sheet(**sheet) for sheet in content["sheets"]], Path(content["path"]))


if __name__ == "__main__":
    _paint()
