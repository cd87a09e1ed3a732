"""How the commands that compose a config end: errors of Hydra's, too, are reported in the project's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from apt_launch import command_line
from apt_model.errors import ConfigError


@contextmanager
def ending() -> Iterator[None]:
    """Report what the user can mend and exit with 2; exit with 130 after Ctrl-C."""
    with command_line.ending(_explained):
        yield


def _explained(error: Exception) -> ConfigError | None:
    from apt_launch.config.explain import understood  # Hydra, which most commands need not load to end well

    return command_line.mistake(error) or understood(error)
