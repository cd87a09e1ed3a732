"""How pictures are drawn: by Agg, with matplotlib's own settings whatever a user's are, and never at the cost of a run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN: Final = {"text.parse_math": False, "text.usetex": False}
"""Names in pictures are text, and no TeX."""

logger = logging.getLogger(__name__)


class Drawing:
    """A context in which the picture ``path`` is drawn. Whatever fails there, matplotlib's import included, is a warning.

    Matplotlib logs nothing of its own meanwhile: at its first use it builds a cache of fonts, and would say so.

    Args:
        style: settings that are not matplotlib's defaults.
    """

    def __init__(self, path: Path, style: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.style = dict(style or {})
        self._context = ExitStack()
        self.failed = False

    def __enter__(self) -> None:
        chatter = logging.getLogger("matplotlib")
        self._context.callback(chatter.setLevel, chatter.level)
        chatter.setLevel(logging.ERROR)
        try:
            if self.path.is_symlink():  # the picture takes its place, and not that of what it leads to
                self.path.unlink()
            load_matplotlib()
            import matplotlib

            settings: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
            self._context.enter_context(matplotlib.rc_context(settings | PLAIN | self.style))
        except Exception as error:
            self._warn(error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._context.close()
        if isinstance(error, Exception) and not self.failed:
            self._warn(error)
        return isinstance(error, Exception)

    def _warn(self, error: Exception) -> None:
        self.failed = True
        logger.warning("%s could not be drawn (%s: %s).", self.path, type(error).__name__, error)


def load_matplotlib() -> None:
    """Import what draws. MPLBACKEND may name what is not installed here: only pyplot needs it, and is not used."""
    if "matplotlib" not in sys.modules:
        wanted = os.environ.pop("MPLBACKEND", None)
        try:
            import matplotlib
        finally:
            if wanted is not None:
                os.environ["MPLBACKEND"] = wanted
        if wanted:
            with suppress(ValueError):
                matplotlib.rcParams["backend"] = wanted
    import matplotlib.backends.backend_agg
    import matplotlib.figure


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """Return an empty figure of that size in inches, which Agg draws; ``options`` are those of :class:`Figure`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure
