"""The command line that has a program with ``@hydra.main`` send its sweep, as its user would type it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from apt_launch.commands import flags_first
from apt_model.errors import ConfigError

DRY_RUN: Final = "--dry-run"
CHOSEN: Final = (("hydra/sweeper", "apt"), ("hydra/launcher", "apt_local"))
"""Options that a sweep has unless the command line chooses others."""


def sweep_of(words: Sequence[str]) -> list[str]:
    """Return the command that sends, or with :data:`DRY_RUN` shows, the sweep that ``words`` ask for.

    Args:
        words: ``PROGRAM.py`` or ``-m MODULE``, then flags of Hydra's and overrides, in any order.

    Raises:
        ConfigError: they name no program.
    """
    given = [word for word in words if word != DRY_RUN]
    program = given[:2] if given[:1] == ["-m"] else given[:1]
    name = program[-1] if program else "-m"
    if name.startswith("-") or "=" in name:
        raise ConfigError("run: it needs a program first. Write: run PROGRAM.py KEY=A,B, or run -m MODULE KEY=A,B")
    if len(program) == 1 and not Path(name).is_file():
        raise ConfigError(f"run: there is no file {name} (looked in {Path.cwd()}). For a module write: run -m {name}")
    rest = [word for word in given[len(program) :] if word not in ("-m", "--multirun")]
    options = [f"{group}={option}" for group, option in CHOSEN if not any(w.startswith(f"{group}=") for w in rest)]
    if DRY_RUN in words:
        options.append("hydra.sweeper.dry_run=true")
    return [sys.executable, *program, "--multirun", *flags_first([*rest, *options])]
