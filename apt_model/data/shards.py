"""Tokens made once and kept: memory-mapped files, whole or not there, with a manifest of sizes and checksums.

A folder holds ``train-00000.bin`` and so on (unsigned little-endian integers, nothing else), ``manifest.json`` and, where
tokens are no bytes, ``tokenizer.json``. It is made aside, as ``.NAME.partial``, and renamed when it is whole; what was cut
off goes on at the last complete shard.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apt_model.data.corpora import Corpus, Document, DocumentCorpus, Split, Told, share
from apt_model.data.sources import Run, joined
from apt_model.data.tokenizer import FILE_NAME, ByteTokenizer, Tokenizer, load_tokenizer
from apt_model.data.tokens import Tokens
from apt_model.errors import ConfigError
from apt_model.files import sha256, sync, write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

MANIFEST: Final = "manifest.json"
PROGRESS: Final = "progress.json"
SPLITS: Final[tuple[Split, ...]] = ("train", "val")
SHARD_TOKENS: Final = 1 << 27
"""Tokens after which a shard is closed: 256 MiB of them at two bytes each."""

PIECE: Final = 1 << 20
"""Characters above which a document is tokenised in pieces, so that memory stays bounded."""

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

    ``sources`` are those of its tokens, in order, where documents tell them and only for validation: (name, tokens).
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
            partial = _partial(folder)
            raise ConfigError(
                f"{key}: {partial} was cut off. Go on with it: the command that began it, once more."
                if partial.is_dir()
                else f"{key}: {str(folder)!r} holds no shards: there is no {MANIFEST} (looked in {Path.cwd()}). Make them: "
                "python -m apt_launch.tokenize OUT data=..."
            )
        try:
            self.manifest = Manifest.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else str(error)
            raise ConfigError(f"{key}: {path} is no manifest of shards, or damaged: {reason}.") from None
        for split in SPLITS:
            if split not in self.manifest.splits:
                raise ConfigError(f"{key}: {path} is damaged: it tells of no {split} split. {self._remedy}")
            kept = self.manifest.splits[split]
            if kept.sources and sum(tokens for _, tokens in kept.sources) != kept.tokens:
                raise ConfigError(f"{key}: {path} is damaged: it tells the sources of other tokens. {self._remedy}")
        for shard in self._shards():
            self._check_size(shard)
        if self.tokenizer_file is not None and _sha256(self.tokenizer_file) != self.manifest.tokenizer:
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
        if _sha256(path) != shard.sha256:
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


class ShardsCorpus(Corpus):
    """Shards that ``python -m apt_launch.tokenize`` has made.

    Args:
        verify: compare checksums before a run; False: sizes only.
    """

    def __init__(self, *, path: str, verify: bool = True) -> None:
        self.path = Path(path).expanduser()
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
        """How many tokens are possible; no library is loaded to tell."""
        return self.shards.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """What the tokens mean."""
        return self.shards.tokenizer

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of ``tokenizer``; None: tokens are bytes."""
        return self.shards.tokenizer_file

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


# --- making them --------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    corpus: DocumentCorpus,
    tokenizer: Tokenizer,
    *,
    key: str,
    told: Told,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Make shards of ``corpus`` in ``folder``, or go on where an earlier attempt was cut off; one process at a time.

    Nothing is done where the folder has shards already.

    Args:
        key: where the user named the folder.
        told: see :data:`apt_model.data.corpora.Told`.

    Raises:
        ConfigError: the folder is something else, cannot be written, or the text cannot be read.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock")):
            if not (folder / MANIFEST).exists():
                if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                    raise ConfigError(f"{key}: {folder} is something else already. Choose another folder.")
                _write(folder, corpus, tokenizer, told, shard_tokens)
    except OSError as error:
        raise ConfigError(f"{key}: tokens could not be made in {folder}: {error}.") from None


