"""Writes shards aside, as ``.NAME.partial``, renamed once whole; after an interruption it continues at the last whole shard."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apt_model.data.corpus import Document, Documents, OnProgress, Split, share
from apt_model.data.shards import MANIFEST, SPLITS, Manifest, Shard, SplitShards, checksum, partial_folder
from apt_model.data.sources import Run, joined
from apt_model.data.tokenizer import FILE_NAME, Tokenizer
from apt_model.errors import ConfigError
from apt_model.files import open_kept, open_new, read_regular, refuse_link, sync, write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROGRESS: Final = "progress.json"
SHARD_TOKENS: Final = 1 << 27
"""Tokens after which a shard is closed: 256 MiB of them at two bytes each."""

PIECE: Final = 1 << 20
"""Characters above which a document is tokenised in pieces, so that memory stays bounded."""


def write(
    folder: Path,
    corpus: Documents,
    tokenizer: Tokenizer,
    *,
    key: str,
    on_progress: OnProgress,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Make shards of ``corpus`` in ``folder``, or continue where an earlier attempt was cut off; one process at a time.

    Nothing is done where the folder has shards already.

    Args:
        key: where the user named the folder.
        on_progress: see :data:`apt_model.data.corpus.OnProgress`.

    Raises:
        ConfigError: the folder is something else, cannot be written, or the text cannot be read.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock")):
            if not (folder / MANIFEST).exists():
                if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                    raise ConfigError(f"{key}: {folder} is something else already. Choose another folder.")
                _write(folder, corpus, tokenizer, on_progress, shard_tokens)
    except OSError as error:
        raise ConfigError(f"{key}: tokens could not be made in {folder}: {error}.") from None


def _write(folder: Path, corpus: Documents, tokenizer: Tokenizer, on_progress: OnProgress, shard_tokens: int) -> None:
    partial = partial_folder(folder)
    refuse_link(partial)
    about = {
        "source": corpus.source(),
        "max_tokens": corpus.max_tokens,
        "tokenizer": tokenizer.fingerprint,
        "shard_tokens": shard_tokens,
    }
    if corpus.begin is not None:
        about["begin"] = corpus.begin
    about = json.loads(json.dumps(about))
    splits = _progress(partial, about)
    if splits is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        splits = {}

    def save(split: Split, progress: SplitShards) -> None:
        splits[split] = progress
        kept = {name: found.model_dump() for name, found in splits.items()}
        write_atomic(partial / PROGRESS, json.dumps({"about": about, "splits": kept}), safe=True)

    try:
        for split in reversed(SPLITS):  # what is wrong with the smaller one is found before hours go into the other
            progress = splits.get(split, SplitShards())
            if not progress.done:
                _write_split(partial, split, progress, corpus, tokenizer, on_progress, shard_tokens, save)
    except ConfigError:  # the text is wrong, or the network failed: then it may be continued later
        if not any(progress.shards for progress in splits.values()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if tokenizer.content is not None:
        write_atomic(partial / FILE_NAME, tokenizer.content, safe=True)
    manifest = Manifest(
        dtype=tokenizer.dtype.str.replace("|", "<"),
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        tokenizer=tokenizer.fingerprint,
        source=about,
        splits=splits,
    )
    write_atomic(partial / MANIFEST, manifest.model_dump_json(indent=2), safe=True)
    (partial / PROGRESS).unlink()
    sync(partial)
    partial.rename(folder)
    sync(folder.parent)


def _write_split(
    partial: Path,
    split: Split,
    progress: SplitShards,
    corpus: Documents,
    tokenizer: Tokenizer,
    on_progress: OnProgress,
    shard_tokens: int,
    save: Callable[[Split, SplitShards], None],
) -> None:
    import numpy as np

    limit = corpus.max_tokens
    begin, end = (np.array([token or 0], dtype=tokenizer.dtype) for token in (corpus.begin, tokenizer.end))
    marked = corpus.begin is not None
    room = limit - progress.tokens if limit else None
    waiting: list[NDArray[Any]] = []
    size, pieces = 0, progress.pieces
    runs = [Run(*run) for run in progress.sources]

    def close() -> SplitShards:
        name = f"{split}-{len(progress.shards):05d}.bin"
        content = np.concatenate(waiting)
        with open_new(partial / name) as file:
            file.write(content.data)
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(file=name, tokens=len(content), sha256=hashlib.sha256(content.data).hexdigest())
        sources: list[tuple[str, int]] = [*joined(runs)] if any(run.source for run in runs) else []
        return SplitShards(shards=[*progress.shards, shard], pieces=pieces, sources=sources)

    on_progress(split, 0.0, progress.tokens)
    for batch in _batches(_pieces(corpus.documents(split)), skip=progress.pieces):
        encoded = tokenizer.encode_all([piece.text for piece in batch])
        for tokens, (_, begins, ends, _, source) in zip(encoded, batch, strict=True):
            pieces += 1
            before = size
            for part in (*((begin,) if begins and marked else ()), tokens, *((end,) if ends else ())):
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
            on_progress(split, done, made)
    if size:
        progress = close()
    save(split, progress.model_copy(update={"done": True}))
    on_progress(split, 1.0, progress.tokens)


class _Piece(NamedTuple):
    """A text, whether a document begins or ends with it, the share of the split that has been read with it, and its source."""

    text: str
    begins: bool
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
            yield _Piece(text[begin:cut], begin == 0, False, before + (done - before) * cut / len(text), source)
            begin = cut
        yield _Piece(text[begin:], begin == 0, True, done, source)
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
        kept = json.loads(read_regular(partial / PROGRESS))
        if kept["about"] != about:
            return None
        splits: dict[Split, SplitShards] = {
            name: SplitShards.model_validate(made) for name, made in kept["splits"].items()
        }
        for progress in splits.values():
            for shard in progress.shards:
                if checksum(partial / shard.file) != shard.sha256:
                    return None
    except (OSError, ConfigError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return splits


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time be here; the others wait. The file ``path`` is there meanwhile.

    Raises:
        ConfigError: something else is in its place.
    """
    while True:
        with open_kept(path) as lock:
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
