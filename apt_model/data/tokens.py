"""Tokens in one or more arrays, read as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Tokens:
    """Arrays of unsigned integers, one after the other; those that are memory-mapped are never loaded as a whole.

    Args:
        parts: 1-dim each, none empty.
    """

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        import numpy as np

        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def windows(self, begins: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return ``length`` tokens from each of ``begins`` on: (len(begins), length) int64."""
        import numpy as np

        found = np.empty((len(begins), length), dtype=np.int64)
        part_of = np.searchsorted(self.ends, begins, side="right")
        for row, begin, number in zip(found, begins.tolist(), part_of.tolist(), strict=True):
            part = self.parts[number]
            begin -= int(self.ends[number]) - len(part)
            piece = part[begin : begin + length]
            row[: len(piece)] = piece
            filled = len(piece)
            while filled < length:  # the window goes on in the next part
                number += 1
                piece = self.parts[number][: length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        return found

    def array(self) -> NDArray[Any]:
        """Return all of them in one array, in memory."""
        import numpy as np

        return np.concatenate(self.parts) if self.parts else np.empty(0, dtype=np.uint8)
