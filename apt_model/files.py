"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar

from apt_model.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

Schema = TypeVar("Schema")

STRICT: Final[dict[str, Any]] = {"strict": True, "extra": "forbid"}
"""``__pydantic_config__`` of a schema of a file: nothing is coerced, and unknown keys are damage."""

MOST_BYTES: Final = 64 << 20
"""More than any file has that a run or a sweep keeps for itself, but for data, weights and plans."""


def in_home(path: str | Path, key: str) -> Path:
    """Return ``path`` with the home folder for ``~``.

    Raises:
        ConfigError: there is no such folder; ``key`` is where the user named it.
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
    with open_new(aside) as file:
        file.write(text.encode())
    if safe:
        sync(aside)
    aside.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")


def open_new(path: Path) -> BinaryIO:
    """Open a new file to be written. What had the name before is gone, and no link is followed to what it led to."""
    while True:
        try:
            return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")
        except FileExistsError:
            path.unlink(missing_ok=True)


def open_kept(path: Path, *, append: bool = False) -> BinaryIO:
    """Open a file to be written that keeps what it has, made where there is none; ``append``: at its end.

    Raises:
        ConfigError: a link, a device, a pipe or a folder is in its place; nothing was written to what a link leads to.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_APPEND if append else 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {path.readlink()}, and nothing is written through links. Remove it."
            ) from None
        if error.errno in (errno.ENXIO, errno.EISDIR, errno.ENODEV):
            raise ConfigError(f"{path}: {_kind(path)}, and a regular file is wanted. Remove it.") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ConfigError(f"{path}: {_kind(path)}, and a regular file is wanted. Remove it.")
    return os.fdopen(handle, "ab" if append else "wb")


def touch(path: Path) -> None:
    """Make an empty file, or give the one that is there the time of now; see :func:`open_kept`."""
    with open_kept(path) as file:
        os.utime(file.fileno())


def open_regular(path: Path, *, remedy: str = "remove it") -> BinaryIO:
    """Open a regular file to be read. A device, a pipe or a socket in its place is refused, for reading might never end.

    Args:
        remedy: what the user can do, as the end of a sentence.

    Raises:
        FileNotFoundError: there is nothing.
        ConfigError: it is no regular file, or may not be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: opening a device may have effects
            raise ConfigError(f"{path}: {_kind(path)}, and a regular file is wanted: {remedy}.")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ConfigError(f"{path}: it is no regular file: {remedy}.")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: it cannot be read ({reason}). Make it readable, or {remedy}.") from None
    return os.fdopen(handle, "rb")


def read_regular(path: Path, most_bytes: int = MOST_BYTES, *, remedy: str = "remove it") -> bytes:
    """Return the content of a regular file of at most ``most_bytes``; see :func:`open_regular`.

    Raises:
        FileNotFoundError: there is nothing.
        ConfigError: it is no regular file, is longer, or cannot be read.
    """
    with open_regular(path, remedy=remedy) as file:
        try:
            content = file.read(most_bytes + 1)
        except OSError as error:
            raise ConfigError(f"{path}: it cannot be read ({error.strerror}).") from None
    if len(content) > most_bytes:
        raise ConfigError(f"{path}: it has more than {most_bytes:,} bytes, and is not what belongs there: {remedy}.")
    return content


def read_json(path: Path, schema: type[Schema], *, remedy: str, most_bytes: int = MOST_BYTES) -> Schema:
    """Return what the JSON file ``path`` holds, as ``schema`` says: a dataclass, or another type that pydantic knows.

    Args:
        remedy: what the user can do about a damaged file, a sentence.

    Raises:
        FileNotFoundError: there is nothing.
        ConfigError: it is damaged, or no regular file; with the place in it.
    """
    return from_json(read_regular(path, most_bytes), schema, where=str(path), remedy=remedy)


def refuse_newer(content: Any, newest: int, where: str, key: str = "version") -> None:
    """Make sure that a file is of a format that this program reads; one that names no version is of the first.

    Args:
        content: as it was read; anything but a mapping with an integer under ``key`` is for its schema to refuse.

    Raises:
        ConfigError: it is of a later version than ``newest``.
    """
    version = content.get(key) if isinstance(content, Mapping) else None
    if type(version) is int and version > newest:
        known = "version 1" if newest == 1 else f"versions 1 to {newest}"
        raise ConfigError(
            f"{where}: its format is of version {version}, and this program reads {known}. A newer one has written it: "
            "use that, or install it here."
        )


def from_json(text: bytes | str, schema: type[Schema], *, where: str, remedy: str) -> Schema:
    """Return what ``text``, which stands in ``where``, holds; see :func:`read_json`."""
    from pydantic import TypeAdapter, ValidationError

    if schema not in _adapters:
        _adapters[schema] = TypeAdapter(schema)
    adapter: TypeAdapter[Schema] = _adapters[schema]
    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{where}: damaged ({_first(error)}). {remedy}") from None


_adapters: dict[Any, TypeAdapter[Any]] = {}
"""What pydantic has made of each schema: that takes longer than to read a file."""


def _first(error: ValidationError) -> str:
    """Return the first problem with its place, and how many more there are."""
    first, *others = error.errors(include_url=False)
    place = ".".join(map(str, first["loc"]))
    reason = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "value_error":  # in words of our own
        reason = str(first["ctx"]["error"])
    found = "" if first["type"] in ("missing", "json_invalid", "value_error") else f", not {repr(first['input'])[:60]}"
    more = f"; and {len(others)} more" if others else ""
    return f"{place}: {reason}{found}{more}" if place else f"{reason}{found}{more}"


def _kind(path: Path) -> str:
    mode = path.stat().st_mode
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    return f"it is {next((name for check, name in kinds if check(mode)), 'a device')}"


def sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal digits; see :func:`open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
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
        try:
            is_there = path.exists()
            leads_nowhere = path == folder and path.is_symlink() and not is_there
        except OSError as error:
            raise ConfigError(
                f"{key}: {str(path)[:200]} cannot be a folder ({error.strerror}). Choose another."
            ) from None
        if leads_nowhere:
            raise ConfigError(
                f"{key}: {folder} is a link to {folder.readlink()}, which is not there. Make it, or remove the link."
            )
        if is_there:
            there = there or path
            if not path.is_dir():
                raise ConfigError(f"{key}: {path} is a file, and a folder is wanted at {folder}.")
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {there} may not be written to. Choose another folder.")


def refuse_link(folder: Path) -> None:
    """Make sure that ``folder`` is none that leads elsewhere.

    Raises:
        ConfigError: it is a symbolic link.
    """
    if folder.is_symlink():
        raise ConfigError(
            f"{folder} is a link to {folder.readlink()}, and nothing is written through links. Remove it, or put what it "
            "leads to in its place."
        )


def refuse_links(folder: Path, key: str) -> None:
    """Make sure that nothing that is written in ``folder``, or in the folder ``.hydra`` in it, is written elsewhere.

    Raises:
        ConfigError: an entry is a symbolic link; ``key`` is where the user named the folder.
    """
    for place in (folder, folder / ".hydra"):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.is_symlink():
                raise ConfigError(
                    f"{key}: {path} is a link to {path.readlink()}, and nothing is written through links. Remove it, or put "
                    "what it leads to in its place."
                )
