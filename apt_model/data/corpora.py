"""Corpora: where documents come from.

A corpus knows the number of its tokens without torch, so that a run's length is known before it starts: cheaply for bytes,
and for other tokens by making them once, into memory-mapped shards that later runs find again (``data.cache``).
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import random
import shlex
import sysconfig
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apt_model.data.borders import Borders, Pack
from apt_model.data.corpus import Corpus, Document, Split
from apt_model.data.shard_writer import write
from apt_model.data.shards import MANIFEST, Shards
from apt_model.data.sources import Run, joined, sources_of
from apt_model.data.tokenizer import ByteTokenizer, Tokenizer, find_tokenizer, load_tokenizer
from apt_model.data.tokens import Tokens
from apt_model.errors import ConfigError
from apt_model.files import in_home, open_regular

DOCUMENT_END = b"\0"


class DocumentCorpus(Corpus):
    """Documents whose tokens are made once, and kept in shards.

    Args:
        tokenizer: a ``tokenizer.json``, or a folder that holds one; None: a token is a byte of UTF-8.
        bos: whether each document begins with the token that the tokenizer puts before texts.
        cache: folder for shards; None: ``apt_launch`` in the user's cache folder.
        pack: see :data:`apt_model.data.borders.Pack`.
    """

    max_tokens: int | None = None  # of a split

    def __init__(
        self,
        *,
        tokenizer: str | None = None,
        bos: bool | None = None,
        cache: str | None = None,
        pack: Pack | None = None,
    ) -> None:
        self.pack = pack
        self.bos = bool(bos)
        self._tokenizer_file = find_tokenizer(in_home(tokenizer, "data.tokenizer")) if tokenizer else None
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self._cache = cache or f"{caches}/apt_launch"

    @property
    def cache(self) -> Path:
        """The folder for shards.

        Raises:
            ConfigError: it is in a home folder, and there is none.
        """
        return in_home(self._cache, "data.cache")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What the tokens mean.

        Raises:
            ConfigError: the file is missing, or no tokenizer.
        """
        return load_tokenizer(self._tokenizer_file) if self._tokenizer_file else ByteTokenizer()

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of ``tokenizer``; None: tokens are bytes."""
        return self._tokenizer_file

    @property
    def vocab_size(self) -> int:
        """How many tokens are possible."""
        return self.tokenizer.vocab_size

    @property
    def begin(self) -> int | None:
        """The token that each document begins with; None: none.

        Raises:
            ConfigError: the tokenizer has none.
        """
        if self.bos and self.tokenizer.begin is None:
            raise ConfigError("data.bos: the tokenizer puts no token before a text. Set it to false.")
        return self.tokenizer.begin if self.bos else None

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the documents of ``split``, always the same in the same order.

        Raises:
            ConfigError: a file is missing, empty, unreadable or not UTF-8.
        """

    @abstractmethod
    def source(self) -> dict[str, Any]:
        """Return, as plain values, all that decides what the documents are: settings, and files with size and time."""

    def count(self, split: Split) -> int:
        """Return the number of tokens of ``split``; they are made first, unless they are kept from another time."""
        return self.kept.count(split)

    def read(self, split: Split) -> Tokens:
        """Return the tokens of ``split``, memory-mapped."""
        return self.kept.read(split)

    def check(self) -> None:
        """Make sure that the shards are what was once written.

        Raises:
            ConfigError: they are not.
        """
        self.kept.check()

    @functools.cached_property
    def kept(self) -> Shards:
        """The shards, made now if there are none yet.

        Raises:
            ConfigError: the text cannot be read, or the shards cannot be written.
        """
        begin = [] if self.begin is None else [self.begin]
        about = json.dumps([self.source(), self.max_tokens, self.tokenizer.fingerprint, *begin], sort_keys=True)
        folder = self.cache / hashlib.sha256(about.encode()).hexdigest()[:32]
        if not (folder / MANIFEST).exists():
            write(folder, self, self.tokenizer, key="data.cache", on_progress=self.on_progress)
        return Shards(folder, key="data.cache")


