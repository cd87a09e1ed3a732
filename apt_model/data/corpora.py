"""Corpora of bytes: a token is a byte of UTF-8, and byte 0 follows every document.

A corpus tells the number of its tokens without torch, and cheaply, so that a run's length is known before it starts.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from apt_model.errors import ConfigError

Split = Literal["train", "val"]

DOCUMENT_END = b"\0"
BYTE_VOCABULARY = 256


class Corpus(ABC):
    """Text in two splits. ``vocab_size`` tokens are possible; ``end`` is the one that follows every document."""

    vocab_size = BYTE_VOCABULARY
    end = DOCUMENT_END[0]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``."""
        return list(text.encode("utf-8", errors="surrogatepass"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``; what is no text becomes U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")

    @abstractmethod
    def count(self, split: Split) -> int:
        """Return the number of tokens of ``split``.

        Raises:
            ConfigError: a file is missing, empty or unreadable.
        """

    @abstractmethod
    def read(self, split: Split) -> bytearray:
        """Return the tokens of ``split``.

        Raises:
            ConfigError: as :meth:`count`, or a file is not UTF-8.
        """


class _Files(Corpus):
    """Whole files as documents."""

    @abstractmethod
    def files(self, split: Split) -> Sequence[Path]:
        """Return the files of ``split``, in order."""

    def count(self, split: Split) -> int:
        return sum(path.stat().st_size + len(DOCUMENT_END) for path in self.files(split))

    def read(self, split: Split) -> bytearray:
        tokens = bytearray()
        for path in self.files(split):
            tokens += _utf8(path, path.read_bytes()) + DOCUMENT_END
        return tokens


class StdlibCorpus(_Files):
    """Source files of the running Python's standard library: real text that every installation has.

    Tests, third-party packages and the few files that are not UTF-8 stay out. Files go to a split as wholes, chosen by
    ``seed``.

    Args:
        val_fraction: share of the files that validates, between 0 and 1.
    """

    def __init__(self, *, val_fraction: float = 0.05, seed: int = 0) -> None:
        self.val_fraction = val_fraction
        self.seed = seed

    def files(self, split: Split) -> Sequence[Path]:
        files = list(_stdlib_files())
        random.Random(self.seed).shuffle(files)
        num_val = max(1, round(self.val_fraction * len(files)))
        return sorted(files[:num_val] if split == "val" else files[num_val:])


@functools.cache
def _stdlib_files() -> tuple[Path, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    files = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - left_out)
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files += [path for path in paths if path.stat().st_size]
    files.sort()
    if len(files) < 2:
        raise ConfigError(
            f"data: this Python has no sources of its standard library in {root}. "
            "Bring your own text: data=text data.path=FILE_OR_FOLDER."
        )
    return tuple(files)


class TextCorpus(_Files):
    """UTF-8 text files: one file, or all of a folder that end in ``suffix``.

    Several files are split as wholes, chosen by ``seed``; a single file gives its last part to validation.

    Args:
        val_fraction: share of the files, or of the file, that validates, between 0 and 1.
    """

    def __init__(self, *, path: str, suffix: str = ".txt", val_fraction: float = 0.05, seed: int = 0) -> None:
        self.path = Path(path).expanduser()
        self.suffix = suffix
        self.val_fraction = val_fraction
        self.seed = seed

    def files(self, split: Split) -> Sequence[Path]:
        files = self._all_files()
        if len(files) == 1:
            return files
        random.Random(self.seed).shuffle(files)
        num_val = min(len(files) - 1, max(1, round(self.val_fraction * len(files))))
        return sorted(files[:num_val] if split == "val" else files[num_val:])

    def count(self, split: Split) -> int:
        if len(self._all_files()) > 1:
            return super().count(split)
        return len(range(*self._part(split, self._all_files()[0].stat().st_size + len(DOCUMENT_END))))

    def read(self, split: Split) -> bytearray:
        tokens = super().read(split)
        if len(self._all_files()) > 1:
            return tokens
        begin, end = self._part(split, len(tokens))
        return tokens[begin:end]

    def _part(self, split: Split, size: int) -> tuple[int, int]:
        border = size - round(self.val_fraction * size)
        return (0, border) if split == "train" else (border, size)

    def _all_files(self) -> list[Path]:
        if self.path.is_file():
            files = [self.path]
        elif self.path.is_dir():
            files = sorted(path for path in self.path.rglob(f"*{self.suffix}") if path.is_file())
        else:
            raise ConfigError(f"data.path: there is no file or folder {str(self.path)!r} (looked in {Path.cwd()}).")
        files = [path for path in files if path.stat().st_size]
        if not files:
            raise ConfigError(
                f"data.path: {str(self.path)!r} "
                + (
                    "is empty."
                    if self.path.is_file()
                    else f"has no file with text that ends in {self.suffix!r} (data.suffix)."
                )
            )
        return files


class JsonlCorpus(Corpus):
    """Files with one JSON object a line, whose ``text_key`` holds a document."""

    def __init__(self, *, train_path: str, val_path: str, text_key: str = "text") -> None:
        self.paths: dict[Split, Path] = {
            "train": Path(train_path).expanduser(),
            "val": Path(val_path).expanduser(),
        }
        self.text_key = text_key

    def count(self, split: Split) -> int:
        return len(self._tokens(split))

    def read(self, split: Split) -> bytearray:
        return bytearray(self._tokens(split))

    def _tokens(self, split: Split) -> bytes:
        path = self.paths[split]
        if not path.is_file():
            raise ConfigError(f"data.{split}_path: there is no file {str(path)!r} (looked in {Path.cwd()}).")
        stat = path.stat()
        return _read_jsonl(path, self.text_key, f"data.{split}_path", stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _read_jsonl(path: Path, text_key: str, key: str, mtime_ns: int, size: int) -> bytes:
    """Read once what counting and training both ask for; the last two arguments notice a changed file."""
    tokens = bytearray()
    for number, line in enumerate(_utf8(path, path.read_bytes()).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{key}: {path}, line {number} is not JSON: {error}.") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
            names = f"its keys are {', '.join(map(repr, row))}" if isinstance(row, dict) else "it is no object"
            if isinstance(row, dict) and text_key in row:
                names = f"it is {type(row[text_key]).__name__}"
            raise ConfigError(f"{key}: {path}, line {number} has no text under {text_key!r} (data.text_key): {names}.")
        tokens += row[text_key].encode("utf-8", errors="surrogatepass") + DOCUMENT_END
    if not tokens:
        raise ConfigError(f"{key}: {path} is empty.")
    return bytes(tokens)


def _utf8(path: Path, content: bytes) -> bytes:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data: {path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}. "
            f"Convert it, for instance: iconv -f latin1 -t utf-8 {path.name}"
        ) from None
    return content
