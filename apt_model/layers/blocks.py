"""Experts on the CPU, in eager mode: where slots stand, how rows come and go, and products a few experts at a time.

Rows are moved by one pass each way, and what an expert computes is used again while it is in the cache. Elsewhere,
:func:`apt_model.layers.feed_forward.grouped_linear` computes all experts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from apt_model.layers.router import Dispatch

BLOCK_BYTES = 4 << 20
"""Of one tensor of width d_ff: experts are computed together as long as they need no more."""

aten = torch.ops.aten


class Places(NamedTuple):
    """Where slots stand: sorted by expert, and after each expert's, in 16 bits, some room."""

    slots: Tensor  # (slots,) int64: those that somebody computes
    at: Tensor  # (slots,) int64: where they stand
    token: Tensor  # (places,) int64: whose row stands there; token 0 where there is room
    ends: Tensor  # (num_experts,) int32: the places of expert e end before ends[e]
    of_token: Tensor  # (tokens, top_k) int64: where a token's slots stand; 0 for those that nobody computes
    served: Tensor  # (tokens, top_k) bool: which of them somebody computes


def size_step(rows: int, groups: int) -> int:
    """Return of what sizes of groups are to be multiples: a power of two, 8 to 64, of about a 32nd of their mean.

    In 16 bits products go through oneDNN, which compiles a kernel for each new size, in ten times as long as the product
    takes. Routing gives new sizes at each step; few different ones are left of them.
    """
    return 1 << min(6, max(3, (rows // groups // 32).bit_length() - 1))


def places(dispatch: Dispatch, dtype: torch.dtype) -> Places:
    """Give each slot of ``dispatch`` its place for products in ``dtype``."""
    tokens, top_k = dispatch.kept.shape
    slots = dispatch.order[: int(dispatch.ends[-1])]
    at, ends = torch.arange(len(slots)), dispatch.ends
    if dtype.itemsize == 2:
        counts = ends.diff(prepend=ends.new_zeros(1)).long()
        multiple = size_step(len(slots), len(ends))
        sizes = (counts + multiple - 1) // multiple * multiple
        begins = sizes.cumsum(0) - sizes
        at = at + (begins - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        ends = sizes.cumsum(0).int()
    token = torch.zeros(int(ends[-1]), dtype=torch.int64).index_copy_(0, at, slots // top_k)
    of_token = torch.zeros(tokens * top_k, dtype=torch.int64).index_copy_(0, slots, at)
    served = torch.zeros(tokens * top_k, dtype=torch.bool).index_fill_(0, slots, 1)
    return Places(slots, at, token, ends, of_token.view(tokens, top_k), served.view(tokens, top_k))


def gather(rows: Tensor, where: Places) -> Tensor:
    """Put the rows of tokens (tokens, d_model) where they are computed: (places, d_model)."""
    gathered: Tensor = _Gather.apply(rows, where)  # type: ignore[no-untyped-call]
    return gathered


def combine(outputs: Tensor, weights: Tensor, where: Places) -> Tensor:
    """Add what experts computed for each token, weighted.

    Args:
        outputs: (places, d_model).
        weights: (tokens, top_k), at least float32, 0 for slots that nobody computes.

    Returns:
        (tokens, d_model), in the dtype of ``weights``.
    """
    mixed: Tensor = _Combine.apply(outputs, weights, where)  # type: ignore[no-untyped-call]
    return mixed


def _sums(rows: Tensor, of_token: Tensor, weights: Tensor) -> Tensor:
    """Return for each token the weighted sum of the rows that ``of_token`` names, in one pass."""
    return F.embedding_bag(of_token, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, where: Places) -> Tensor:
        ctx.where = where
        return rows.index_select(0, where.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sums(grad.contiguous(), ctx.where.of_token, ctx.where.served), None


class _Combine(torch.autograd.Function):
    """Its gradient is 0 where there is room, so that what stands there changes no weight."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, where: Places) -> Tensor:
        ctx.save_for_backward(outputs, weights)
        ctx.where = where
        return _sums(outputs.to(weights.dtype), where.of_token, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        outputs, weights = ctx.saved_tensors
        slots, at, token, *_ = ctx.where
        by_output = grad.to(outputs.dtype).index_select(0, token)
        products = (by_output * outputs).sum(dim=1, dtype=weights.dtype)
        by_weight = torch.zeros_like(weights).view(-1).index_copy_(0, slots, products.index_select(0, at))
        scale = torch.zeros_like(products).index_copy_(0, at, weights.flatten().index_select(0, slots))
        return by_output.mul_(scale.unsqueeze(1).to(outputs.dtype)), by_weight.view_as(weights), None


class Activation(NamedTuple):
    """What stands between the products of an expert, on tensors (rows, d_ff) that are there already.

    Attributes:
        kept: how many of them ``forward`` writes, for ``backward``, beside the result.
        forward: takes the results of the products into the expert (up, or up and gate), the kept and the result.
        backward: takes the gradient of the result, which it may overwrite, what the products gave and the kept; returns
            the gradients of the former.
    """

    kept: int
    forward: Callable[..., object]
    backward: Callable[..., tuple[Tensor, ...]]


def _swiglu(up: Tensor, gate: Tensor, curved: Tensor, hidden: Tensor) -> None:
    aten.silu.out(gate, out=curved)
    torch.mul(curved, up, out=hidden)


def _swiglu_backward(grad: Tensor, up: Tensor, gate: Tensor, curved: Tensor) -> tuple[Tensor, Tensor]:
    by_up = grad * curved
    grad.mul_(up)
    return by_up, aten.silu_backward.grad_input(grad, gate, grad_input=grad)


def _gelu(up: Tensor, hidden: Tensor) -> None:
    aten.gelu.out(up, out=hidden)


def _gelu_backward(grad: Tensor, up: Tensor) -> tuple[Tensor]:
    return (aten.gelu_backward.grad_input(grad, up, grad_input=grad),)


def _relu2(up: Tensor, positive: Tensor, hidden: Tensor) -> None:
    torch.clamp(up, min=0, out=positive)
    torch.mul(positive, positive, out=hidden)


def _relu2_backward(grad: Tensor, up: Tensor, positive: Tensor) -> tuple[Tensor]:
    return (grad.mul_(positive).mul_(2.0),)


ACTIVATIONS = {
    "swiglu": Activation(1, _swiglu, _swiglu_backward),
    "gelu": Activation(0, _gelu, _gelu_backward),
    "relu2": Activation(1, _relu2, _relu2_backward),
}


def compute(x: Tensor, ends: Tensor, ffn: str, into: Sequence[Tensor], down: Tensor) -> Tensor:
    """Do what :class:`~apt_model.layers.feed_forward.Experts` does.

    Args:
        x: (rows, d_model), sorted by expert.
        ends: (num_experts,) int32; the rows of expert e end before ``ends[e]``; past the last one nothing is computed.
        ffn: a name of :data:`ACTIVATIONS`.
        into: ``up``, or ``up`` and ``gate``, each (num_experts, d_ff, d_model), of the dtype of ``x``.
        down: (num_experts, d_model, d_ff).

    Returns:
        (rows, d_model).
    """
    output: Tensor = _Experts.apply(x, ends, ffn, *into, down)  # type: ignore[no-untyped-call]
    return output


class _Experts(torch.autograd.Function):
    """Matrices of single experts, written where they belong: 64 of them are no slower than one product of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, ffn: str, *weights: Tensor) -> Tensor:
        *into, down = (weight.transpose(1, 2).unbind() for weight in weights)
        activation = ACTIVATIONS[ffn]
        inner = [x.new_empty(len(x), weights[-1].shape[2]) for _ in range(len(into) + activation.kept + 1)]
        output = torch.empty_like(x)
        blocks = list(_blocks(ends, inner[0]))
        for block in blocks:
            rows, here = block.split(x), [tensor[block.rows] for tensor in inner]
            for matrices, result in zip(into, here, strict=False):
                _multiply(rows, matrices[block.experts], torch.split(result, block.sizes))
            activation.forward(*here)
            _multiply(torch.split(here[-1], block.sizes), down[block.experts], block.split(output))
        ctx.save_for_backward(x, *weights, *inner)
        ctx.activation, ctx.blocks, ctx.num_weights = activation, blocks, len(weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        weights, inner = saved[: ctx.num_weights], saved[ctx.num_weights :]
        grad, by_x = grad.contiguous(), torch.empty_like(x)
        by_weights = [
            torch.empty_like(weight) if wanted else None
            for weight, wanted in zip(weights, ctx.needs_input_grad[3:], strict=True)
        ]
        matrices = [weight.unbind() for weight in weights]
        by_matrices = [[None] * len(weights[0]) if by is None else by.unbind() for by in by_weights]
        for block in ctx.blocks:
            rows, grads, here = block.split(x), block.split(grad), [tensor[block.rows] for tensor in inner]
            *before, hidden = here
            by_hidden = torch.empty_like(hidden)
            _multiply(grads, matrices[-1][block.experts], torch.split(by_hidden, block.sizes))
            _products(grads, torch.split(hidden, block.sizes), by_matrices[-1][block.experts])
            for number, by_inner in enumerate(ctx.activation.backward(by_hidden, *before)):
                parts = torch.split(by_inner, block.sizes)
                _multiply(parts, matrices[number][block.experts], block.split(by_x), add=number > 0)
                _products(parts, rows, by_matrices[number][block.experts])
            rest = block.rows.stop
        by_x[rest:].zero_()
        return by_x, None, None, *by_weights


class _Block(NamedTuple):
    """Experts that are computed together."""

    experts: slice
    rows: slice
    sizes: list[int]  # rows of each

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each expert."""
        return torch.split(rows[self.rows], self.sizes)


def _blocks(ends: Tensor, like: Tensor) -> Iterator[_Block]:
    """Cut experts into blocks of which a tensor like ``like`` needs no more than :data:`BLOCK_BYTES`, but one expert."""
    most = BLOCK_BYTES // (like.shape[1] * like.itemsize)
    first, begin, sizes = 0, 0, list[int]()
    for expert, size in enumerate(ends.diff(prepend=ends.new_zeros(1)).tolist()):
        if sum(sizes) and sum(sizes) + size > most:
            yield _Block(slice(first, expert), slice(begin, begin + sum(sizes)), sizes)
            first, begin, sizes = expert, begin + sum(sizes), []
        sizes.append(size)
    yield _Block(slice(first, len(ends)), slice(begin, begin + sum(sizes)), sizes)


def _multiply(rows: Sequence[Tensor], matrices: Sequence[Tensor], out: Sequence[Tensor], add: bool = False) -> None:
    """Write each expert's rows times its matrix to ``out``, or add them to what is there."""
    for some, matrix, result in zip(rows, matrices, out, strict=True):
        if add and len(some):
            result.addmm_(some, matrix)
        elif len(some):
            torch.mm(some, matrix, out=result)


def _products(left: Sequence[Tensor], right: Sequence[Tensor], out: Sequence[Tensor | None]) -> None:
    """Write for each expert the rows of ``left``, transposed, times those of ``right`` to ``out``, where there is one."""
    for one, other, result in zip(left, right, out, strict=True):
        if result is not None:
            torch.mm(one.t(), other, out=result)  # 0 without rows
