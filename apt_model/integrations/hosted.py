"""What the trainers that another library's loop runs have in common: its batches, and how ranks share them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apt_model.schedule import Change
from apt_model.training.base import BaseTrainer
from apt_model.training.distributed import average_buffers, from_rank_zero


class HostedTrainer(BaseTrainer):
    """A trainer whose loop is another library's.

    The library sees one process and one device. Ranks share batches and average gradients as those of
    :class:`apt_model.training.trainer.Trainer` do: the engines of this project support parameters that are added and
    removed, which those of the libraries do not.
    """

    shares_batches: ClassVar[bool] = True

    @property
    def numbered_device(self) -> torch.device:
        """The device with its number, which the libraries want to know."""
        if self.device.type != "cuda":
            return self.device
        number = torch.cuda.current_device() if self.device.index is None else self.device.index
        return torch.device("cuda", number)

    def begin_update(self) -> list[Change]:
        """As every trainer does; ranks share what is new as they share the rest."""
        changes = super().begin_update()
        if changes:
            self.engine.settle()
        if self.looks_ahead:  # the libraries hand out one batch after another
            coming = self.train_batches.epoch(self.clock.epoch, start=self.batches_done, device=self.device)
            share = self.ranks.share
            self.look_ahead([(share(x), share(y)) for x, y in itertools.islice(coming, self.accumulate)])
        return changes

    def clip(self, *, scaled: bool) -> Tensor:
        """As every trainer does, after the update's last backward pass; buffers become what ranks have in the mean."""
        average_buffers(self.model)
        return super().clip(scaled=scaled)


class EpochLoader:
    """This rank's share of each epoch's batches, in their own order.

    Args:
        as_mapping: batches are ``{"tokens": ..., "targets": ...}``, not (tokens, targets); both (batch, seq) int64.
    """

    def __init__(self, owner: BaseTrainer, *, as_mapping: bool = False) -> None:
        self.owner = owner
        self.as_mapping = as_mapping
        self._epoch = 0

    @property
    def sampler(self) -> EpochLoader:
        """Whose ``set_epoch`` is called, for libraries that look for it here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.owner.train_batches)

    def __iter__(self) -> Iterator[Any]:
        share = self.owner.ranks.share
        for whole in self.owner.train_batches.epoch(self._epoch, device=self.owner.device):
            tokens, targets = (share(part) for part in whole)
            yield {"tokens": tokens, "targets": targets} if self.as_mapping else (tokens, targets)


@contextmanager
def as_one_process() -> Iterator[None]:
    """Hide from libraries that look at the environment that this process is one of several ranks."""
    hidden = {name: os.environ.pop(name) for name in _NAMES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)


# --- ranks in the loops of other people -----------------------------------------------------------------------------


def over_ranks(samples: int, tokens: int, world_size: int) -> tuple[int, int]:
    """Return the sums over ranks of what each has counted; all ranks call it. Without a process group ranks count alike."""
    if world_size == 1:
        return samples, tokens
    if not (dist.is_available() and dist.is_initialized()):
        return samples * world_size, tokens * world_size
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    counts = torch.tensor([samples, tokens], dtype=torch.int64, device=device)
    dist.all_reduce(counts)
    samples, tokens = counts.tolist()
    return samples, tokens


def deciding_together(broadcast: Callable[[float], float]) -> Callable[[float], float]:
    """Return ``broadcast`` so that latches of all ranks see what the first one's sees."""
    return broadcast if isinstance(broadcast, _FromRankZero) else _FromRankZero(broadcast)


class _FromRankZero:
    def __init__(self, theirs: Callable[[float], float]) -> None:
        self.theirs = theirs

    def __call__(self, value: float) -> float:
        return from_rank_zero(self.theirs(value))


def trained_parts(model: nn.Module) -> list[tuple[int, bool]]:
    """Return what a library's engine must know of ``model``: its parameters, and which of them train."""
    return [(id(parameter), parameter.requires_grad) for parameter in model.parameters()]
