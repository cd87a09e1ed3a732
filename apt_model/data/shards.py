"""Tokens made once and kept: memory-mapped files, whole or not there, with a manifest of sizes and checksums.

A folder holds ``train-00000.bin`` and so on (unsigned little-endian integers, nothing else), ``manifest.json`` and, where
tokens are no bytes, ``tokenizer.json``. :mod:`apt_model.data.shard_writer` makes it.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apt_model.data.corpus import Split
from apt_model.data.sources import Run
from apt_model.data.tokenizer import FILE_NAME, ByteTokenizer, Tokenizer, load_tokenizer
from apt_model.data.tokens import Tokens
from apt_model.errors import ConfigError
from apt_model.files import read_regular, sha256

MANIFEST: Final = "manifest.json"
SPLITS: Final[tuple[Split, ...]] = ("train", "val")
Count = Annotated[int, Field(ge=0)]


class _Kept(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Shard(_Kept):
    """One file."""

    file: Annotated[str, Field(pattern=r"^(train|val)-\d{5}\.bin$")]
    tokens: Annotated[int, Field(gt=0)]
    sha256: str


class SplitShards(_Kept):
    """The files of a split, in order. ``pieces`` of its documents are in them; ``done``: that is all.

    ``sources`` are those of its tokens, in order, where documents name them and only for validation: (name, tokens).
    """

    shards: list[Shard] = []
    pieces: Count = 0
    sources: list[Annotated[tuple[str, Count], Field(strict=False)]] = []
    done: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens the split has."""
        return sum(shard.tokens for shard in self.shards)


class Manifest(_Kept):
    """What a folder of shards holds. ``source`` is where the documents came from; ``tokenizer`` the sha256 of its file."""

    format: Literal["apt_launch shards 1"] = "apt_launch shards 1"
    dtype: Literal["<u1", "<u2", "<u4"]
    vocab_size: Annotated[int, Field(gt=0)]
    end: Count
    tokenizer: str
    source: dict[str, Any]
    splits: dict[Split, SplitShards]


class Shards:
    """A folder of shards. The manifest and the files' sizes are read, no more; :meth:`check` reads all.

    Args:
        key: where the user named the folder.

    Raises:
        ConfigError: the folder is missing, is something else, or a file is missing or of another size.
    """

    def __init__(self, folder: Path, *, key: str = "data.path") -> None:
        self.folder = folder
        self.key = key
        path = folder / MANIFEST
        if not path.is_file():
            partial = partial_folder(folder)
            raise ConfigError(
                f"{key}: {partial} was cut off. Go on with it: the command that began it, once more."
                if partial.is_dir()
                else f"{key}: {str(folder)!r} holds no shards: there is no {MANIFEST} (looked in {Path.cwd()}). Make them: "
                "python -m apt_launch.tokenize OUT data=..."
            )
        try:
            self.manifest = Manifest.model_validate_json(read_regular(path))
        except (OSError, ConfigError, ValidationError) as error:
            reason = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else str(error)
            raise ConfigError(f"{key}: {path} is no manifest of shards, or damaged: {reason}.") from None
        for split in SPLITS:
            if split not in self.manifest.splits:
                raise ConfigError(f"{key}: {path} is damaged: it has no {split} split. {self._remedy}")
            kept = self.manifest.splits[split]
            if kept.sources and sum(tokens for _, tokens in kept.sources) != kept.tokens:
                raise ConfigError(f"{key}: {path} is damaged: its sources are those of other tokens. {self._remedy}")
        for shard in self._shards():
            self._check_size(shard)
        if self.tokenizer_file is not None and checksum(self.tokenizer_file) != self.manifest.tokenizer:
            raise ConfigError(
                f"{key}: {self.tokenizer_file} is missing, or another one than that of the shards beside it. {self._remedy}"
            )

    @property
    def vocab_size(self) -> int:
        """How many tokens are possible."""
        return self.manifest.vocab_size

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What the tokens mean."""
        return ByteTokenizer() if self.tokenizer_file is None else load_tokenizer(self.tokenizer_file)

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of ``tokenizer``; None: tokens are bytes."""
        return None if self.manifest.tokenizer == ByteTokenizer().fingerprint else self.folder / FILE_NAME

    def count(self, split: Split) -> int:
        """Return the number of tokens of ``split``."""
        return self.manifest.splits[split].tokens

    def read(self, split: Split) -> Tokens:
        """Return the tokens of ``split``, memory-mapped."""
        import numpy as np

        kept = self.manifest.splits[split]
        maps = [self._map(shard) for shard in kept.shards]
        runs = [Run(*run) for run in kept.sources]
        return Tokens([np.frombuffer(mapped, dtype=self.manifest.dtype) for mapped in maps], maps, runs)

    def check(self) -> None:
        """Compare every file with its checksum.

        Raises:
            ConfigError: one is damaged.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._check, self._shards()))

    @property
    def _remedy(self) -> str:
        return f"Delete {self.folder} and have it made again."

    def _shards(self) -> Iterator[Shard]:
        for split in SPLITS:
            yield from self.manifest.splits[split].shards

    def _map(self, shard: Shard) -> mmap.mmap:
        with (self.folder / shard.file).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.file
        wanted = shard.tokens * int(self.manifest.dtype[-1])
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{self.key}: {path} cannot be read ({error.strerror}). {self._remedy}") from None
        if size != wanted:
            raise ConfigError(f"{self.key}: {path} is damaged: it has {size} bytes, not {wanted}. {self._remedy}")

    def _check(self, shard: Shard) -> None:
        path = self.folder / shard.file
        self._check_size(shard)
        if checksum(path) != shard.sha256:
            raise ConfigError(
                f"{self.key}: {path} is damaged: it differs from its checksum in {MANIFEST}. {self._remedy}"
            )
        import numpy as np

        largest = int(np.frombuffer(self._map(shard), dtype=self.manifest.dtype).max())
        if largest >= self.vocab_size:
            raise ConfigError(
                f"{self.key}: {path} has the token {largest}, but {MANIFEST} says that there are {self.vocab_size}. "
                f"{self._remedy}"
            )


def partial_folder(folder: Path) -> Path:
    """Return the folder beside ``folder`` in which it is being made."""
    return folder.with_name(f".{folder.name}.partial")


def checksum(path: Path) -> str | None:
    """Return the checksum of a file; None: it cannot be read."""
    try:
        return sha256(path)
    except (OSError, ConfigError):
        return None
