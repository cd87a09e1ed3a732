"""Causal self-attention with rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.layers.scheduled import dropout
from apt_model.schedule.targets import BELOW_ONE, Domain


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention through torch's fused kernels.

    Args:
        query: (batch, heads, seq, head_dim); key and value have the same shape.

    Returns:
        The same shape.
    """
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention written out, quadratic in memory: the reference for :func:`sdpa`, with its shapes."""
    length = query.shape[-2]
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ value


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"sdpa": sdpa, "eager": eager}


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

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``x`` of (batch, heads, seq, head_dim), whose positions count from 0; seq <= seq_len."""
        length = x.shape[-2]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, seq, d_model) to the same shape; position t sees positions 0 to t."""
        batch, length, d_model = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = self.attend(self.rotate(query), self.rotate(key), value)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, d_model))
        if self.training and "dropout" in self.expected:
            return dropout(output, self.dropout)
        return output
