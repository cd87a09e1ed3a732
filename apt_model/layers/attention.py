"""Causal self-attention with rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apt_model.layers.backend import eager_on_cpu, mkl_products, onednn_multiplies
from apt_model.layers.scheduled import dropout
from apt_model.schedule.targets import BELOW_ONE, Domain

aten = torch.ops.aten

QUERIES = 128
"""Of one sequence, whose scores :class:`_OnCPU` holds at a time."""

ROWS = 4096
"""Queries of all sequences and heads, whose scores it holds at a time."""


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention through torch's fused kernels.

    Args:
        query: (batch, heads, seq, head_dim).
        key, value: (batch, heads, keys, head_dim), keys >= seq: the last query is at the position of the last key.

    Returns:
        The shape of ``query``.
    """
    if query.shape[-2] == key.shape[-2]:
        if eager_on_cpu(query) and torch.is_grad_enabled() and _products_are_fast(query.dtype):
            output: Tensor = _OnCPU.apply(query, key, value)  # type: ignore[no-untyped-call]
            return output
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=~_future(query, key))


def _products_are_fast(dtype: torch.dtype) -> bool:
    """Return whether oneDNN does products in ``dtype``, in bf16 by the processor's instructions for it."""
    if dtype == torch.bfloat16:
        there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and onednn_multiplies(dtype)


class _OnCPU(torch.autograd.Function):
    """Torch's fused kernel with a backward pass of its own: that one's is slow where oneDNN does products on the CPU.

    Scores are computed again, a group of queries at a time, against the keys that it sees.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with mkl_products():
            output, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=True)
        ctx.save_for_backward(query, key, value, log_sum)
        mixed: Tensor = output
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors  # once: reading them may compute them again
        query = saved[0]
        batch, heads, length, _ = query.shape
        grads = tuple(torch.empty(query.shape, dtype=query.dtype) for _ in range(3))
        at_once = max(1, ROWS // (heads * min(QUERIES, length)))
        for begin in range(0, batch, at_once):
            some = slice(begin, begin + at_once)
            _attention_backward(
                *(tensor[some].flatten(0, 1) for tensor in (grad, *saved)),
                *(tensor[some].flatten(0, 1) for tensor in grads),
            )
        return grads  # type: ignore[return-value]


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_sum: Tensor, by_q: Tensor, by_k: Tensor, by_v: Tensor
) -> None:
    """Write the gradients of causal attention to the last three; all are (sequences, length, head_dim), contiguous.

    Args:
        log_sum: (sequences, length): of the exponentials of each query's scores.
    """
    length, scale = q.shape[1], 1 / math.sqrt(q.shape[2])
    less = log_sum.to(q.dtype).neg_().unsqueeze(2)  # scores near 0, where 16 bits are most exact
    for begin in reversed(range(0, length, QUERIES)):  # the last queries see all keys: they write, the others add
        here, seen = slice(begin, begin + QUERIES), slice(0, begin + QUERIES)
        beta = 0 if begin + QUERIES >= length else 1
        q_here, grad_here, k_seen, v_seen = q[:, here], grad[:, here], k[:, seen], v[:, seen]
        scores = torch.baddbmm(less[:, here], q_here, k_seen.transpose(1, 2), alpha=scale)
        scores[:, :, begin:].masked_fill_(_future(q_here, q_here), -math.inf)
        shares = scores.softmax(dim=2)
        by_v[:, seen].baddbmm_(shares.transpose(1, 2), grad_here, beta=beta)
        by_shares = torch.bmm(grad_here, v_seen.transpose(1, 2))
        by_scores = aten._softmax_backward_data(by_shares, shares, 2, shares.dtype)
        by_q[:, here].baddbmm_(by_scores, k_seen, beta=0, alpha=scale)
        by_k[:, seen].baddbmm_(by_scores.transpose(1, 2), q_here, beta=beta, alpha=scale)


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
        cos, sin = (angles[here].to(qkv.dtype)[:, None] for angles in (self.cos, self.sin))
        if torch.compiler.is_compiling():
            query, key, value = qkv.unbind(2)
            query, key = (
                torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
                for first, second in (query.chunk(2, dim=-1), key.chunk(2, dim=-1))
            )
        else:
            query, key, value = _Turn.apply(qkv, torch.cat((cos, cos), dim=-1), sin)  # type: ignore[no-untyped-call]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


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