class ByteCorpus(DocumentCorpus):
    """Documents whose bytes are their tokens, counted and read without shards, unless ``tokenizer`` names others."""

    @abstractmethod
    def count_bytes(self, split: Split) -> int:
        """Return the bytes of ``split``, those that end documents counted."""

    @abstractmethod
    def read_bytes(self, split: Split) -> bytearray:
        """Return the bytes of ``split``."""

    def count(self, split: Split) -> int:
        """Return the number of tokens of ``split``."""
        return super().count(split) if self.tokenizer_file else self.count_bytes(split)

    def read(self, split: Split) -> Tokens:
        """Return the tokens of ``split``."""
        if self.tokenizer_file:
            return super().read(split)
        import numpy as np

        sources = self.byte_sources(split) if split == "val" else ()  # training asks nobody
        return Tokens([np.frombuffer(self.read_bytes(split), dtype=np.uint8)], sources=sources)

    def byte_sources(self, split: Split) -> Sequence[Run]:
        """Return where the bytes of ``split`` come from, in order; none: unknown."""
        return ()

    def check(self) -> None:
        """Make sure that shards, where there are some, are what was once written."""
        if self.tokenizer_file:
            super().check()


class _Files(ByteCorpus):
    """Whole files as documents; their sources are the folders in :attr:`root`."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder that holds them all."""

    @abstractmethod
    def files(self, split: Split) -> Sequence[Path]:
        """Return the files of ``split``, in order."""

    def count_bytes(self, split: Split) -> int:
        return sum(path.stat().st_size + len(DOCUMENT_END) for path in self.files(split))

    def read_bytes(self, split: Split) -> bytearray:
        tokens = bytearray()
        for path in self.files(split):
            tokens += _utf8(path, _content(path)) + DOCUMENT_END
        return tokens

    def documents(self, split: Split) -> Iterator[Document]:
        files = self.files(split)
        total, done = self.count_bytes(split), 0
        for path, source in zip(files, sources_of(files, self.root), strict=True):
            content = _utf8(path, _content(path))
            done += len(content) + len(DOCUMENT_END)
            yield Document(content.decode(), done / total, source)

    def byte_sources(self, split: Split) -> Sequence[Run]:
        files = self.files(split)
        sizes = [path.stat().st_size + len(DOCUMENT_END) for path in files]
        return joined(map(Run, sources_of(files, self.root), sizes))

    def source(self) -> dict[str, Any]:
        return {split: stats(self.files(split)) for split in ("train", "val")}


