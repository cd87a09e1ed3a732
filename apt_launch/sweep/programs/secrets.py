"""``secrets.json``: what stands by number alone in the frozen configs of a sweep. Only its owner and the jobs read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from apt_launch.secrets import kept_private
from apt_model.files import STRICT, read_json, write_json

SECRETS: Final = "secrets.json"
"""In the sweep's folder."""

VERSION: Final = 1
"""Of the format, see docs/reference/files.md."""


@dataclass(frozen=True)
class _Kept:
    """The schema."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    version: int
    values: dict[str, str | int | float]

    def __post_init__(self) -> None:
        """Refuse a later version."""
        if self.version != VERSION:
            raise ValueError(f"its version is {self.version}, and this program reads version {VERSION}")


def write_secrets(sweep: Path, values: Mapping[str, Any]) -> None:
    """Write them, if there are any."""
    if values:
        with kept_private():
            write_json(sweep / SECRETS, {"version": VERSION, "values": dict(values)})


def read_secrets(sweep: Path) -> Mapping[str, Any]:
    """Return the secrets of a sweep; none where it has no such file.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return read_json(sweep / SECRETS, _Kept, remedy="Restore it from a copy, or start the sweep anew.").values
    except FileNotFoundError:
        return {}
