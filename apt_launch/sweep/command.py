"""What commands share: how they read their line, how they report an error, and how they end."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from apt_launch.escapes import visible
from apt_model.errors import ConfigError

PLACES: Final = {
    errno.ENOENT: "Look for a mistyped name.",
    errno.ENOTDIR: "A file stands where a folder is wanted: name a folder.",
    errno.EISDIR: "A folder stands where a file is wanted: name a file.",
    errno.EEXIST: "Choose another name, or remove it.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Links lead around in a circle: remove one of them.",
    errno.EACCES: "Its permissions do not allow that: change them, or choose another place.",
    errno.EPERM: "Its permissions do not allow that: change them, or choose another place.",
    errno.EROFS: "It is on a file system that takes no files: choose another place.",
    errno.EINVAL: "It is no name of a file here: choose another.",
    errno.ENXIO: "It is no file: choose another place.",
}
"""What is wrong with a place that a user named, and what helps."""


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; return the parser's arguments, and the overrides.

    Raises:
        ConfigError: an option that is not the parser's.
    """
    arguments, overrides = parser.parse_known_args()
    unknown = [override for override in overrides if override.startswith("-")]
    if unknown:
        raise ConfigError(f"{unknown[0]}: unknown option. See {parser.prog} --help.")
    return arguments, overrides


def show_error(error: ConfigError) -> None:
    """Write to standard error what is wrong."""
    count = len(error.problems)
    text = (f"{count} problems\n  " if count > 1 else "") + "\n  ".join(error.problems)
    sys.stderr.write(f"error: {visible(text)}\n")


def mistake(error: BaseException) -> ConfigError | None:
    """Return ``error`` as a ConfigError if it is about a place or a number that the user gave, whatever raised it; else None."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, OSError) and error.errno in PLACES and error.filename is not None:
        place = str(error.filename)
        return ConfigError(f"{place[:200]}{'...' if len(place) > 200 else ''}: {error.strerror}. {PLACES[error.errno]}")
    return None


@contextmanager
def ending(explain: Callable[[Exception], ConfigError | None] = mistake) -> Iterator[None]:
    """Report what the user can mend and exit with 2; exit with 130 after Ctrl-C.

    Args:
        explain: returns an error as the user should read it; None: it is no mistake of the user's.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        show_error(explained)
        sys.exit(2)
