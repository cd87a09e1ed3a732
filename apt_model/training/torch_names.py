"""Names of torch's that it does not promise to keep: looked up when a feature needs them, so that the others work without."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, Final

import torch

from apt_model.errors import ConfigError

TESTED: Final = "2.10 to 2.14"
"""Minor versions of torch with which the tests were run; docs/versions.md says which tests."""


def require(feature: str, instead: str, *names: str) -> list[Any]:
    """Return what ``names`` ("package.module:Class.name") are in this torch.

    Args:
        feature: the key that needs them.
        instead: what a user can do without them, as a command.

    Raises:
        ConfigError: this torch has no such name.
    """
    found, missing = [], []
    for name in names:
        try:
            found.append(resolve_name(name))
        except (ImportError, AttributeError):
            missing.append(name.replace(":", "."))
    if missing:
        raise lacking(feature, instead, *missing)
    return found


def lacking(feature: str, instead: str, *names: str) -> ConfigError:
    """Return the error that says that this torch has no ``names``; see :func:`require`."""
    return ConfigError(
        f"{feature}: torch {torch.__version__} does not have {', '.join(names)}, which this needs. {instead}, or use a "
        f"version that was tested: {TESTED}."
    )
