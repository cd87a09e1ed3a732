"""What a config's logging may build: classes by name, and of each only the arguments listed here.

``logging.config`` imports and calls whatever its config names, sets attributes of what it built, and follows ``ext://`` and ``cfg://``
in any value. So each section, key and value is looked for in a list, and what is in none is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_FILE: Final = frozenset({"filename", "mode", "encoding", "delay", "errors"})
HANDLERS: Final[Mapping[str, frozenset[str]]] = {
    "apt_launch.runs.console.Stdout": frozenset(),
    "apt_launch.console.Stdout": frozenset(),  # as earlier versions call it
    "logging.NullHandler": frozenset(),
    "logging.StreamHandler": frozenset({"stream"}),
    "logging.FileHandler": _FILE,
    "logging.handlers.RotatingFileHandler": _FILE | {"maxBytes", "backupCount"},
    "logging.handlers.TimedRotatingFileHandler": (_FILE - {"mode"}) | {"when", "interval", "backupCount", "utc"},
    "rich.logging.RichHandler": frozenset(
        {
            *("show_time", "omit_repeated_times", "show_level", "show_path", "enable_link_path", "markup", "keywords"),
            *(
                "rich_tracebacks",
                "tracebacks_width",
                "tracebacks_extra_lines",
                "tracebacks_show_locals",
                "log_time_format",
            ),
        }
    ),
}
"""Classes of handlers, and the arguments of each beside those of every handler."""

FORMATTERS: Final[Mapping[str, frozenset[str]]] = {
    "logging.Formatter": frozenset(),
    "colorlog.ColoredFormatter": frozenset(
        {"fmt", "log_colors", "secondary_log_colors", "reset", "no_color", "force_color"}
    ),
}
"""Classes of formatters, and the arguments of each beside those of every formatter."""

OF_HANDLERS: Final = frozenset({"class", "()", "level", "formatter", "filters"})
OF_FORMATTERS: Final = frozenset({"class", "()", "format", "datefmt", "style", "validate", "defaults"})
OF_LOGGERS: Final = frozenset({"level", "handlers", "propagate", "filters"})
SECTIONS: Final = frozenset(
    {"version", "root", "disable_existing_loggers", "incremental", "handlers", "formatters", "filters", "loggers"}
)
STREAMS: Final = ("ext://sys.stdout", "ext://sys.stderr")
LOG_FILE: Final = re.compile(
    r"\$\{hydra[.:](runtime\.output_dir|run\.dir)\}/(\$\{hydra[.:]job\.name\}|[\w.-])+\.(log|txt)"
)
"""A log file in the run's folder, as it is written: the folder's name is known only once the run has one."""


def logging_problems(node: Any, path: str) -> Iterator[str]:
    """Yield what is wrong with a node for ``logging.config``; names of files in it are not resolved yet."""
    if not isinstance(node, Mapping):
        yield f"{path}: {node!r} is no mapping. Choose an option of {path.replace('.', '/')}."
        return
    yield from _unknown(node, SECTIONS, path)
    for name, handler in _entries(node, "handlers"):
        yield from _built_problems(handler, f"{path}.handlers.{name}", HANDLERS, OF_HANDLERS)
    for name, formatter in _entries(node, "formatters"):
        yield from _built_problems(formatter, f"{path}.formatters.{name}", FORMATTERS, OF_FORMATTERS)
    for name, given in _entries(node, "filters"):
        yield from _unknown(given, frozenset({"name"}), f"{path}.filters.{name}")
    for name, logger in [*_entries(node, "loggers"), ("root", node.get("root"))]:
        below = f"{path}.root" if name == "root" else f"{path}.loggers.{name}"
        if logger is not None:
            yield from _unknown(logger, OF_LOGGERS, below)
    yield from _reference_problems(node, path)


def _entries(node: Mapping[str, Any], section: str) -> list[tuple[str, Any]]:
    entries = node.get(section)
    return list(entries.items()) if isinstance(entries, Mapping) else []


def _unknown(node: Any, known: frozenset[str], path: str) -> Iterator[str]:
    if not isinstance(node, Mapping):
        yield f"{path}: {node!r} is no mapping of {', '.join(sorted(known))}."
        return
    for key in node:
        if key not in known:
            yield f"{path}.{key}: a config may not set it. Choose from {', '.join(sorted(known))}."


def _built_problems(
    node: Any, path: str, classes: Mapping[str, frozenset[str]], common: frozenset[str]
) -> Iterator[str]:
    default = {"logging.Formatter"} if "logging.Formatter" in classes else set()
    named = [(key, node[key]) for key in ("class", "()") if isinstance(node, Mapping) and key in node]
    for key, value in named:
        if not isinstance(value, str) or value not in classes:
            yield f"{path}.{key}: {value!r} may not be built here. Choose one of {', '.join(sorted(classes))}."
            return
    if len(named) == 2:
        yield f"{path}: give either class or (), not both."
    if not named and not default:
        yield f"{path}.class: name one of {', '.join(sorted(classes))}."
        return
    own = classes[named[0][1]] if named else frozenset()
    yield from _unknown(node, common | own, path)
    if isinstance(node, Mapping) and "filename" in node:
        value = node["filename"]
        if not isinstance(value, str) or not LOG_FILE.fullmatch(value) or ".." in value:
            yield (
                f"{path}.filename: {value!r} is no file in the run's folder. Write ${{hydra.runtime.output_dir}}/NAME.log."
            )


def _reference_problems(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _reference_problems(value, f"{path}.{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _reference_problems(value, f"{path}.{number}")
    elif isinstance(node, str) and re.match(r"\s*(ext|cfg)\s*:", node) and node not in STREAMS:
        yield f"{path}: {node!r} may not be reached from here. Choose one of {', '.join(STREAMS)}."
