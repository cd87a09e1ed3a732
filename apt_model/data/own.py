"""Data of the user's own: a class with ``read(split)``, or a data set of rows, as a corpus that the sampler cuts and shuffles."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_model.data.borders import Borders, Pack
from apt_model.data.corpus import Corpus, Split
from apt_model.data.tokenizer import ByteTokenizer, Tokenizer, find_tokenizer, load_tokenizer
from apt_model.data.tokens import Tokens
from apt_model.errors import ConfigError, cause_of
from apt_model.files import in_home

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class OwnCorpus(Corpus):
    """What ``make`` makes, as a corpus.

    That is either an object with ``read(split)``, for ``split`` train and val, which returns tokens: integers in an array, a
    tensor, a list, or rows (a ``torch.utils.data.Dataset``, or anything with a length and rows by number); or, where ``make``
    takes ``split`` itself, the rows of that split. Rows are sequences of ``model.seq_len`` + 1 tokens, and are shuffled whole.

    The object may have ``check()``, called before a run; ``vocab_size``; and ``tokenizer_file``, a tokenizer.json that says
    what the tokens mean. What marks documents, for ``pack``, its ``document_end`` and ``document_begin`` say, tokens or None,
    also on a class or function that takes ``split``; else the tokenizer.

    Args:
        name: of what is made, for errors.
        pack: see :data:`apt_model.data.borders.Pack`.
    """

    def __init__(self, make: Callable[..., Any], name: str, pack: Pack | None = None) -> None:
        self.pack = pack
        self._make = make
        self._name = name
        self._tokens: dict[str, Tokens] = {}

    @cached_property
    def _by_split(self) -> bool:
        return "split" in inspect.signature(self._make).parameters

    @cached_property
    def _source(self) -> Any:
        if self._by_split:
            return None
        source = self._call(self._make)
        if not callable(getattr(source, "read", None)):
            raise ConfigError(
                f"data._target_: {self._name} has neither a method read(split) nor a parameter split. Give it one of them."
            )
        return source

    def _call(self, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except (ConfigError, KeyboardInterrupt):
            raise
        except Exception as error:  # of somebody else's code, which may raise anything
            raise ConfigError(f"data: {self._name} failed: {cause_of(error)}") from error

    @property
    def vocab_size(self) -> int:
        """How many tokens are possible, as the source says; else one more than the largest; of rows 0: nobody knows."""
        said = getattr(self._source, "vocab_size", None)
        if said is not None:
            return int(said)
        splits: tuple[Split, ...] = ("train", "val")
        found = [self.read(split) for split in splits]
        return 1 + max((int(part.max()) for tokens in found for part in tokens.parts), default=-1)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the tokens mean."""
        return load_tokenizer(self.tokenizer_file) if self.tokenizer_file else ByteTokenizer()

    @property
    def tokenizer_file(self) -> Path | None:
        """The file of ``tokenizer``; None: tokens are bytes, as far as anybody knows."""
        said = getattr(self._source, "tokenizer_file", None)
        return None if said is None else find_tokenizer(in_home(said, "data.tokenizer_file"))

    def _borders(self) -> Borders:
        says = getattr(self._make, "func", self._make) if self._by_split else self._source
        end, begin = (getattr(says, name, None) for name in ("document_end", "document_begin"))
        if end is not None or begin is not None:
            return Borders(end, begin)
        if self.tokenizer_file is None:
            raise ConfigError(
                f"data.pack: nobody knows where documents end in the tokens of {self._name}. Give it document_end, the token "
                "that follows each, or document_begin, or tokenizer_file; or set data.pack=null."
            )
        return Borders(self.tokenizer.end, self.tokenizer.begin)

    def count(self, split: Split) -> int:
        """Return the number of tokens of ``split``."""
        return len(self.read(split))

    def read(self, split: Split) -> Tokens:
        """Return the tokens of ``split``, the same each time."""
        if split not in self._tokens:
            found = self._call(self._make, split=split) if self._by_split else self._call(self._source.read, split)
            self._tokens[split] = self._as_tokens(found, split)
        return self._tokens[split]

    def check(self) -> None:
        """Have the source check itself."""
        check = getattr(self._source, "check", None)
        if callable(check):
            self._call(check)

    @property
    def row_tokens(self) -> int | None:
        """Tokens of a row; None: there are no rows."""
        lengths = {tokens.length for tokens in self._tokens.values() if isinstance(tokens, Rows)}
        return min(lengths, default=None)

    def _as_tokens(self, found: Any, split: str) -> Tokens:
        import numpy as np

        if isinstance(found, Tokens):
            return found
        what = f"data: {self._name} gave for {split}"
        if isinstance(found, bytes | bytearray):
            found = np.frombuffer(found, dtype=np.uint8)
        if hasattr(found, "detach"):  # a tensor
            found = found.detach().cpu().numpy()
        if isinstance(found, list | tuple | range) and all(isinstance(token, int) for token in found[:1]):
            found = np.asarray(found)
        if isinstance(found, np.ndarray) and found.ndim == 1:
            if found.dtype.kind not in "iu" or (len(found) and found.min() < 0):
                raise ConfigError(
                    f"{what} an array of {found.dtype} that are no tokens. Tokens are integers from 0 on."
                )
            return Tokens([found] if len(found) else [])
        if hasattr(found, "__len__") and hasattr(found, "__getitem__"):
            if not len(found):
                raise ConfigError(f"{what} no rows.")
            return Rows(found, what)
        raise ConfigError(
            f"{what} something of the type {type(found).__name__}. Give integers in an array, a tensor or a list, or rows by "
            "number."
        )


class Rows(Tokens):
    """Rows of tokens by number, as tokens one after another: window n is row n, and no window has parts of two.

    Args:
        rows: each is a sequence of integers, or a mapping that has one as ``input_ids``.
        what: they are, for errors.
    """

    def __init__(self, rows: Any, what: str) -> None:
        super().__init__([])
        self.rows = rows
        self.what = what
        self.length = len(self._row(0))  # tokens of a row: those of a sequence, and the last one's target

    def __len__(self) -> int:
        return len(self.rows) * (self.length - 1) + 1

    def _row(self, number: int) -> NDArray[Any]:
        import numpy as np

        row = self.rows[number]
        if isinstance(row, dict):
            row = row["input_ids"]
        if isinstance(row, tuple) and len(row) == 1:  # of a TensorDataset
            row = row[0]
        found: NDArray[Any] = np.asarray(row)
        if found.ndim != 1 or found.dtype.kind not in "iu" or len(found) < 2:
            raise ConfigError(
                f"{self.what} row {number} of the shape {found.shape} and type {found.dtype}. A row is a sequence of integers."
            )
        return found

    def windows(self, begins: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return the rows that begin at ``begins``: (len(begins), length) int64."""
        import numpy as np

        found = np.empty((len(begins), length), dtype=np.int64)
        for place, begin in zip(found, begins.tolist(), strict=True):
            row = self._row(begin // (self.length - 1))
            if len(row) != length:
                raise ConfigError(f"{self.what} rows of {len(row)} and of {length} tokens. Make them equal.")
            place[:] = row
        return found

    def array(self) -> NDArray[Any]:
        """Return the tokens of all rows."""
        import numpy as np

        return np.concatenate([self._row(number) for number in range(len(self.rows))])
