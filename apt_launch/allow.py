"""Packages whose classes a config may name: the word of the person who starts a process, and of no file.

It is given by ``--allow PACKAGE``, by the environment's ``APT_LAUNCH_ALLOW``, or by an installed distribution's entry point in
the group ``apt_launch.allow``. Processes that this one starts inherit the first two.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Final

from apt_model.errors import ConfigError

FLAG: Final = "--allow"
VARIABLE: Final = "APT_LAUNCH_ALLOW"
GROUP: Final = "apt_launch.allow"

NAME: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def take_flags(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` without ``--allow PACKAGE``, once or more; this process allows those packages from now on.

    Raises:
        ConfigError: a package is missing, is no package's name, or is part of Python.
    """
    left, given = list(arguments), []
    kept = []
    while left:
        word = left.pop(0)
        flag, separator, value = word.partition("=")
        if flag != FLAG:
            kept.append(word)
            continue
        if not separator:
            value = left.pop(0) if left else ""
        given += [name.strip() for name in value.split(",")]
    for name in given:
        _check(name, FLAG)
    if given:
        os.environ[VARIABLE] = ",".join(dict.fromkeys([*_of_environment(), *given]))
    return kept


@contextmanager
def allowing(packages: Sequence[str]) -> Iterator[None]:
    """Allow ``packages`` meanwhile.

    Raises:
        ConfigError: see :func:`take_flags`.
    """
    before = os.environ.get(VARIABLE)
    try:
        take_flags([f"{FLAG}={name}" for name in packages])
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def allowed() -> tuple[str, ...]:
    """Return the packages that this process allows.

    Raises:
        ConfigError: the environment's variable names none, or part of Python.
    """
    named = _of_environment()
    for name in named:
        _check(name, VARIABLE)
    return tuple(dict.fromkeys([*named, *_of_entry_points()]))


def word() -> str:
    """Return what jobs have to inherit, as the value of :data:`VARIABLE`; empty: nothing."""
    return ",".join(_of_environment())


def flags() -> list[str]:
    """Return the flags that give another process the same word."""
    return [part for name in _of_environment() for part in (FLAG, name)]


def covers(package: str, module: str) -> bool:
    """Return whether ``module`` is ``package`` or within it."""
    return f"{module}.".startswith(f"{package}.")


def _of_environment() -> list[str]:
    return [name for part in os.environ.get(VARIABLE, "").split(",") if (name := part.strip())]


@cache
def _of_entry_points() -> tuple[str, ...]:
    from importlib.metadata import entry_points

    found = [point.value.partition(":")[0].strip() for point in entry_points(group=GROUP)]
    return tuple(name for name in found if NAME.fullmatch(name) and name.partition(".")[0] not in OTHERS)


OTHERS: Final = frozenset(sys.stdlib_module_names) | {"hydra", "hydra_plugins", "omegaconf", "apt_launch", "apt_model"}
"""Packages that nobody can allow: Python's own, and those whose classes have a list."""


def _check(name: str, where: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is no package's name. Give the name that Python imports: {FLAG} my_lab.")
    if name.partition(".")[0] in OTHERS:
        raise ConfigError(
            f"{where}: {name} is part of Python or of this launcher, and cannot be allowed. Name your own."
        )
