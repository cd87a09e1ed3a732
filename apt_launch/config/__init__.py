"""A run's config: composed, resolved, checked, typed."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Return what configs of earlier versions name here: ``apt_launch.config.CheckBeforeStart``."""
    if name == "CheckBeforeStart":
        return importlib.import_module("apt_launch.runs.before_start").CheckBeforeStart
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
