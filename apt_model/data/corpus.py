"""What a corpus is: documents of text in two splits, and the tokens that they are made of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from apt_model.data.borders import Borders, Pack
from apt_model.data.tokenizer import Tokenizer
from apt_model.data.tokens import Tokens

Split = Literal["train", "val"]

OnProgress = Callable[[str, float, int], None]
"""Called as tokens are made, with the split, the share of its text that is done (nan: unknown), and its tokens so far."""


class Document(NamedTuple):
    """A text; with it, ``done`` of its split has been read, from 0 to 1; nan where that is unknown."""

    text: str
    done: float
    source: str = ""  # where it comes from; empty: unknown


class Corpus(ABC):
    """Text in two splits, as the tokens of ``tokenizer``."""

    on_progress: OnProgress = staticmethod(lambda split, done, tokens: None)
    pack: Pack | None = None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many tokens are possible."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """What the tokens mean."""

    @property
    @abstractmethod
    def tokenizer_file(self) -> Path | None:
        """The file of ``tokenizer``; None: tokens are bytes."""

    @abstractmethod
    def count(self, split: Split) -> int:
        """Return the number of tokens of ``split``.

        Raises:
            ConfigError: a file is missing, empty or unreadable.
        """

    @abstractmethod
    def read(self, split: Split) -> Tokens:
        """Return the tokens of ``split``.

        Raises:
            ConfigError: as :meth:`count`, or a file is not UTF-8.
        """

    @property
    def borders(self) -> Borders | None:
        """What marks documents that do not see each other; None: they do.

        Raises:
            ConfigError: nothing is known to mark them.
        """
        return None if self.pack is None else self._borders()

    def _borders(self) -> Borders:
        return Borders(self.tokenizer.end)

    def check(self) -> None:  # noqa: B027 - most have nothing to check
        """Make sure that what training will read is what was once written; needs no torch.

        Raises:
            ConfigError: it is not.
        """


class Documents(Protocol):
    """What shards are made of."""

    max_tokens: int | None  # of a split

    @property
    def begin(self) -> int | None:
        """The token that each document begins with; None: none."""

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the documents of ``split``, always the same in the same order."""

    def source(self) -> dict[str, Any]:
        """Return, as plain values, all that decides what the documents are."""


def share(done: float, of: float | None) -> float:
    """Return the share ``done`` of all, at most 1; nan where all is unknown."""
    return min(1.0, done / of) if of else math.nan
