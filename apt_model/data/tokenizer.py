"""What tokens mean: bytes of UTF-8, or the vocabulary of a ``tokenizer.json`` (Hugging Face's library tokenizers)."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apt_model.errors import ConfigError
from apt_model.files import read_regular

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

BYTE_VOCABULARY = 256
FILE_NAME = "tokenizer.json"
LONGEST = 1 << 28
"""Bytes of a tokenizer's file at the most."""
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
"""How a document's end is called: ours, then those of others, in the order in which they are looked for."""


class Tokenizer(ABC):
    """Text to tokens and back. ``vocab_size`` tokens are possible; ``end`` is the one that follows every document.

    ``content`` is the text of its file, None for bytes.
    """

    vocab_size: int
    end: int
    begin: int | None = None  # what its library puts before a text; documents have it only if asked for
    content: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integer, little-endian, that holds a token."""
        import numpy as np

        size = next(size for size in (1, 2, 4) if self.vocab_size <= 256**size)
        return np.dtype(f"<u{size}")

    @property
    def fingerprint(self) -> str:
        """The sha256 of its file; ``bytes`` where there is none."""
        return "bytes" if self.content is None else hashlib.sha256(self.content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``."""
        tokens: list[int] = self.encode_all([text])[0].tolist()
        return tokens

    @abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Return the tokens of each of ``texts``, 1-dim, in ``dtype``."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``; what is no text becomes U+FFFD."""

    def num_bytes(self, tokens: NDArray[Any], counted: NDArray[Any]) -> int:
        """Return the bytes of UTF-8 that ``tokens`` stand for where ``counted``, as long, is true.

        What ends a document is a byte, as where bytes are tokens, and what begins one is none. Documents are decoded as wholes,
        for a token may end within a character; one that is cut by an end of ``tokens`` is counted to a few bytes.

        Args:
            tokens: 1-dim, documents one after the other.
            counted: false at most for the first token of a document.
        """
        import numpy as np

        ends = np.flatnonzero(tokens == self.end)
        size = int(counted[ends].sum())
        for begin, end in zip([0, *(ends + 1)], [*ends, len(tokens)], strict=True):
            document = tokens[begin:end].tolist()
            if document and document[0] == self.begin:
                begin, document = begin + 1, document[1:]
            size += len(self.decode(document).encode())
            if document and not counted[begin]:
                size -= len(self.decode(document[:1]).encode())
        return size


class ByteTokenizer(Tokenizer):
    """A token is a byte of UTF-8, and byte 0 follows every document."""

    vocab_size = BYTE_VOCABULARY
    end = 0

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Return the bytes of each of ``texts``."""
        import numpy as np

        return [np.frombuffer(text.encode("utf-8", errors="surrogatepass"), dtype=self.dtype) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``; what is no text becomes U+FFFD."""
        return bytes(tokens).decode("utf-8", errors="replace")

    def num_bytes(self, tokens: NDArray[Any], counted: NDArray[Any]) -> int:
        """Return how many of ``tokens`` are counted: each is a byte."""
        return int(counted.sum())


class FileTokenizer(Tokenizer):
    """The tokenizer that ``content``, the text of a ``tokenizer.json``, describes.

    Texts are text alone: the names of special tokens in them are encoded like any other words, and nothing is added.

    Args:
        name: of the file, in errors.

    Raises:
        ConfigError: it is no tokenizer, or has no token that ends documents.
    """

    def __init__(self, content: str, *, name: str = FILE_NAME) -> None:
        from tokenizers import Tokenizer as Library

        self.content = content
        with _as_config_error(f"data.tokenizer: {name} is no tokenizer"):
            self._library = Library.from_str(content)
            self._library.no_truncation()
            self._library.no_padding()
            self._library.encode_special_tokens = True
            vocabulary = self._library.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocabulary.values(), default=-1) + 1
        end = next((vocabulary[end] for end in ENDS if end in vocabulary), None)
        if end is None:
            raise ConfigError(
                f"data.tokenizer: {name} has no token that ends a document. It needs one of {', '.join(ENDS)}."
            )
        self.end = end
        with _as_config_error(f"data.tokenizer: {name} is no tokenizer"):
            added: list[int] = self._library.encode("", add_special_tokens=True).ids
        self.begin = added[0] if added and added[0] != end else None

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Return the tokens of each of ``texts``; halves of a surrogate pair, which are no text, count as U+FFFD."""
        import numpy as np

        with _as_config_error("data.tokenizer: it cannot make tokens of this text"):
            encodings = self._library.encode_batch_fast([_whole(text) for text in texts], add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``; what is no text becomes U+FFFD."""
        text: str = self._library.decode(list(tokens), skip_special_tokens=False)
        return text


def find_tokenizer(path: Path) -> Path:
    """Return the file that ``path`` names: itself, or the ``tokenizer.json`` in it.

    Raises:
        ConfigError: there is none.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"data.tokenizer: there is no file {str(file)!r} (looked in {Path.cwd()}). Make one from your text: "
            "python -m apt_launch.tokenize OUT --train-tokenizer 8192 data=..., which writes OUT/tokenizer.json."
        )
    return file


def load_tokenizer(file: Path) -> FileTokenizer:
    """Return the tokenizer in ``file``.

    Raises:
        ConfigError: it is no tokenizer.
    """
    about = file.stat()
    return _load(file, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _load(file: Path, size: int, mtime_ns: int) -> FileTokenizer:
    """Load a file once; the last two arguments notice a changed one."""
    return FileTokenizer(read_tokenizer(file), name=str(file))


def read_tokenizer(file: Path) -> str:
    """Return the text of a ``tokenizer.json``, of up to :data:`LONGEST` bytes.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_regular(file, LONGEST).decode("utf-8")
    except (FileNotFoundError, ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.tokenizer: {file} cannot be read: {error}") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Return a byte-level BPE tokenizer (arXiv:1508.07909, on bytes as GPT-2 does it) of ``texts``.

    Any text can be encoded: all 256 bytes are in it. The same texts give the same tokenizer. Where they have too few pairs, the
    vocabulary stays smaller than ``vocab_size``.

    Raises:
        ConfigError: ``vocab_size`` has no room for the bytes and a document's end.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size <= BYTE_VOCABULARY:
        raise ConfigError(
            f"--train-tokenizer = {vocab_size} is too small: bytes and a document's end need {BYTE_VOCABULARY + 1}."
        )
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(map(_whole, texts), trainer)
    return FileTokenizer(library.to_str(pretty=True))


def _whole(text: str) -> str:
    """Return ``text`` with U+FFFD for halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextmanager
def _as_config_error(problem: str) -> Iterator[None]:
    """Raise the library's errors as ours; they are plain Exceptions, or panics, which are not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{problem}: {reason[0].rstrip('.')}.") from None
