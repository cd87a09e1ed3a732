"""Options of a trainer, by concern, fixed for the run; names are those of the keys of ``trainer``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from apt_model.training.device import Precision
from apt_model.training.parallel import Parallel


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How long a run is, what makes an update, and what is logged of it.

    Args:
        max_epochs: epochs to train.
        batch_size: sequences a batch, of all ranks together.
        lr_schedule: an anneal of the factor on the optimizer's learning rate; None: the rate is that of the optimizer, or
            of a curriculum that writes ``optimizer.lr``.
        seed: of the order of training's batches, and of the votes in validation; its batches are the same for all seeds.
        max_batches_per_epoch: None: all that the corpus gives.
        accumulate: batches an update.
        grad_clip: largest norm of the gradient; None: no limit.
        qk_clip: largest logit of an attention head, see :class:`apt_model.training.qk_clip.QKClip`; None: no limit.
        weight_decay: of matrices; vectors do not decay.
        log_every: updates between rows.
        validation_batches: batches of the validation split, the same each time; None: all.
        seq_len: tokens of a sequence; None: the model's ``seq_len``.
        ema: decay of an exponential average of the weights, which checkpoints keep beside them; None: there is none.
    """

    max_epochs: int
    batch_size: int
    lr_schedule: Mapping[str, Any] | None
    seed: int = 0
    max_batches_per_epoch: int | None = None
    accumulate: int = 1
    grad_clip: float | None = 1.0
    qk_clip: float | None = None
    weight_decay: float = 0.0
    log_every: int = 10
    validation_batches: int | None = None
    seq_len: int | None = None
    ema: float | None = None

    @property
    def largest_norm(self) -> float:
        """The largest norm of the gradient, infinite where there is no limit."""
        return math.inf if self.grad_clip is None else self.grad_clip


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Where and in what precision a model is computed, and how ranks share it.

    Args:
        precision: ``auto`` is bf16 or, where the device has none, fp16 on CUDA, and fp32 on the CPU.
        device: ``auto`` is CUDA where there is a device.
        parallel: how ranks share the model: ``ddp``, each has all of it, or ``fsdp``, each has a part of every layer.
        expert_parallel: ranks that share one set of experts, with ``fsdp``.
        compile: whether torch.compile makes graphs of the model's parts for training; validation goes without.
        activation_checkpointing: whether the backward pass computes blocks again, so that only their inputs are kept.
    """

    precision: Precision = "auto"
    device: str = "auto"
    parallel: Parallel = "ddp"
    expert_parallel: int = 1
    compile: bool = False
    activation_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When a checkpoint is written.

    Args:
        checkpoint_every_epochs: epochs between checkpoints; the last epoch always has one.
        checkpoint_every_minutes: minutes of training after which there is one in the middle of an epoch, too; None: none.
    """

    checkpoint_every_epochs: int = 1
    checkpoint_every_minutes: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training between checkpoints, infinite where time does not matter."""
        return 60 * self.checkpoint_every_minutes if self.checkpoint_every_minutes else math.inf


@dataclass(frozen=True, kw_only=True)
class NonFinitePolicy:
    """What follows a loss or gradient that is not finite.

    Args:
        on_nonfinite: ``stop``, ``skip`` the update, or ``rollback``, which stops here and is the caller's to do.
        leave_out: updates that are not made, (epoch, first batch): what rollbacks found.
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    leave_out: frozenset[tuple[int, int]] = frozenset()


CONCERNS = {
    "loop": LoopOptions,
    "compute": ComputeOptions,
    "saving": CheckpointOptions,
    "nonfinite": NonFinitePolicy,
}
"""The arguments of a trainer that hold options."""


def by_concern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for :class:`~apt_model.training.base.BaseTrainer` from one flat mapping; keys of others are left out."""
    return {
        name: kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
        for name, kind in CONCERNS.items()
    }
