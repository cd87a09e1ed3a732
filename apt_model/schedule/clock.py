"""The clock of a training run, and how far it will go."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from apt_model.errors import ConfigError

Unit = Literal["epoch", "step", "sample", "token"]


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
    """The planned length of a run: ``epochs`` of ``updates_per_epoch`` optimizer updates each.

    Samples and tokens can be reckoned with only where the rest is given, too: the last update of an epoch may take fewer
    samples than ``samples_per_update``.
    """

    epochs: int
    updates_per_epoch: int
    samples_per_update: int | None = None
    samples_per_epoch: int | None = None
    tokens_per_sample: int | None = None

    @classmethod
    def plan(
        cls,
        *,
        epochs: int,
        batches_per_epoch: int,
        accumulate: int = 1,
        batch_size: int | None = None,
        tokens_per_sample: int | None = None,
    ) -> Horizon:
        """Plan epochs x ceil(batches / accumulate) updates: the last update of an epoch may take fewer batches."""
        return cls(
            epochs=epochs,
            updates_per_epoch=math.ceil(batches_per_epoch / accumulate),
            samples_per_update=batch_size * accumulate if batch_size else None,
            samples_per_epoch=batch_size * batches_per_epoch if batch_size else None,
            tokens_per_sample=tokens_per_sample,
        )

    @property
    def steps(self) -> int:
        """Planned updates of the whole run."""
        return self.epochs * self.updates_per_epoch

    def clock_at(self, step: int) -> Clock:
        """Return the planned clock of update ``step``; samples and tokens stay 0 where they are not known."""
        epoch, within = divmod(step, self.updates_per_epoch)
        sample = 0
        if self.samples_per_epoch is not None and self.samples_per_update is not None:
            sample = epoch * self.samples_per_epoch + min(within * self.samples_per_update, self.samples_per_epoch)
        return Clock(epoch=epoch, step=step, sample=sample, token=sample * (self.tokens_per_sample or 0))

    def length(self, unit: Unit) -> int:
        """Return how many of ``unit`` the run takes.

        Raises:
            ConfigError: the horizon does not know samples or tokens.
        """
        return self.epochs if unit == "epoch" else self._count(self.clock_at(self.steps), unit)

    def last(self, unit: Unit) -> int:
        """Return what the clock shows in ``unit`` at the last update."""
        return self._count(self.clock_at(self.steps - 1), unit)

    def first_step(self, amount: Fraction, unit: Unit) -> int:
        """Return the first planned update at which the clock shows ``amount`` of ``unit`` or more."""
        if unit == "step":
            return math.ceil(amount)
        if unit == "epoch":
            return math.ceil(amount * self.updates_per_epoch)
        self.length(unit)  # refuses what is not known
        assert self.samples_per_epoch is not None
        assert self.samples_per_update is not None
        samples = math.ceil(amount / (self.tokens_per_sample or 1) if unit == "token" else amount)
        epoch, within = divmod(samples, self.samples_per_epoch)
        return epoch * self.updates_per_epoch + math.ceil(within / self.samples_per_update)

    def _count(self, clock: Clock, unit: Unit) -> int:
        known = {
            "epoch": True,
            "step": True,
            "sample": self.samples_per_update is not None,
            "token": self.samples_per_update is not None and self.tokens_per_sample is not None,
        }
        if not known[unit]:
            raise ConfigError(
                f"a time in {unit}s cannot be ordered here: the horizon does not say how many {unit}s an update takes. Give "
                "Horizon samples_per_update, samples_per_epoch and tokens_per_sample, or use epochs, steps or a share."
            )
        count: int = getattr(clock, unit)
        return count

    def __str__(self) -> str:
        return f"{self.epochs} epochs x {self.updates_per_epoch} updates = {self.steps} steps"
