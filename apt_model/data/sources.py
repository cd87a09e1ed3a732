"""Where the tokens of a split come from: a folder, a file, or what a document says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST: Final = 16
"""Sources kept apart; the smaller ones beyond are one, :data:`OTHERS`."""

OTHERS: Final = "others"


class Run(NamedTuple):
    """Tokens in a row that come from one source."""

    source: str
    tokens: int


class Sources:
    """The source of each token.

    Args:
        runs: of all tokens, in order.
        most: sources kept apart, those with most tokens; the others are one.
    """

    def __init__(self, runs: Sequence[Run], most: int = MOST) -> None:
        import numpy as np

        tokens: Counter[str] = Counter()
        for source, number in runs:
            tokens[source] += number
        largest = sorted(tokens, key=lambda source: (-tokens[source], source))
        kept = sorted(largest) if len(tokens) <= most else sorted(largest[: most - 1])
        self.names = kept if len(tokens) <= most else [*kept, OTHERS]
        number_of = {name: number for number, name in enumerate(kept)}
        self._ends = np.cumsum([run.tokens for run in runs], dtype=np.int64)
        self._numbers = np.array([number_of.get(run.source, len(kept)) for run in runs], dtype=np.int64)

    def of(self, begins: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Return the sources of ``length`` tokens from each of ``begins`` on, as places in ``names``: (len(begins), length)."""
        import numpy as np

        places = begins[:, None] + np.arange(length)
        found: NDArray[np.int64] = self._numbers[self._ends.searchsorted(places, side="right")]
        return found


def joined(runs: Iterable[Run]) -> list[Run]:
    """Return ``runs`` with neighbours of the same source as one."""
    found: list[Run] = []
    for run in runs:
        if found and found[-1].source == run.source:
            run = Run(run.source, found.pop().tokens + run.tokens)
        found.append(run)
    return found


def sources_of(files: Sequence[Path], root: Path) -> list[str]:
    """Return the source of each file below ``root``: the folder there that it is in, or ``.`` for those in none.

    Where none is in a folder, each file is a source.
    """
    parts = [path.relative_to(root).parts for path in files]
    if all(len(names) == 1 for names in parts):
        return [name for (name,) in parts]
    return [names[0] if len(names) > 1 else "." for names in parts]
