"""How pictures are drawn: by Agg, with matplotlib's own settings whatever a user's are, and never at the cost of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


@contextmanager
def drawing(path: Path) -> Iterator[None]:
    """Draw the picture ``path`` meanwhile. Whatever fails there, matplotlib's import included, is a warning.

    Matplotlib says nothing of its own: its first use builds a cache of fonts, and logs that.
    """
    chatter = logging.getLogger("matplotlib")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        import matplotlib

        with matplotlib.rc_context({k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"}):
            yield
    except Exception as error:
        logger.warning("%s could not be drawn (%s: %s).", path, type(error).__name__, error)
    finally:
        chatter.setLevel(level)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches, which Agg draws."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure
