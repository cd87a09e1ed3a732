"""Causal self-attention with rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apt_model.layers.backend import eager_on_cpu, mkl_products, onednn_multiplies
from apt_model.layers.documents import Documents
from apt_model.layers.documents import attention as within_documents
from apt_model.layers.norm import RMSNorm
from apt_model.layers.rotary import RotaryEmbedding
from apt_model.layers.scheduled import dropout
from apt_model.schedule.targets import BELOW_ONE, Domain

aten = torch.ops.aten

KERNELS = all(
    hasattr(aten, name) for name in ("_scaled_dot_product_flash_attention_for_cpu", "_softmax_backward_data")
) and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
"""Whether torch has what :class:`_OnCPU` is made of; else its own backward pass is used."""

QUERIES = 128
"""Of one sequence, whose scores :class:`_OnCPU` holds at a time."""

ROWS = 4096
"""Queries of all sequences and heads, whose scores it holds at a time."""


QKNorm = Literal["head", "all"]
"""What is normalised of queries, and of keys, before they are rotated: each head's channels, or those of all heads at once."""


def sdpa(query: Tensor, key: Tensor, value: Tensor, window: int | None = None, numbers: Tensor | None = None) -> Tensor:
    """Causal attention through torch's fused kernels.

    Args:
        query: (batch, heads, seq, head_dim).
        key, value: (batch, kv_heads, keys, head_dim), keys >= seq: the last query is at the position of the last key; as many
            heads of queries in a row as there are to each share one of them.
        window: a position sees so many, itself counted; None: all before it.
        numbers: (batch, seq): a position sees those of its own number; None: all.

    Returns:
        The shape of ``query``.
    """
    grouped = query.shape[1] != key.shape[1]
    unmasked = numbers is None and (window is None or window >= key.shape[-2])
    if query.shape[-2] == key.shape[-2] and unmasked:
        if KERNELS and eager_on_cpu(query) and torch.is_grad_enabled() and _products_are_fast(query.dtype):
            output: Tensor = _OnCPU.apply(query, key, value)  # type: ignore[no-untyped-call]
            return output
        if not grouped:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if query.dtype.itemsize > 2 and query.device.type != "cpu":  # flash attention alone knows groups
            key, value = _for_each_query_head(query, key, value)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    if grouped:
        key, value = _for_each_query_head(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=~_unseen(query, key, window, numbers))


