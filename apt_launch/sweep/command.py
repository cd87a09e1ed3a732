"""What commands share: how they read their line, how they report an error, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apt_model.errors import ConfigError


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
    sys.stderr.write("error: " + (f"{count} problems\n  " if count > 1 else "") + "\n  ".join(error.problems) + "\n")


def _own(error: Exception) -> ConfigError | None:
    return error if isinstance(error, ConfigError) else None


@contextmanager
def ending(explain: Callable[[Exception], ConfigError | None] = _own) -> Iterator[None]:
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
