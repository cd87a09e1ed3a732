"""What the commands beside ``python -m apt_launch`` share: how they read their line, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from apt_model.errors import ConfigError


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: the parser's arguments, and overrides.

    Raises:
        ConfigError: an option that is not the parser's.
    """
    arguments, overrides = parser.parse_known_args()
    unknown = [override for override in overrides if override.startswith("-")]
    if unknown:
        raise ConfigError(f"{unknown[0]}: unknown option. See {parser.prog} --help.")
    return arguments, overrides


@contextmanager
def ending() -> Iterator[None]:
    """Tell in words what goes wrong, and leave with its exit code: 2 what was asked for is wrong, 130 interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from apt_launch.config.explain import understood
        from apt_launch.config.load import show_error

        told = understood(error)
        if told is None:
            raise
        show_error(told)
        sys.exit(2)
