"""The clock of a training run, and how far it will go."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Unit = Literal["epoch", "step"]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Optimizer updates that really happened, counted from 0 in four units.

    A batch that only accumulates gradients and an update that mixed precision skipped do not advance it.
    """

    epoch: int = 0
    step: int = 0
    sample: int = 0
    token: int = 0

    def after_update(self, *, samples: int, tokens: int) -> Clock:
        """Return the clock after one update on that many samples and tokens."""
        return replace(self, step=self.step + 1, sample=self.sample + samples, token=self.token + tokens)

    def at_epoch(self, epoch: int) -> Clock:
        """Return the clock at the beginning of ``epoch``."""
        return replace(self, epoch=epoch)

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """The planned length of a run: ``epochs`` of ``updates_per_epoch`` optimizer updates each."""

    epochs: int
    updates_per_epoch: int

    @classmethod
    def plan(cls, *, epochs: int, batches_per_epoch: int, accumulate: int = 1) -> Horizon:
        """Plan epochs x ceil(batches / accumulate) updates: the last update of an epoch may take fewer batches."""
        return cls(epochs=epochs, updates_per_epoch=math.ceil(batches_per_epoch / accumulate))

    @property
    def steps(self) -> int:
        """Planned updates of the whole run."""
        return self.epochs * self.updates_per_epoch

    def length(self, unit: Unit) -> int:
        """Return the number of indices that ``unit`` runs through."""
        return self.epochs if unit == "epoch" else self.steps

    def __str__(self) -> str:
        return f"{self.epochs} epochs x {self.updates_per_epoch} updates = {self.steps} steps"
