"""Positions that count: those whose target is no padding and not masked. The others are part of no loss and no metric."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from apt_model.ignored import IGNORED
from apt_model.layers.backend import eager_on_cpu


class Counted(NamedTuple):
    """Which positions count."""

    mask: Tensor  # (batch, seq) bool, or the shape of what the positions are of
    scale: Tensor  # 0-dim float32: all positions over those that count, 1.0 where all do; finite where none does

    @classmethod
    def of(cls, mask: Tensor) -> Counted:
        """Return those where ``mask`` is true."""
        return cls(mask, mask.numel() / mask.sum().clamp(min=1).float())

    def flat(self) -> Counted:
        """Return the same with a mask of one dimension."""
        return self._replace(mask=self.mask.flatten())


def counted_positions(targets: Tensor) -> Counted | None:
    """Return which positions count; None: all do, which is looked up on the CPU.

    Elsewhere that would wait for the device, and in a graph break it.
    """
    mask = targets != IGNORED
    if eager_on_cpu(targets) and bool(mask.all()):
        return None
    return Counted.of(mask)


def mean_over(counted: Counted | None, values: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean of ``values`` (positions, ...) over the positions that count, 0 where there are none.

    Where all count it is ``values.mean()`` to the bit.

    Args:
        dim: the one of positions, if only over that; None: over all.
    """
    if counted is not None:
        mask = counted.mask.view(*counted.mask.shape, *[1] * (values.dim() - counted.mask.dim()))
        values = values.where(mask, 0.0)
    mean = values.mean() if dim is None else values.mean(dim=dim)
    return mean if counted is None else mean * counted.scale
