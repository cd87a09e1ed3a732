"""The command line that has a program with ``@hydra.main`` send its sweep, as its user would type it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from apt_launch.commands import flags_first
from apt_model.errors import ConfigError

DRY_RUN: Final = "--dry-run"
OTHERS: Final = (
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--run",
    "-r",
    "--help",
    "-h",
    "--hydra-help",
    "--shell-completion",
    "-sc",
)
"""Flags of Hydra's that ask for something else."""
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
    if others := [word for word in given[len(program) :] if word.partition("=")[0] in OTHERS]:
        raise ConfigError(
            f"run: with {others[0]} the program sends no sweep. Type that to the program itself: "
            f"{shlex.join(['python', *program, others[0]])} ..."
        )
    rest = [word for word in given[len(program) :] if word not in ("-m", "--multirun")]
    options = [f"{group}={option}" for group, option in CHOSEN if not any(w.startswith(f"{group}=") for w in rest)]
    if DRY_RUN in words:
        options.append("hydra.sweeper.dry_run=true")
    return [sys.executable, *program, "--multirun", *flags_first([*rest, *options])]
