"""Where a document ends among tokens, by the tokens that mark it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from apt_model.ignored import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

Pack = Literal["document"]
"""How documents share a sequence: ``document``, none sees another. Else a position sees all before it in its sequence."""


class Borders(NamedTuple):
    """Tokens that mark documents: what is behind ``end``, and each ``begin`` itself, begins another one."""

    end: int | None
    begin: int | None = None

    def begins(self, tokens: Tensor) -> Tensor:
        """Return which of ``tokens`` (batch, seq) begin another document than that of the token before."""
        found = tokens != tokens
        if self.end is not None:
            found[:, 1:] |= tokens[:, :-1] == self.end
        if self.begin is not None:
            found[:, 1:] |= tokens[:, 1:] == self.begin
        return found

    def numbers(self, tokens: Tensor) -> Tensor:
        """Return the number of each token's document in its sequence, from 0: (batch, seq) int64."""
        return self.begins(tokens).cumsum(1)

    def targets(self, window: Tensor) -> Tensor:
        """Return the token that follows each but the last of ``window`` (batch, seq + 1); where that is of another document,
        which nothing could predict, :data:`IGNORED`."""
        return window[:, 1:].masked_fill(self.begins(window)[:, 1:], IGNORED)


def split_windows(windows: Tensor, borders: Borders | None) -> tuple[Tensor, Tensor]:
    """Return tokens and the targets that follow them, (batch, seq) each, of ``windows`` (batch, seq + 1)."""
    return windows[:, :-1], windows[:, 1:] if borders is None else borders.targets(windows)


def takes_no_documents(name: str) -> str:
    """Return the message for a model that cannot keep documents of a sequence apart."""
    return (
        f"data.pack: {name} takes no documents, so that those of one sequence would see each other. Give its forward a "
        "parameter documents, (batch, seq): the number of each token's; or set data.pack=null, or model=gpt."
    )
