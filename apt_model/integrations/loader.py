"""Batches in the shape that other libraries' loops want their loaders in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from apt_model.data.batches import Batches


class EpochLoader:
    """Each epoch's batches in their own order.

    Args:
        as_mapping: batches are ``{"tokens": ..., "targets": ...}``, not (tokens, targets); both (batch, seq) int64.
    """

    def __init__(self, batches: Batches, device: torch.device, *, as_mapping: bool = False) -> None:
        self.batches = batches
        self.device = device
        self.as_mapping = as_mapping
        self._epoch = 0

    @property
    def sampler(self) -> EpochLoader:
        """What is told the epoch, for libraries that look for it here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for tokens, targets in self.batches.epoch(self._epoch, device=self.device):
            yield {"tokens": tokens, "targets": targets} if self.as_mapping else (tokens, targets)