class StdlibCorpus(_Files):
    """Source files of the running Python's standard library: real text that every installation has.

    Tests, third-party packages and the few files that are not UTF-8 stay out. Files go to a split as wholes, chosen by
    ``seed``.

    Args:
        val_fraction: share of the files that validates, between 0 and 1.
        tokenizer: see :class:`DocumentCorpus`, as for ``bos``, ``cache`` and ``pack``.
    """

    def __init__(
        self,
        *,
        val_fraction: float = 0.05,
        seed: int = 0,
        tokenizer: str | None = None,
        bos: bool | None = None,
        cache: str | None = None,
        pack: Pack | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, bos=bos, cache=cache, pack=pack)
        self.val_fraction = val_fraction
        self.seed = seed

    @property
    def root(self) -> Path:
        return _stdlib()

    def files(self, split: Split) -> Sequence[Path]:
        files = list(_stdlib_files())
        random.Random(self.seed).shuffle(files)
        num_val = max(1, round(self.val_fraction * len(files)))
        return sorted(files[:num_val] if split == "val" else files[num_val:])


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def _stdlib_files() -> tuple[Path, ...]:
    root = _stdlib()
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
        tokenizer: see :class:`DocumentCorpus`, as for ``bos``, ``cache`` and ``pack``.
    """

    def __init__(
        self,
        *,
        path: str,
        suffix: str = ".txt",
        val_fraction: float = 0.05,
        seed: int = 0,
        tokenizer: str | None = None,
        bos: bool | None = None,
        cache: str | None = None,
        pack: Pack | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, bos=bos, cache=cache, pack=pack)
        self.path = in_home(path, "data.path")
        self.suffix = suffix
        self.val_fraction = val_fraction
        self.seed = seed

    @property
    def root(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def files(self, split: Split) -> Sequence[Path]:
        files = self._all_files()
        if len(files) == 1:
            return files
        random.Random(self.seed).shuffle(files)
        num_val = min(len(files) - 1, max(1, round(self.val_fraction * len(files))))
        return sorted(files[:num_val] if split == "val" else files[num_val:])

    def count_bytes(self, split: Split) -> int:
        if len(self._all_files()) > 1:
            return super().count_bytes(split)
        return len(range(*self._part(split, self._all_files()[0].stat().st_size + len(DOCUMENT_END))))

    def read_bytes(self, split: Split) -> bytearray:
        tokens = super().read_bytes(split)
        if len(self._all_files()) > 1:
            return tokens
        begin, end = self._part(split, len(tokens))
        return tokens[begin:end]

    def byte_sources(self, split: Split) -> Sequence[Run]:
        return super().byte_sources(split) if len(self._all_files()) > 1 else ()

    def documents(self, split: Split) -> Iterator[Document]:
        if len(self._all_files()) > 1:
            yield from super().documents(split)
            return
        (path,) = self._all_files()
        whole = _utf8(path, _content(path))
        _, border = self._part("train", len(whole) + len(DOCUMENT_END))
        while border < len(whole) and whole[border] & 0xC0 == 0x80:  # within a character
            border += 1
        yield Document((whole[:border] if split == "train" else whole[border:]).decode(), 1.0)

    def source(self) -> dict[str, Any]:
        parts = [self.val_fraction] if len(self._all_files()) == 1 else []  # else it is in the choice of files
        return super().source() | {"parts": parts}

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


class JsonlCorpus(ByteCorpus):
    """Files with one JSON object a line, whose ``text_key`` holds a document.

    Args:
        source_key: holds where the document comes from; None: unknown.
        tokenizer: see :class:`DocumentCorpus`, as for ``bos``, ``cache`` and ``pack``.
    """

    def __init__(
        self,
        *,
        train_path: str,
        val_path: str,
        text_key: str = "text",
        source_key: str | None = None,
        tokenizer: str | None = None,
        bos: bool | None = None,
        cache: str | None = None,
        pack: Pack | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, bos=bos, cache=cache, pack=pack)
        self.paths: dict[Split, Path] = {
            "train": in_home(train_path, "data.train_path"),
            "val": in_home(val_path, "data.val_path"),
        }
        self.keys = Keys(text_key, source_key)

    def count_bytes(self, split: Split) -> int:
        return len(self._read(split)[0])

    def read_bytes(self, split: Split) -> bytearray:
        return bytearray(self._read(split)[0])

    def byte_sources(self, split: Split) -> Sequence[Run]:
        return self._read(split)[1]

    def documents(self, split: Split) -> Iterator[Document]:
        return _read_jsonl(self._path(split), self.keys, f"data.{split}_path")

    def source(self) -> dict[str, Any]:
        return self.keys.as_dict() | {split: stats([self._path(split)]) for split in self.paths}

    def _path(self, split: Split) -> Path:
        path = self.paths[split]
        if not path.is_file():
            raise ConfigError(f"data.{split}_path: there is no file {str(path)!r} (looked in {Path.cwd()}).")
        return path

    def _read(self, split: Split) -> tuple[bytes, list[Run]]:
        path = self._path(split)
        about = path.stat()
        return _jsonl_bytes(path, self.keys, f"data.{split}_path", about.st_mtime_ns, about.st_size)


class ShardsCorpus(Corpus):
    """Shards that ``python -m apt_launch.tokenize`` has made.

    Args:
        verify: compare checksums before a run; False: sizes only.
        pack: see :data:`apt_model.data.borders.Pack`.
    """

    def __init__(self, *, path: str, verify: bool = True, pack: Pack | None = None) -> None:
        self.pack = pack
        self.path = in_home(path, "data.path")
        self.verify = verify

    @functools.cached_property
    def shards(self) -> Shards:
        """The folder, opened.

        Raises:
            ConfigError: it is missing, damaged or something else.
        """
        return Shards(self.path)

    @property
    def vocab_size(self) -> int:
        """How many tokens are possible; no library is loaded for it."""
        return self.shards.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """What the tokens mean."""
        return self.shards.tokenizer

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of ``tokenizer``; None: tokens are bytes."""
        return self.shards.tokenizer_file

    def _borders(self) -> Borders:
        return Borders(self.shards.manifest.end)

    def count(self, split: Split) -> int:
        """Return the number of tokens of ``split``, from the manifest."""
        return self.shards.count(split)

    def read(self, split: Split) -> Tokens:
        """Return the tokens of ``split``, memory-mapped."""
        return self.shards.read(split)

    def check(self) -> None:
        """Compare checksums, where ``verify`` says so.

        Raises:
            ConfigError: a shard is damaged.
        """
        if self.verify:
            self.shards.check()


