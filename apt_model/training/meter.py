"""The numbers of updates: collected on the device, read together where a row needs them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apt_model.errors import NonFiniteError
from apt_model.gpt import Output
from apt_model.layers.tally import routing_metrics
from apt_model.schedule import Clock
from apt_model.training.distributed import Ranks, mean_of
from apt_model.training.subject import expert_cosines

Row = dict[str, float]


class PendingUpdate(NamedTuple):
    """An update whose numbers were not read yet: its losses and the norm of its gradient, 0-dim, on the device."""

    clock: Clock
    loss: Tensor
    auxiliary: Tensor
    norm: Tensor
    scaled: bool  # whether a norm that is not finite is mixed precision's business


class Meter:
    """Collects losses, gradient norms, routing and time of updates, and makes the numbers of a row from them.

    Nothing waits for the device before :meth:`read`.

    Args:
        reads_every_update: whether each update's numbers have to be known before the next one.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, *, reads_every_update: bool) -> None:
        self.model = model
        self.ranks = ranks
        self.reads_every_update = reads_every_update
        self.last_loss = torch.tensor(math.nan)  # of the last update, 0-dim; to read it waits for the device
        self.has_row = False  # whether the current update gets one
        self.with_metrics = False  # whether the model is asked for metrics of routing
        self.in_full = False  # whether those of each layer, and of the experts' weights, are wanted, too
        self._began = 0.0
        self._losses: list[Tensor] = []  # of the batches of the current update, as the next three
        self._auxiliary: list[Tensor] = []
        self._metrics: list[dict[str, Tensor]] = []
        self._routing: list[Tensor] = []
        self._part_norms: Mapping[str, Tensor] = {}
        self._pending: list[PendingUpdate] = []
        self._numbers: Row = {}  # of the last update that was read
        self._tokens, self._seconds = 0, 0.0  # since the last row

    def begin_update(self, *, has_row: bool, with_metrics: bool, in_full: bool) -> None:
        """Forget the batches of the update before; see the attributes for what is wanted of this one."""
        self._losses, self._auxiliary, self._metrics, self._routing = [], [], [], []
        self._part_norms = {}
        self.has_row, self.with_metrics, self.in_full = has_row, with_metrics, in_full
        self._began = time.perf_counter()

    def add_batch(self, output: Output, weight: Tensor | None = None) -> None:
        """Record a forward pass.

        Args:
            weight: 0-dim; how much it counts, 1 in the mean over an update; None: as much as the others.
        """
        assert output.language_loss is not None
        loss, auxiliary, metrics = output.language_loss.detach(), output.auxiliary_loss.detach(), output.metrics
        if weight is not None:
            loss, auxiliary = loss * weight, auxiliary * weight
            metrics = {name: value * weight for name, value in metrics.items()}
        self._losses.append(loss)
        self._auxiliary.append(auxiliary)
        self._metrics.append(metrics)
        if output.routing is not None:
            self._routing.append(output.routing)

    @property
    def num_batches(self) -> int:
        """Batches of the current update."""
        return len(self._losses)

    def add_norm(self, clock: Clock, norm: Tensor, *, scaled: bool) -> None:
        """Record the gradient's norm, 0-dim: the update's numbers are all there.

        Args:
            scaled: whether mixed precision scales gradients and skips an update whose gradients overflowed.
        """
        losses, auxiliary = torch.stack(self._losses).mean(), torch.stack(self._auxiliary).mean()
        self.last_loss = losses
        self._pending.append(PendingUpdate(clock, losses, auxiliary, norm, scaled))

    def add_part_norms(self, norms: Mapping[str, Tensor]) -> None:
        """Record the norms of the gradients of the model's parts, 0-dim each."""
        self._part_norms = norms

    def read(self) -> None:
        """Read the numbers of updates that were made since the last call, all at once.

        Raises:
            NonFiniteError: those of one are not finite.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        stacked = torch.stack([torch.stack([update.loss, update.auxiliary]).float() for update in pending])
        losses = self._mean({"losses": stacked})["losses"]
        norms = torch.stack([update.norm.float() for update in pending]).unsqueeze(1)
        for update, (loss, auxiliary, norm) in zip(pending, torch.cat([losses, norms], dim=1).tolist(), strict=True):
            where = f"at {update.clock}"
            if not math.isfinite(loss + auxiliary):
                raise NonFiniteError(
                    f"the loss is {loss + auxiliary} {where} (language model {loss:g}, auxiliary {auxiliary:g}). The last "
                    "checkpoint is from before it. Try a lower optimizer.lr, a longer trainer.lr_schedule.warmup or "
                    "trainer.precision=fp32."
                )
            if not math.isfinite(norm) and not update.scaled:
                raise NonFiniteError(
                    f"the gradient's norm is {norm} {where}, its loss {loss + auxiliary:g}. The last checkpoint is from "
                    "before it. Try a lower optimizer.lr or trainer.precision=fp32."
                )
            self._numbers = {"train/loss": loss, "train/auxiliary_loss": auxiliary, "train/grad_norm": norm}

    def numbers(self) -> Row:
        """Return losses and the gradient's norm of the last update that was read, by name."""
        return self._numbers

    def model_metrics(self) -> Row:
        """Return the model's metrics: means over the update's batches, and what the sums of their routing give."""
        names = self._metrics[-1]
        means = {name: torch.stack([metrics[name] for metrics in self._metrics]).mean() for name in names}
        row = {name: value.item() for name, value in self._mean(means).items()}
        row |= {f"train/grad_norm/{part}": norm.item() for part, norm in self._part_norms.items()}
        if not self._routing:
            return row
        sums = torch.stack(self._routing).sum(dim=0)
        sums = self._mean({"routing": sums})["routing"]
        if self.in_full:
            cosines = self._mean({"cosines": expert_cosines(self.model)})["cosines"]
            return row | routing_metrics(sums, cosines.float())
        return row | {name: value for name, value in routing_metrics(sums).items() if "/layer_" not in name}

    def elapsed(self) -> float:
        """Return the seconds since the update began."""
        return time.perf_counter() - self._began

    def add_work(self, *, tokens: int, seconds: float) -> None:
        """Count what an update took."""
        self._tokens += tokens
        self._seconds += seconds

    def take_speed(self) -> Row:
        """Return tokens a second since the last call, by name."""
        tokens, seconds = self._tokens, self._seconds
        self._tokens, self._seconds = 0, 0.0
        return {"tokens_per_second": tokens / seconds}

    def _mean(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``values`` as their means over ranks that share batches."""
        return values if self.ranks.world == 1 else mean_of(values)