def _write(folder: Path, corpus: DocumentCorpus, tokenizer: Tokenizer, told: Told, shard_tokens: int) -> None:
    partial = _partial(folder)
    about = {
        "source": corpus.source(),
        "max_tokens": corpus.max_tokens,
        "tokenizer": tokenizer.fingerprint,
        "shard_tokens": shard_tokens,
    }
    about = json.loads(json.dumps(about))
    splits = _progress(partial, about)
    if splits is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        splits = {}

    def save(split: Split, progress: SplitShards) -> None:
        splits[split] = progress
        kept = {name: found.model_dump() for name, found in splits.items()}
        write_whole(partial / PROGRESS, json.dumps({"about": about, "splits": kept}), safe=True)

    try:
        for split in reversed(SPLITS):  # what is wrong with the smaller one is told before hours go into the other
            progress = splits.get(split, SplitShards())
            if not progress.done:
                _write_split(partial, split, progress, corpus, tokenizer, told, shard_tokens, save)
    except ConfigError:  # the text is wrong, or the network failed: then it is worth going on later
        if not any(progress.shards for progress in splits.values()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if tokenizer.content is not None:
        write_whole(partial / FILE_NAME, tokenizer.content, safe=True)
    manifest = Manifest(
        dtype=tokenizer.dtype.str.replace("|", "<"),
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        tokenizer=tokenizer.fingerprint,
        source=about,
        splits=splits,
    )
    write_whole(partial / MANIFEST, manifest.model_dump_json(indent=2), safe=True)
    (partial / PROGRESS).unlink()
    sync(partial)
    partial.rename(folder)
    sync(folder.parent)


def _write_split(
    partial: Path,
    split: Split,
    progress: SplitShards,
    corpus: DocumentCorpus,
    tokenizer: Tokenizer,
    told: Told,
    shard_tokens: int,
    save: Callable[[Split, SplitShards], None],
) -> None:
    import numpy as np

    limit = corpus.max_tokens
    end = np.array([tokenizer.end], dtype=tokenizer.dtype)
    room = limit - progress.tokens if limit else None
    waiting: list[NDArray[Any]] = []
    size, pieces = 0, progress.pieces
    runs = [Run(*run) for run in progress.sources]

    def close() -> SplitShards:
        name = f"{split}-{len(progress.shards):05d}.bin"
        content = np.concatenate(waiting)
        with (partial / name).open("wb") as file:
            file.write(content.data)
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(file=name, tokens=len(content), sha256=hashlib.sha256(content.data).hexdigest())
        sources: list[tuple[str, int]] = [*joined(runs)] if any(run.source for run in runs) else []
        return SplitShards(shards=[*progress.shards, shard], pieces=pieces, sources=sources)

    told(split, 0.0, progress.tokens)
    for batch in _batches(_pieces(corpus.documents(split)), skip=progress.pieces):
        encoded = tokenizer.encode_all([piece.text for piece in batch])
        for tokens, (_, ends, _, source) in zip(encoded, batch, strict=True):
            pieces += 1
            before = size
            for part in (tokens, end) if ends else (tokens,):
                waiting.append(part[:room])
                size += len(waiting[-1])
                room = None if room is None else room - len(waiting[-1])
            if split == "val":
                runs.append(Run(source, size - before))
            if size >= shard_tokens:
                progress = close()
                save(split, progress)
                waiting, size = [], 0
            if room == 0:
                break
        made = progress.tokens + size
        done = batch[-1].done
        if limit:
            done = max(share(made, limit), done)  # in this order the second may be nan
        if room == 0:
            break
        if not done >= 1:
            told(split, done, made)
    if size:
        progress = close()
    save(split, progress.model_copy(update={"done": True}))
    told(split, 1.0, progress.tokens)


class _Piece(NamedTuple):
    """A text, whether a document ends with it, the share of the split that has been read with it, and its source."""

    text: str
    ends: bool
    done: float
    source: str


def _pieces(documents: Iterator[Document], longest: int = PIECE) -> Iterator[_Piece]:
    """Cut long documents, after more than ``longest`` characters.

    They are cut after a single line break between words, where byte-level BPE has a border in any case.
    """
    before = 0.0
    for text, done, source in documents:
        begin = 0
        while len(text) - begin > longest:
            cut = text.find("\n", begin + longest) + 1
            while cut and cut < len(text) and (text[cut - 2].isspace() or text[cut].isspace()):
                cut = text.find("\n", cut) + 1
            if not 0 < cut < len(text):
                break
            yield _Piece(text[begin:cut], False, before + (done - before) * cut / len(text), source)
            begin = cut
        yield _Piece(text[begin:], True, done, source)
        before = done


def _batches(pieces: Iterator[_Piece], skip: int) -> Iterator[list[_Piece]]:
    """Yield them in lists of about ``PIECE`` characters, without the first ``skip``."""
    batch: list[_Piece] = []
    size = 0
    for number, piece in enumerate(pieces):
        if number < skip:
            continue
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE or len(batch) == 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress(partial: Path, about: Mapping[str, Any]) -> dict[Split, SplitShards] | None:
    """Return how far an earlier attempt at the same came; None: there was none, or what it left is damaged."""
    try:
        told = json.loads((partial / PROGRESS).read_bytes())
        if told["about"] != about:
            return None
        splits: dict[Split, SplitShards] = {
            name: SplitShards.model_validate(kept) for name, kept in told["splits"].items()
        }
        for progress in splits.values():
            for shard in progress.shards:
                if _sha256(partial / shard.file) != shard.sha256:
                    return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return splits


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time be here; the others wait. The file ``path`` is there meanwhile."""
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                taken = os.fstat(lock.fileno()).st_ino != path.stat().st_ino
            except FileNotFoundError:
                taken = True
            if taken:  # who was here before has removed it, and others wait for a new one
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _sha256(path: Path) -> str | None:
    """Return the checksum of a file; None: it cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return None