class Keys(NamedTuple):
    """Where a document that comes as a mapping has its text and, if asked for, its source."""

    text: str
    source: str | None = None

    def document(self, row: Any, done: float, where: str) -> Document:
        """Return the document in ``row``; ``where`` that is.

        Raises:
            ConfigError: there is no text under a key.
        """
        text = _text_of(row, self.text, "text", where)
        return Document(text, done, _text_of(row, self.source, "source", where) if self.source else "")

    def as_dict(self) -> dict[str, str]:
        """Return the keys as plain values; nothing of a source that was not asked for."""
        return {"text_key": self.text} | ({"source_key": self.source} if self.source else {})


@functools.lru_cache(maxsize=2)
def _jsonl_bytes(path: Path, keys: Keys, key: str, mtime_ns: int, size: int) -> tuple[bytes, list[Run]]:
    """Read once what counting and training both ask for; the last two arguments notice a changed file."""
    tokens, runs = bytearray(), []
    for document in _read_jsonl(path, keys, key):
        content = document.text.encode("utf-8", errors="surrogatepass") + DOCUMENT_END
        tokens += content
        if keys.source:
            runs.append(Run(document.source, len(content)))
    return bytes(tokens), joined(runs)


def _read_jsonl(path: Path, keys: Keys, key: str) -> Iterator[Document]:
    size, begin, found = path.stat().st_size, 0, False
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            _utf8(path, line, begin)
            begin += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{key}: {path}, line {number} is not JSON: {error}.") from None
            yield keys.document(row, begin / max(1, size), f"{key}: {path}, line {number}")
            found = True
    if not found:
        raise ConfigError(f"{key}: {path} is empty.")


def _text_of(row: Any, key: str, what: str, where: str) -> str:
    """Return the ``what`` of a document, which is in ``row`` under ``key``."""
    if isinstance(row, dict) and isinstance(row.get(key), str):
        text: str = row[key]
        return text
    found = f"its keys are {', '.join(map(repr, row))}" if isinstance(row, dict) else "it is no object"
    if isinstance(row, dict) and key in row:
        found = f"it is {type(row[key]).__name__}"
    raise ConfigError(f"{where} has no {what} under {key!r} (data.{what}_key): {found}.")


def stats(paths: Iterable[Path]) -> dict[str, Any]:
    """Return what notices that files have changed: their number, their bytes, and a sha256 of names, sizes and times."""
    found = [(str(path.absolute()), about.st_size, about.st_mtime_ns) for path in paths for about in (path.stat(),)]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    return {"files": len(found), "bytes": sum(size for _, size, _ in found), "sha256": digest}


def _content(path: Path) -> bytes:
    """Return the content of a text file, however long it is."""
    with open_regular(path) as file:
        return file.read()


def _utf8(path: Path, content: bytes, begin: int = 0) -> bytes:
    """Return ``content``, which stands at the offset ``begin`` of the file, once it is known to be UTF-8."""
    if begin == 0 and (encoding := _wide_encoding(content[:4096])):
        convert = shlex.join(["iconv", "-f", encoding, "-t", "utf-8", path.name])
        raise ConfigError(f"data: {path} is not UTF-8, but {encoding.upper()}. Convert it, for instance: {convert}")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data: {path} is not UTF-8: byte {content[error.start]:#04x} at offset {begin + error.start}. "
            f"Convert it, for instance: iconv -f latin1 -t utf-8 {shlex.quote(path.name)}"
        ) from None
    return content


def _wide_encoding(begin: bytes) -> str | None:
    """Return the encoding of a text with two or four bytes a character, as iconv names it; None: it is none of these."""
    if begin.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for first, encoding in (
        (1, "utf-16le"),
        (0, "utf-16be"),
    ):  # letters without a mark have a zero at every other place
        if (zeros := begin[first::2].count(0)) and zeros >= len(begin) / 4:
            return encoding
    return None
