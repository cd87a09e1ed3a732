"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_model.errors import ConfigError


def in_home(path: str | Path, key: str) -> Path:
    """Return ``path`` with the home folder for ``~``.

    Raises:
        ConfigError: nobody knows that folder; ``key`` is where the user named it.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{key}: {str(path)!r} is in a home folder, and there is none here: HOME is not set, or there is no such user. "
            "Write the whole path."
        ) from None


def write_atomic(path: Path, text: str, *, safe: bool = False) -> None:
    """Write ``text`` so that a reader finds the old content or the new, never a part.

    Args:
        safe: whether it is to outlive a crash of the machine, too: it is on the disk before it gets its name.
    """
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    if safe:
        sync(aside)
    aside.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_place(folder: Path, key: str) -> None:
    """Make sure that ``folder`` can be one that is written to.

    Raises:
        ConfigError: it, or what should hold it, is a file, or may not be written; ``key`` is where the user said so.
    """
    there = None
    for path in (folder, *folder.parents):
        if path.exists():
            there = there or path
            if not path.is_dir():
                raise ConfigError(f"{key}: {path} is a file, and a folder is wanted at {folder}.")
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {there} may not be written to. Choose another folder.")
