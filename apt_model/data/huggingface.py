"""Corpora of the Hugging Face library datasets, which is needed only until their tokens are made."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

from apt_model.data.borders import Pack
from apt_model.data.corpora import DocumentCorpus, Keys, stats
from apt_model.data.corpus import Document, Split, share
from apt_model.errors import ConfigError, nearest
from apt_model.files import in_home

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


class HFCorpus(DocumentCorpus):
    """Documents of a dataset: from the Hub, from files in any format that datasets reads, or from ``save_to_disk``.

    Whether it is streamed or not, each document is read once, and its tokens are kept in shards. So the number of tokens is
    known before a run, batches are those of any other corpus, a function of seed and epoch, and a resume is exact: it asks
    neither the network nor a stream that would have to be wound forward.

    Args:
        path: a name on the Hub, a folder, or a format such as ``json``, ``parquet`` or ``arrow`` with ``data_files``.
        name: of the dataset's configuration.
        data_files: paths, or for each split its paths; with ``*``, if you like.
        revision: commit, tag or branch on the Hub; only a commit is always the same.
        val_split: None: the first ``val_documents`` of ``train_split`` validate, and are not trained on.
        text_key: the column.
        source_key: the column that says where a document comes from; None: unknown.
        streaming: read only as far as needed, without a copy of the whole on this machine.
        max_documents: of a split, at the most; None: all. A stream needs this or ``max_tokens``.
        max_tokens: of a split, at the most; the last document is cut off.
        tokenizer: see :class:`DocumentCorpus`, as for ``bos`` and ``cache``.

    Raises:
        ConfigError: a stream without a bound.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        data_files: DataFiles | None = None,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = "validation",
        val_documents: int = 1000,
        text_key: str = "text",
        source_key: str | None = None,
        streaming: bool = False,
        max_documents: int | None = None,
        max_tokens: int | None = None,
        tokenizer: str | None = None,
        bos: bool | None = None,
        cache: str | None = None,
        pack: Pack | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, bos=bos, cache=cache, pack=pack)
        if streaming and max_documents is None and max_tokens is None:
            raise ConfigError(
                "data.streaming: how much of a stream a run takes has to be known before it starts. Set data.max_tokens or "
                "data.max_documents."
            )
        self.path = path
        self.name = name
        self.data_files = data_files
        self.revision = revision
        self.train_split = train_split
        self.val_split = val_split
        self.val_documents = val_documents
        self.keys = Keys(text_key, source_key)
        self.streaming = streaming
        self.max_documents = max_documents
        self.max_tokens = max_tokens

    def documents(self, split: Split) -> Iterator[Document]:
        begin, most = 0, math.inf if self.max_documents is None else self.max_documents
        if self.val_split is None and split == "train":
            begin = self.val_documents
        elif self.val_split is None:
            most = min(most, self.val_documents)
        name = self.val_split or self.train_split if split == "val" else self.train_split
        with _as_config_error(f"data.path: datasets cannot give the split {name!r} of {self.path!r}"):
            rows, known = self._rows(name, "val_split" if split == "val" and self.val_split else "train_split")
            num_rows = min(most, math.inf if known is None else max(0, known - begin))
            rows = rows.skip(begin) if begin else rows
            for number, row in enumerate(rows):
                if number >= most:
                    break
                where = f"data: document {begin + number} of the split {name!r} of {self.path!r}"
                done = share(number + 1, num_rows if num_rows < math.inf else None)
                yield self.keys.document(row, done, where)

    def source(self) -> dict[str, Any]:
        settings = ("path", "name", "data_files", "revision", "train_split", "val_split", "max_documents")
        about: dict[str, Any] = {name: getattr(self, name) for name in settings} | self.keys.as_dict()
        about["val_documents"] = self.val_documents if self.val_split is None else None
        patterns = (self.path, *_patterns(self.data_files))
        local = [
            path
            for pattern in patterns
            for path in sorted(glob(_home(pattern), recursive=True))  # noqa: PTH207 - it may be absolute
        ]
        files = [
            inner for path in map(Path, local) for inner in ([path] if path.is_file() else sorted(path.rglob("*")))
        ]
        return about | {"files": stats(path for path in files if path.is_file())}

    def _rows(self, name: str, key: str) -> tuple[Any, int | None]:
        """Return the rows of the split ``name`` and, where it is known, their number.

        Raises:
            ConfigError: there is no such split, or no such column; ``key`` is where the user named the split.
        """
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        folder = in_home(self.path, "data.path")
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(folder))
            splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            if name not in splits:
                raise ConfigError(
                    f"data.{key}: {self.path!r} has no split {name!r}. {nearest(name, map(str, splits))}{_remedy(key)}"
                )
            rows = splits[name]
        else:
            path = str(folder) if folder.is_dir() else self.path
            files = _at_home(self.data_files)
            try:
                rows = datasets.load_dataset(
                    path, self.name, data_files=files, split=name, streaming=self.streaming, revision=self.revision
                )
            except ValueError as error:
                if "split" in str(error).lower():
                    raise ConfigError(f"data.{key}: {str(error).splitlines()[0]}{_remedy(key)}") from None
                raise
        columns = rows.column_names
        wanted = self.keys.as_dict()
        for key, column in wanted.items():
            if columns is not None and column not in columns:
                raise ConfigError(f"data.{key}: {self.path!r} has no column {column!r}. {nearest(column, columns)}")
        rows = rows.select_columns(list(dict.fromkeys(wanted.values())))
        return rows, len(rows) if isinstance(rows, datasets.Dataset) else None


def _remedy(key: str) -> str:
    return " data.val_split=null validates on the first documents of data.train_split." if key == "val_split" else ""


def _patterns(data_files: DataFiles | None) -> list[str]:
    if data_files is None:
        return []
    if isinstance(data_files, str):
        return [data_files]
    inner = data_files.values() if isinstance(data_files, Mapping) else data_files
    return [pattern for files in inner for pattern in _patterns(files)]


def _home(pattern: str) -> str:
    return str(in_home(pattern, "data.data_files")) if pattern.startswith("~") else pattern


def _at_home(data_files: DataFiles | None) -> Any:
    if data_files is None:
        return None
    if isinstance(data_files, str):
        return _home(data_files)
    if isinstance(data_files, Mapping):
        return {name: _at_home(files) for name, files in data_files.items()}
    return [_home(pattern) for pattern in data_files]


@contextmanager
def _as_config_error(problem: str) -> Iterator[None]:
    """Raise errors of datasets, and of all that it reads with, as ours."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # "An error occurred while generating the dataset" says little
            cause = cause.__cause__
        reason = str(cause).strip().splitlines() or ["no more is known"]
        raise ConfigError(f"{problem}: {type(cause).__name__}: {reason[0].rstrip('.')}.") from None
