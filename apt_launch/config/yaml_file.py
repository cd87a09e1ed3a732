"""Reads a YAML file that somebody else may have written: of a stated size, its aliases counted as what they stand for."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any, Final

from apt_launch.values import check_yaml
from apt_model.errors import ConfigError
from apt_model.files import open_regular

LARGEST_FILE: Final = 1 << 20
"""Bytes of a file of configs."""

SMALL_FILE: Final = 1 << 15
"""Characters of a file whose content is kept, for who reads it again."""

MOST_NODES: Final = 100_000
"""Values of a file, each alias counted as all that it stands for."""

LONGEST_INTERPOLATION: Final = 2000
"""Characters of a value with an interpolation in it: OmegaConf reads such a value letter by letter, each time it is asked for."""


def load_yaml(path: Path, key: str = "") -> tuple[str, Any]:
    """Return the text of ``path``, and what OmegaConf makes of it.

    Args:
        key: where the user named the file, for errors.

    Raises:
        ConfigError: it is no regular file, too large, no YAML, or uses tags; with file, line and column.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    place = f"{key}: {path}" if key else str(path)
    text = _read(path, key, place)
    try:
        check_yaml(text, place, MOST_NODES, LONGEST_INTERPOLATION)
        content = parsed(text)
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


def parsed(text: str) -> Any:
    """Parse as OmegaConf does. A plan reads the same few files for each job: to unpickle takes a fiftieth of a parse's time."""
    return pickle.loads(_kept(text)) if len(text) < SMALL_FILE else _parsed(text)


def _parsed(text: str) -> Any:
    import io

    from omegaconf import OmegaConf

    return OmegaConf.load(io.StringIO(text))


@functools.lru_cache(maxsize=128)
def _kept(text: str) -> bytes:
    return pickle.dumps(_parsed(text))


def _read(path: Path, key: str, place: str) -> str:
    """Return the text of a regular file; nothing is waited for.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    try:
        with open_regular(path, remedy="name a file with YAML") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(f"{path}: larger than {LARGEST_FILE >> 20} MiB. A file of configs is smaller.")
        return content.decode("utf-8-sig")
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}" if key else str(error)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: no UTF-8 at byte {error.start}. Save the file as UTF-8.") from None
    except FileNotFoundError:
        raise ConfigError(f"{key or 'config'}: there is no file {str(path)!r} (looked in {Path.cwd()}).") from None
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {error.strerror}.") from None
