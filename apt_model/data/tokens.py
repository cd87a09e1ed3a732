"""Tokens in one or more arrays, read as one."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from apt_model.data.sources import Run, Sources

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Tokens:
    """Arrays of unsigned integers, one after the other; those that are memory-mapped are never loaded as a whole.

    Args:
        parts: 1-dim each, none empty.
        maps: the files that they are in, one for each; none: they are in memory.
        sources: where all tokens come from, in order; none: unknown.
    """

    def __init__(
        self, parts: Sequence[NDArray[Any]], maps: Sequence[mmap.mmap] = (), sources: Sequence[Run] = ()
    ) -> None:
        import numpy as np

        self.parts = list(parts)
        self.maps = list(maps)
        self.sources = Sources(sources) if sources else None
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.parts else 0

    def windows(self, begins: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return ``length`` tokens from each of ``begins`` on: (len(begins), length) int64."""
        import numpy as np

        found = np.empty((len(begins), length), dtype=np.int64)
        part_of = self.ends.searchsorted(begins, side="right")
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

    def expect(self, begins: NDArray[np.int64], length: int) -> None:
        """Have the system fetch, meanwhile, what :meth:`windows` will be asked for: a slow disk holds up no step."""
        if not self.maps:
            return
        part_of = self.ends.searchsorted(begins, side="right")
        for begin, number in zip(begins.tolist(), part_of.tolist(), strict=True):
            part = self.parts[number]
            first = (begin - int(self.ends[number]) + len(part)) * part.itemsize
            page = first - first % mmap.PAGESIZE
            self.maps[number].madvise(mmap.MADV_WILLNEED, page, first + length * part.itemsize - page)

    def array(self) -> NDArray[Any]:
        """Return all of them in one array, in memory."""
        import numpy as np

        return np.concatenate(self.parts) if self.parts else np.empty(0, dtype=np.uint8)
