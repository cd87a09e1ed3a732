"""The updates of a run from which other runs begin."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Forks:
    """Where others begin, who still needs that, and who wants to know.

    Args:
        updates: before which a checkpoint is written.
        needed: returns those whose checkpoint is to stay for now.
        reached: called with the step of each checkpoint that was written.
    """

    updates: frozenset[int] = frozenset()
    needed: Callable[[], Collection[int]] = lambda: ()
    reached: Callable[[int], None] = lambda step: None


NO_FORKS: Final = Forks()
