"""Causal self-attention with rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.layers.scheduled import dropout
from apt_model.schedule.targets import BELOW_ONE, Domain


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention through torch's fused kernels.

    Args:
        query: (batch, heads, seq, head_dim).
        key, value: (batch, heads, keys, head_dim), keys >= seq: the last query is at the position of the last key.

    Returns:
        The shape of ``query``.
    """
    if query.shape[-2] == key.shape[-2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=~_future(query, key))


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention written out, quadratic in memory: the reference for :func:`sdpa`, with its shapes."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return scores.masked_fill(_future(query, key), -math.inf).softmax(dim=-1) @ value


def _future(query: Tensor, key: Tensor) -> Tensor:
    """Return (seq, keys): whether a key comes after a query."""
    queries, keys = query.shape[-2], key.shape[-2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(1 + keys - queries)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"sdpa": sdpa, "eager": eager}


class KeyValues:
    """Keys and values of the positions that a layer has seen, each (batch, heads, length, head_dim)."""

    def __init__(self) -> None:
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self.length = 0

    def append(self, key: Tensor, value: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Add positions and return all; ``room``: positions that there will be at most."""
        if self._key is None or self._value is None:
            shape = (*key.shape[:2], room, key.shape[-1])
            self._key, self._value = key.new_empty(shape), value.new_empty(shape)
        here = slice(self.length, self.length + key.shape[-2])
        self._key[:, :, here], self._value[:, :, here] = key, value
        self.length = here.stop
        return self._key[:, :, : here.stop], self._value[:, :, : here.stop]


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position. Source: RoFormer, arXiv:2104.09864."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, seq_len: int, theta: float = 10_000.0) -> None:
        super().__init__()
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)  # (seq_len, head_dim / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, qkv: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys.

        Args:
            qkv: (batch, seq, 3, heads, head_dim).
            start: the first position; the last < seq_len.

        Returns:
            Queries, keys and values, each (batch, heads, seq, head_dim).
        """
        here = slice(start, start + qkv.shape[1])
        cos, sin = (angles[here].to(qkv.dtype)[:, None, None] for angles in (self.cos, self.sin))
        if torch.compiler.is_compiling():
            first, second = qkv[:, :, :2].chunk(2, dim=-1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
            value = qkv[:, :, 2]
        else:
            turned, value = _Turn.apply(qkv, cos, sin)  # type: ignore[no-untyped-call]
        query, key = turned.permute(2, 0, 3, 1, 4)
        return query, key, value.transpose(1, 2)


class _Turn(torch.autograd.Function):
    """Turns pairs (channel i, channel i + half) of queries and keys by angles, and gradients back; only angles are kept."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        turned = qkv.new_empty(*qkv.shape[:2], 2, *qkv.shape[3:])
        _turn(qkv[:, :, :2], cos, sin, out=turned)
        return turned, qkv[:, :, 2]

    @staticmethod
    def backward(ctx: Any, turned: Tensor, value: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = turned.new_empty(*turned.shape[:2], 3, *turned.shape[3:])
        _turn(turned, cos, -sin, out=grad[:, :, :2])
        grad[:, :, 2] = value
        return grad, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    first, second = x.chunk(2, dim=-1)
    for place, one, other, sign in zip(out.chunk(2, dim=-1), (first, second), (second, first), (-1, 1), strict=True):
        torch.mul(one, cos, out=place)
        place.addcmul_(other, sin, value=sign)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention without biases. Source: arXiv:1706.03762.

    Args:
        attention: a name of :data:`ATTENTION`.
        dropout: share of the output's channels that training drops.
    """

    scheduled: ClassVar[dict[str, Domain]] = {"dropout": BELOW_ONE}
    dropout: Tensor

    def __init__(
        self, *, d_model: int, num_heads: int, seq_len: int, attention: str = "sdpa", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer("dropout", torch.tensor(float(dropout)), persistent=False)
        self.expected = {"dropout"} if dropout else set[str]()
        self.num_heads = num_heads
        self.attend = ATTENTION[attention]
        self.rotate = RotaryEmbedding(d_model // num_heads, seq_len)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, seen: KeyValues | None = None) -> Tensor:
        """Map (batch, seq, d_model) to the same shape; position t sees positions 0 to t.

        Args:
            seen: of the positions before those of ``x``, which are added; None: there are none.
        """
        batch, length, d_model = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, -1)
        query, key, value = self.rotate(qkv, seen.length if seen else 0)
        if seen:
            key, value = seen.append(key, value, room=self.rotate.cos.shape[0])
        mixed = self.attend(query, key, value)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, d_model))
        if self.training and "dropout" in self.expected:
            return dropout(output, self.dropout)
        return output
