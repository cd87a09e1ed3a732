"""Rotary positions: pairs of channels of queries and keys turn by angles that grow with the position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Return the angles in radians by which pairs of channels turn from one position to the next, (head_dim / 2,).

    Args:
        theta: the longest wavelength in positions, over 2 pi.
        scaling: how a model came to longer texts than it was first trained on: ``rope_type`` ``linear``, all angles over
            ``factor`` (arXiv:2306.15595), or ``llama3``, only those of waves longer than ``original_max_position_embeddings``
            over ``low_freq_factor``, with a smooth passage to those shorter than it over ``high_freq_factor``
            (arXiv:2407.21783). None: none.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    turn: Tensor = 1.0 / theta**exponents  # written so, no bit differs from what other libraries compute
    if scaling is None:
        return turn
    slowed: Tensor = turn / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slowed
    low, high, length = (
        scaling[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    waves = 2 * math.pi / turn
    share = (length / waves - low) / (high - low)
    between = (1 - share) * slowed + share * turn
    return torch.where(waves > length / low, slowed, torch.where(waves < length / high, turn, between))


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position. Source: RoFormer, arXiv:2104.09864."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, seq_len: int, theta: float = 10_000.0, scaling: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies(head_dim, theta, scaling))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (seq_len, head_dim / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, qkv: Tensor, start: int | Tensor = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys.

        Args:
            qkv: (batch, seq, 3, heads, head_dim).
            start: the first position, or all of them (batch, seq); the last < seq_len.

        Returns:
            Queries, keys and values, each (batch, heads, seq, head_dim).
        """
        cos, sin = self._angles(qkv, start)
        if torch.compiler.is_compiling():
            query, key, value = qkv.unbind(2)
            query, key = _turned(query, cos, sin), _turned(key, cos, sin)
        else:
            query, key, value = _Turn.apply(qkv, torch.cat((cos, cos), dim=-1), sin)  # type: ignore[no-untyped-call]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def turn(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """Rotate ``x`` (batch, seq, heads, head_dim), whose first position, or all (batch, seq), are ``start``."""
        cos, sin = self._angles(x, start)
        if torch.compiler.is_compiling():
            return _turned(x, cos, sin)
        turned: Tensor = _TurnAll.apply(x, torch.cat((cos, cos), dim=-1), sin)  # type: ignore[no-untyped-call]
        return turned

    def _angles(self, x: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines at the positions of ``x`` (batch, seq, ...): (seq or batch, seq, 1, head_dim / 2) each."""
        here = start if isinstance(start, Tensor) else slice(start, start + x.shape[1])
        return self.cos[here].to(x.dtype).unsqueeze(-2), self.sin[here].to(x.dtype).unsqueeze(-2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Turn(torch.autograd.Function):
    """Turns pairs (channel i, channel i + half) of queries and keys by angles, and gradients back; only angles are kept."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        query, key = torch.empty_like(qkv[:, :, 0]), torch.empty_like(qkv[:, :, 1])
        _turn(qkv[:, :, 0], cos, sin, out=query)
        _turn(qkv[:, :, 1], cos, sin, out=key)
        return query, key, qkv[:, :, 2]

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        back = -sin
        grad = query.new_empty(*query.shape[:2], 3, *query.shape[2:])
        _turn(query, cos, back, out=grad[:, :, 0])
        _turn(key, cos, back, out=grad[:, :, 1])
        grad[:, :, 2] = value
        return grad, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write ``x`` (batch, seq, heads, head_dim), turned; ``cos`` is of all channels, ``sin`` of a half."""
    torch.mul(x, cos, out=out)
    (first, second), (one, other) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    one.addcmul_(second, sin, value=-1)
    other.addcmul_(first, sin)


class _TurnAll(torch.autograd.Function):
    """Turns all heads of a tensor, and gradients back; only angles are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _turn(x, cos, sin, out=turned)
        return turned

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        back = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _turn(grad, cos, -sin, out=back)
        return back, None, None
