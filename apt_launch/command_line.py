"""What commands share: how they read their line, how they report an error, and how they end."""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NoReturn

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
        return ConfigError(f"{_short(error.filename)}: {error.strerror}. {PLACES[error.errno]}")
    return None


def say_passed_over(reasons: Iterable[str]) -> None:
    """Say why newer checkpoints, or better ones, were not taken."""
    for reason in reasons:
        sys.stderr.write(f"passed over: {visible(reason)}\n")


def make_folder(folder: Path, key: str) -> None:
    """Make ``folder``, which ``key`` names, where it is not there; nothing of it stays where that fails.

    Raises:
        ConfigError: there can be none.
        OSError: the disk is full, or broken.
    """
    above = [path for path in folder.parents if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for path in above:
            with suppress(OSError):
                path.rmdir()
        if error.errno not in PLACES:
            raise
        remedy = "Choose another place." if error.errno == errno.ENOENT else PLACES[error.errno]
        raise ConfigError(f"{key}: the folder {_short(folder)} cannot be made: {error.strerror}. {remedy}") from None


def _short(place: object) -> str:
    text = str(place)
    return f"{text[:200]}{'...' if len(text) > 200 else ''}"


CLOSED = 128 + 13
"""Exit code after a pipe was closed, which shells give to a command that SIGPIPE (13) has ended."""


def take_any_character() -> None:
    """Make the output take what its encoding has not, as question marks: what is written is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


@contextmanager
def output() -> Iterator[None]:
    """Let a command write its output, and end it quietly once the reading end is closed."""
    take_any_character()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # what is left in its buffer can meet a closed pipe, too
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        _leave()
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # rich leaves so, with 1
            _leave()
        raise


def _nobody_reads() -> bool:
    """Return whether the reading end of standard output or of standard error is closed."""
    asked = select.poll()
    for number in (1, 2):
        asked.register(number, select.POLLERR)
    return any(what & select.POLLERR for _, what in asked.poll(0))


def _leave() -> NoReturn:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):  # the interpreter, too, writes what is left at its end
        os.dup2(nowhere, number)
    sys.exit(CLOSED)


@contextmanager
def ending(explain: Callable[[Exception], ConfigError | None] = mistake) -> Iterator[None]:
    """Report what the user can mend and exit with 2; exit with 130 after Ctrl-C. See :func:`output`, too.

    Args:
        explain: returns an error as the user should read it; None: it is no mistake of the user's.
    """
    with output():
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            raise
        except Exception as error:
            explained = explain(error)
            if explained is None:
                raise
            show_error(explained)
            sys.exit(2)
