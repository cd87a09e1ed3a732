"""The training loop."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from apt_model.errors import Interrupted, NonFiniteError
from apt_model.schedule import Change, Clock
from apt_model.training.base import BaseTrainer, Batch
from apt_model.training.distributed import average_buffers
from apt_model.training.optimizer import load_named_state
from apt_model.training.randomness import restore_random_state
from apt_model.training.saved_state import read_state
from apt_model.training.schedule_driver import restore_model

logger = logging.getLogger(__name__)

MOST_SKIPPED = 20
"""Updates in a row that may be skipped because they are not finite."""


class Trainer(BaseTrainer):
    """Trains a model through its curriculum: one loop, read from top to bottom. Arguments: see :class:`BaseTrainer`.

    In a process group every rank takes an equal share of each batch, and the gradient is the mean of theirs, however they
    share the model (:mod:`apt_model.training.parallel`); ``batch_size`` and the clock count the whole. Capacities are those
    of a rank's share, as is usual, and so are balance losses unless the ``balance_scope`` of a layer is ``global``. Every
    rank validates on all batches, so that the loss is the one of a single process; the first rank alone writes.
    """

    can_resume: ClassVar[bool] = True
    shares_batches: ClassVar[bool] = True
    may_read_late: ClassVar[bool] = True
    _given_up = 0  # updates in a row

    def fit(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            Interrupted: ``stop_requested`` said so; the update was finished and a checkpoint written.
            TrainingError: the run cannot continue.
        """
        if self.resume is not None:
            self.load(self.resume)
        self.engine.settle()
        self.callbacks.notify("on_train_begin", self)
        try:
            for epoch in range(self.clock.epoch, self.max_epochs):
                self.callbacks.notify("on_epoch_begin", self)
                for batches in self._updates(epoch):
                    if (epoch, self.batches_done) in self.nonfinite.leave_out:
                        self.leave_out_update(batches)
                        continue
                    self.begin_update()
                    try:
                        skipped = self.step(batches) is None
                    except NonFiniteError as error:
                        self.give_up_update(batches, error)
                        continue
                    if skipped:
                        self.skip_update()
                    else:
                        self.end_update()
                        self._given_up = 0
                    self._stop_if_requested()
                self.end_epoch()
                self._stop_if_requested()
        finally:
            self.callbacks.notify("on_train_end", self)

    def _updates(self, epoch: int) -> Iterator[list[Batch]]:
        """Yield the batches of one update after another, from where the epoch stands."""
        batches = self.train_batches.epoch(epoch, start=self.batches_done, device=self.device)
        while update := list(itertools.islice(batches, self.accumulate)):
            yield [(self.ranks.share(tokens), self.ranks.share(targets)) for tokens, targets in update]

    def begin_update(self) -> list[Change]:
        """As every trainer does; ranks share what is new as they share the rest."""
        changes = super().begin_update()
        if changes:
            self.engine.settle()
        return changes

    def step(self, batches: list[Batch]) -> Tensor | None:
        """Forward, backward and one update on ``batches``; return the gradient's norm, None if mixed precision skipped it.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; the weights are those before the update.
        """
        self.look_ahead(batches)
        for number, (tokens, targets) in enumerate(batches, start=1):
            with self.engine.batch(last=number == len(batches)):
                loss = self.scaler.scale(self.loss_of(tokens, targets) / len(batches))
                loss.backward()  # type: ignore[no-untyped-call]
            self.callbacks.notify("on_batch_end", self)
        average_buffers(self.model)
        self.scaler.unscale_(self.optimizer)
        norm = self.clip(scaled=self.scaler.is_enabled())
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return None if self.scaler.get_scale() < scale else norm

    def leave_out_update(self, batches: list[Batch]) -> None:
        """Continue without the update of ``batches``."""
        logger.warning("%s: the update of batch %d is left out", self.clock, self.batches_done)
        self.batches_done += len(batches)
        self.updates_skipped += 1

    def give_up_update(self, batches: list[Batch], error: NonFiniteError) -> None:
        """Continue with the weights from before an update that is not finite, where ``on_nonfinite`` says so.

        Raises:
            NonFiniteError: it does not, or this one was the last of too many in a row.
        """
        self._given_up += 1
        if self.nonfinite.on_nonfinite != "skip":
            raise error
        if self._given_up > MOST_SKIPPED:
            raise NonFiniteError(f"{MOST_SKIPPED} updates in a row were skipped, and still {error}")
        logger.warning("skipped an update: %s", str(error).split(". The last checkpoint")[0])
        self.engine.rest()
        self.optimizer.zero_grad(set_to_none=True)
        self.batches_done += len(batches) - self.meter.num_batches  # those that were not tried
        self.skip_update()

    def _stop_if_requested(self) -> None:
        if self.asked_to_stop():
            raise Interrupted(f"stopped on request before {self.clock}")

    def load(self, path: Path) -> None:
        """Resume from the checkpoint in ``path``: the weights of its time first, then what the clock says now.

        Raises:
            CheckpointError: it is missing or damaged.
            ConfigError: it was made for another model, or for another length of the run.
        """
        state = read_state(path)
        restore_model(self.model, self.schedule, state, switches=self.engine.switches(), resize=self.engine.resize)
        self._lr_factor = self._lay_out_lr()
        load_named_state(self.optimizer, self.model, state["optimizer"])
        self.schedule.reconcile()
        self.follow()
        if state["scaler"]:  # what the checkpoint was made with may have needed none
            self.scaler.load_state_dict(state["scaler"])
        self.clock = Clock(**state["clock"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        self._saved_at = self.seconds
        if self.average is not None:
            self.average.load(state.get("ema", {}))
        self.callbacks.load_state_dict(state.get("callbacks", {}))
        ranks = state["random"]
        restore_random_state(ranks[self.ranks.rank if self.ranks.rank < len(ranks) else 0], self.device)
