"""Names and values of a config as plain text, wherever they are shown: one escape for each language that a reader speaks.

HTML has ``html.escape`` and templates that escape by themselves; pictures take no TeX, see :class:`apt_launch.drawing.Drawing`.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

CONTROL: Final = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What moves a terminal's cursor, changes its colours or title, or turns text around; line ends and tabs stay."""

FORMULA: Final = re.compile(r"\s*[=+\-@]")
"""How a cell begins that a spreadsheet computes."""


def visible(text: str) -> str:
    """Return ``text`` for a terminal or a log: control characters are written out, such as ``\\x1b``."""
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def escape_logs(handlers: Iterable[logging.Handler]) -> None:
    """Write out control characters in what ``handlers`` log from now on, in tracebacks, too; colours of a formatter stay."""
    for handler in handlers:
        handler.addFilter(_as_text)


def _as_text(record: logging.LogRecord) -> bool:
    record.msg, record.args = visible(record.getMessage()), ()
    if record.exc_info and not record.exc_text:
        record.exc_text = logging.Formatter().formatException(record.exc_info)
    record.exc_text = visible(record.exc_text) if record.exc_text else None
    return True


def cell(value: Any) -> Any:
    """Return ``value`` for CSV: text that a spreadsheet would compute gets an apostrophe before it."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def markdown(text: str) -> str:
    """Return ``text`` for a cell of a table in Markdown."""
    return escape(visible(" ".join(text.split("\n"))), quote=False).replace("|", "/")


def label(text: str) -> str:
    """Return ``text`` for a picture, whose legends leave out what begins with an underscore."""
    return visible(f" {text}" if text.startswith("_") else text)


def console(**options: Any) -> Console:
    """Return a console of rich's that shows text as it is: no markup, no emoji codes, control characters written out."""
    return _kind()(markup=False, emoji=False, **options)


@cache
def _kind() -> type[Console]:
    from rich.console import Console

    class PlainConsole(Console):
        """See :func:`console`."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            """Yield the segments of ``renderable``; control codes are rich's own."""
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return PlainConsole