def _for_each_query_head(query: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
    """Return ``shared`` (batch, kv_heads, ...), repeated for the heads of ``query`` (batch, heads, ...)."""
    return tuple(tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in shared)


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
        grads = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in saved[:3])
        grouped = heads != saved[1].shape[1]
        at_once = max(1, ROWS // (heads * min(QUERIES, length)))
        for begin in range(0, batch, at_once):
            some = slice(begin, begin + at_once)
            q, k, v, log_sum = (tensor[some] for tensor in saved)
            by_q, by_k, by_v = by = tuple(tensor[some] for tensor in grads)
            if grouped:
                k, v = _for_each_query_head(q, k, v)
                by = (by_q, torch.empty_like(k), torch.empty_like(v))
            _attention_backward(
                *(tensor.flatten(0, 1) for tensor in (grad[some], q, k, v, log_sum)),
                *(tensor.flatten(0, 1) for tensor in by),
            )
            if grouped:
                for shared, each in zip((by_k, by_v), by[1:], strict=True):
                    torch.sum(each.view(*shared.shape[:2], -1, *shared.shape[2:]), dim=2, out=shared)
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
        scores[:, :, begin:].masked_fill_(_unseen(q_here, q_here), -math.inf)
        shares = scores.softmax(dim=2)
        by_v[:, seen].baddbmm_(shares.transpose(1, 2), grad_here, beta=beta)
        by_shares = torch.bmm(grad_here, v_seen.transpose(1, 2))
        by_scores = aten._softmax_backward_data(by_shares, shares, 2, shares.dtype)
        by_q[:, here].baddbmm_(by_scores, k_seen, beta=0, alpha=scale)
        by_k[:, seen].baddbmm_(by_scores.transpose(1, 2), q_here, beta=beta, alpha=scale)


def eager(
    query: Tensor, key: Tensor, value: Tensor, window: int | None = None, numbers: Tensor | None = None
) -> Tensor:
    """Causal attention written out, quadratic in memory: the reference for :func:`sdpa`, with its shapes."""
    key, value = _for_each_query_head(query, key, value) if query.shape[1] != key.shape[1] else (key, value)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return scores.masked_fill(_unseen(query, key, window, numbers), -math.inf).softmax(dim=-1) @ value


def _unseen(query: Tensor, key: Tensor, window: int | None = None, numbers: Tensor | None = None) -> Tensor:
    """Return (seq, keys): whether a key comes after a query, or before its ``window``.

    With ``numbers``, (batch, 1, seq, keys): or is of another document.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    every = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    unseen = every.triu(1 + keys - queries)
    unseen = unseen if window is None else unseen | every.tril(keys - queries - window)
    return unseen if numbers is None else unseen | (numbers.unsqueeze(2) != numbers.unsqueeze(1)).unsqueeze(1)


ATTENTION: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa, "eager": eager}


class KeyValues:
    """Keys and values of the positions that a layer has seen, each (batch, kv_heads, length, head_dim)."""

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


@torch.no_grad()
def largest_logits(query: Tensor, key: Tensor, window: int | None = None, numbers: Tensor | None = None) -> Tensor:
    """Return each head's largest logit of causal attention, (heads,) float32, a group of queries at a time.

    Shapes are those of :func:`sdpa`; ``numbers``, (batch, seq): of documents that do not see each other.
    """
    key = _for_each_query_head(query, key)[0] if query.shape[1] != key.shape[1] else key
    unseen, first = _unseen(query, key, window, numbers), key.shape[-2] - query.shape[-2]
    found = []
    for begin in range(0, query.shape[-2], QUERIES):
        here, seen = slice(begin, begin + QUERIES), slice(0, first + begin + QUERIES)
        logits = query[:, :, here] @ key[:, :, seen].transpose(-2, -1)
        found.append(logits.float().masked_fill(unseen[..., here, seen], -math.inf).amax(dim=(0, 2, 3)))
    return torch.stack(found).amax(dim=0) / math.sqrt(query.shape[-1])


class SelfAttention(nn.Module):
    """Multi-head causal self-attention. Source: arXiv:1706.03762.

    Args:
        attention: a name of :data:`ATTENTION`.
        dropout: share of the output's channels that training drops.
        num_kv_heads: heads of keys and values, which as many heads of queries share (arXiv:2305.13245); None: one for each.
        head_dim: channels of a head; None: d_model / num_heads.
        rope_theta, rope_scaling: see :func:`~apt_model.layers.rotary.frequencies`.
        norm_eps: of :class:`RMSNorm`, where there are some.
        qk_norm: normalise queries and keys; None: neither.
        qkv_bias: whether queries, keys and values have one.
        sliding_window: a position sees so many, itself counted; None: all before it.
    """

    scheduled: ClassVar[dict[str, Domain]] = {"dropout": BELOW_ONE}
    dropout: Tensor
    largest: Tensor | None  # (heads,) float32: logits since they were last forgotten, where somebody watches them
    q_norm: RMSNorm
    k_norm: RMSNorm

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        seq_len: int,
        attention: str = "sdpa",
        dropout: float = 0.0,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        norm_eps: float | None = None,
        qk_norm: QKNorm | None = None,
        qkv_bias: bool = False,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("dropout", torch.tensor(float(dropout)), persistent=False)
        self.expected = {"dropout"} if dropout else set[str]()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or d_model // num_heads
        self.window = sliding_window
        self.attend = ATTENTION[attention]
        self.rotate = RotaryEmbedding(self.head_dim, seq_len, rope_theta, rope_scaling)
        self.qkv = nn.Linear(d_model, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=qkv_bias)
        if qkv_bias:
            nn.init.zeros_(self.qkv.bias)
        self.out = nn.Linear(num_heads * self.head_dim, d_model, bias=False)
        self.register_buffer("largest", None, persistent=False)
        self.qk_norm = qk_norm
        if qk_norm is not None:
            for name, heads in (("q_norm", num_heads), ("k_norm", self.num_kv_heads)):
                setattr(self, name, RMSNorm(self.head_dim * (heads if qk_norm == "all" else 1), norm_eps))

    def forward(self, x: Tensor, seen: KeyValues | Documents | None = None) -> Tensor:
        """Map (batch, seq, d_model) to the same shape; position t sees positions 0 to t.

        Args:
            seen: of the positions before those of ``x``, which are added; or documents, of which a position sees its own, and
                each of which begins at position 0; None: there is neither.
        """
        if isinstance(seen, Documents):
            query, key, value = self._heads(self.qkv(x), seen.positions)
            self._note_largest(query, key, seen.numbers)
            mixed = within_documents(self.attend, query, key, value, self.window, seen)
        else:
            query, key, value = self._heads(self.qkv(x), seen.length if seen else 0)
            if seen:
                key, value = seen.append(key, value, room=self.rotate.cos.shape[0])
            self._note_largest(query, key)
            mixed = self.attend(query, key, value, self.window)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        if self.training and "dropout" in self.expected:
            return dropout(output, self.dropout)
        return output

    def watch_logits(self) -> None:
        """Note each head's largest logit in training from now on, in ``largest``; that takes about half of attention's work."""
        self.largest = torch.full((self.num_heads,), -math.inf, device=self.qkv.weight.device)

    def _note_largest(self, query: Tensor, key: Tensor, numbers: Tensor | None = None) -> None:
        if self.training and self.largest is not None:
            self.largest.copy_(torch.maximum(self.largest, largest_logits(query, key, self.window, numbers)))

    def scales(self, factors: Tensor) -> Tensor:
        """Return what rows of ``qkv`` are to be multiplied with, so that logits of each head are multiplied by ``factors``.

        Queries and keys take equal parts; keys that several heads share stay, and those heads' queries take all.
        """
        shared = self.num_kv_heads != self.num_heads
        query = factors if shared else factors.sqrt()
        key = torch.ones_like(factors[: self.num_kv_heads]) if shared else query
        rows = torch.cat((query, key, torch.ones_like(key)))
        return rows.repeat_interleave(self.head_dim)

    def _heads(self, qkv: Tensor, start: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (batch, heads or kv_heads, seq, head_dim), of ``qkv`` (batch, seq, channels)."""
        (batch, length, _), heads, shared = qkv.shape, self.num_heads, self.num_kv_heads
        if self.qk_norm is None and heads == shared:
            return self.rotate(qkv.view(batch, length, 3, heads, self.head_dim), start)  # type: ignore[no-any-return]
        both, value = torch.split(qkv.view(batch, length, -1, self.head_dim), [heads + shared, shared], dim=2)
        if self.qk_norm is None:
            query, key = torch.split(self.rotate.turn(both, start), [heads, shared], dim=2)
        else:
            query, key = torch.split(both, [heads, shared], dim=2)
            query = self.rotate.turn(self._normalised(self.q_norm, query), start)
            key = self.rotate.turn(self._normalised(self.k_norm, key), start)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _normalised(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Return ``x`` (batch, seq, heads, head_dim) normalised, in float32 whatever autocast says."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.qk_norm == "all":
            return norm(precise.flatten(2)).view_as(x).to(x.dtype)  # type: ignore[no-any-return]
        return norm(precise).to(x.dtype)  # type: ignore[no-any-return]
