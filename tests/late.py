"""Libraries that take seconds to load, loaded when a test first needs them: every process that runs tests collects all."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Late:
    """The module ``name``, loaded when it is first asked for anything."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pytest asks whatever stands in a module whether it is a test
            raise AttributeError(name)
        return getattr(import_module(self._name), name)
