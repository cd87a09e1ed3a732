"""Reads a YAML file that somebody else may have written: of a stated size, its aliases counted as what they stand for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, Final

from apt_model.errors import ConfigError

LARGEST_FILE: Final = 1 << 20
"""Bytes of a file of configs."""

MOST_NODES: Final = 100_000
"""Values of a file, each alias counted as all that it stands for."""

LONGEST_INTERPOLATION: Final = 2000
"""Characters of a value with an interpolation in it: OmegaConf reads such a value letter by letter, each time it is asked for."""

DEEPEST: Final = 50
"""Levels of a file."""

PLAIN_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
)


def load_yaml(path: Path, key: str = "") -> tuple[str, Any]:
    """Return the text of ``path``, and what OmegaConf makes of it.

    Args:
        key: where the user named the file, for errors.

    Raises:
        ConfigError: it is no regular file, too large, no YAML, or uses tags; with file, line and column.
    """
    import io

    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    place = f"{key}: {path}" if key else str(path)
    text = _read(path, key, place)
    try:
        check_yaml(text, place)
        content = OmegaConf.load(io.StringIO(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{place}{where}: cannot be read as YAML: {reason}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigError(
            f"{place}, line {line}, column {column}: cannot be read as YAML: a character that YAML has no place for."
        ) from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, OSError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{place}: not a config: {reason}") from None
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"{place}, line 1, column 1: no mapping of sections such as model or schedule, but a list.")
    return text, content


def _read(path: Path, key: str, place: str) -> str:
    """Return the text of a regular file; nothing is waited for.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ConfigError(f"{place}: no regular file. Name a file with YAML.")
            content = file.read(LARGEST_FILE + 1)
        if content is None:
            raise ConfigError(f"{place}: nothing can be read from it now. Name a file with YAML.")
        if len(content) > LARGEST_FILE:
            raise ConfigError(f"{place}: larger than {LARGEST_FILE >> 20} MiB. A file of configs is smaller.")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: no UTF-8 at byte {error.start}. Save the file as UTF-8.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOENT:
            raise ConfigError(f"{key or 'config'}: there is no file {str(path)!r} (looked in {Path.cwd()}).") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{place}: cannot be read: {reason}.") from None


def check_yaml(text: str, place: str) -> None:
    """Make sure that ``text`` makes no more than :data:`MOST_NODES` values, and has plain ones only; nothing is built.

    Raises:
        ConfigError: it makes more, is deeper than :data:`DEEPEST`, has a tag, or an interpolation that is too long.
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    count = 0

    def where(event: yaml.Event) -> str:
        return f"{place}, line {event.start_mark.line + 1}, column {event.start_mark.column + 1}"

    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in PLAIN_TAGS and tag != "!":
            raise ConfigError(f"{where(event)}: the tag {tag!r} has no place in a config. Write the value without it.")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"{where(event)}: the alias *{event.anchor} names nothing that ends before it.")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > LONGEST_INTERPOLATION and "${" in event.value:
                raise ConfigError(
                    f"{where(event)}: a value with an interpolation is longer than {LONGEST_INTERPOLATION} characters. Write it "
                    "out."
                )
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            sizes.pop(event.anchor, None)
            count += 1
            if len(open_nodes) > DEEPEST:
                raise ConfigError(f"{where(event)}: more than {DEEPEST} levels. Write it flatter.")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > MOST_NODES:
            raise ConfigError(
                f"{where(event)}: more than {MOST_NODES} values, each alias counted as what it stands for. Write out what is "
                "needed."
            )
