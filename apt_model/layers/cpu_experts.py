"""Experts on the CPU, in eager mode: where slots stand, how rows are gathered and combined, and products a few experts at a time.

Rows are moved by one pass each way, and what an expert computes is used again while it is in the cache: its weights in
16 bits, too, which are made when a product needs them and not kept. Elsewhere,
:func:`apt_model.layers.feed_forward.grouped_linear` computes all experts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from apt_model.layers.backend import mkl_products, onednn_multiplies
from apt_model.layers.router import Dispatch

TILE_SIZE = 1 << 20
"""What is computed at a time: so many numbers of one tensor of width d_ff."""

STEP = 64
"""Of this many rows lengths of tiles are multiples where activations work: they, too, may be compiled for each new size."""

FEW = 256
"""Rows of an expert, on average; with fewer, MKL does products in float32: new sizes cost oneDNN more than it gains."""

aten = torch.ops.aten


class Places(NamedTuple):
    """Where slots stand: sorted by expert, with room at the end and, for oneDNN, after each expert's."""

    order: Tensor  # (slots,) int64: slots by expert, then those that are not computed
    at: Tensor  # (slots,) int64: where they stand; those that are not computed past the last place
    token: Tensor  # (places,) int64: whose row stands there; token 0 where there is room
    ends: Tensor  # (num_experts,) int32: the places of expert e end before ends[e]
    of_token: Tensor  # (tokens, top_k) int64: where a token's slots stand; 0 for those that are not computed
    served: Tensor  # (tokens, top_k) bool: which of them are computed


def size_step(rows: int, groups: int) -> int:
    """Return of what sizes of groups are to be multiples: a power of two, 8 to 64, of about a 32nd of their mean.

    oneDNN compiles a kernel for each new size, in ten times as long as the product takes. Routing gives new sizes at each
    step; few different ones are left of them.
    """
    return 1 << min(6, max(3, (rows // groups // 32).bit_length() - 1))


def by_onednn(rows: int, num_experts: int, dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies rows of experts, so that each expert's are to be of a round number."""
    return onednn_multiplies(dtype) and (dtype.itemsize == 2 or rows >= FEW * num_experts)


def num_places(slots: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return how many places there are for slots, whatever the routing; ``dtype``: that of products."""
    return slots + (num_experts * (size_step(slots, num_experts) - 1) if by_onednn(slots, num_experts, dtype) else 0)


def places(dispatch: Dispatch, dtype: torch.dtype) -> Places:
    """Give each slot of ``dispatch`` its place for products in ``dtype``.

    There are always as many places as there may have to be, so that tensors have the same sizes at each step, and memory
    that one has freed fits the next.
    """
    tokens, top_k = dispatch.kept.shape
    order, ends = dispatch.order, dispatch.ends
    at, most = torch.arange(len(order)), num_places(len(order), len(ends), dtype)
    computed = at < ends[-1]
    if by_onednn(len(order), len(ends), dtype):
        multiple = size_step(len(order), len(ends))
        counts = ends.diff(prepend=ends.new_zeros(1))
        sizes = (counts + multiple - 1) // multiple * multiple
        expert = torch.searchsorted(ends, at, right=True).clamp_(max=len(ends) - 1)
        at += (sizes.cumsum(0) - sizes - ends + counts).index_select(0, expert)
        ends = sizes.cumsum(0).int()
    at = torch.where(computed, at, most)
    token = torch.zeros(most + 1, dtype=torch.int64).index_copy_(0, at, order // top_k)[:-1]
    of_token = torch.empty_like(order).index_copy_(0, order, torch.where(computed, at, 0))
    served = torch.empty_like(computed).index_copy_(0, order, computed)
    return Places(order, at, token, ends, of_token.view(tokens, top_k), served.view(tokens, top_k))


def gather(rows: Tensor, where: Places) -> Tensor:
    """Put the rows of tokens (tokens, d_model) where they are computed: (places, d_model)."""
    gathered: Tensor = _Gather.apply(rows, where)  # type: ignore[no-untyped-call]
    return gathered


def combine(outputs: Tensor, weights: Tensor, where: Places) -> Tensor:
    """Add what experts computed for each token, weighted.

    Args:
        outputs: (places, d_model).
        weights: (tokens, top_k), at least float32, 0 for slots that are not computed.

    Returns:
        (tokens, d_model), in the dtype of ``weights``.
    """
    mixed: Tensor = _Combine.apply(outputs, weights, where)  # type: ignore[no-untyped-call]
    return mixed


def _sums(rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sums of the rows that ``chosen`` (sums, rows of each) names, in one pass."""
    return F.embedding_bag(chosen, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, where: Places) -> Tensor:
        ctx.save_for_backward(where.of_token, where.served)
        return rows.index_select(0, where.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sums(grad.contiguous(), *ctx.saved_tensors), None


class _Combine(torch.autograd.Function):
    """Its gradient is 0 where there is room, so that what stands there changes no weight."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, where: Places) -> Tensor:
        ctx.save_for_backward(outputs, weights, *where)
        return _sums(outputs.to(weights.dtype), where.of_token, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        outputs, weights, *saved = ctx.saved_tensors
        where, grad = Places(*saved), grad.contiguous()
        scale = weights.new_zeros(len(outputs) + 1).index_copy_(0, where.at, weights.flatten()[where.order])[:-1]
        by_output = _sums(grad.to(outputs.dtype), where.token.unsqueeze(1), scale.unsqueeze(1))
        slots = torch.arange(weights.numel())
        by_weight = aten._embedding_bag_per_sample_weights_backward(
            grad,
            outputs.to(grad.dtype),
            where.of_token.flatten(),
            slots[:: weights.shape[1]],
            slots // weights.shape[1],
            0,
        )
        return by_output, by_weight.view_as(weights).where(where.served, 0.0), None


class Activation(NamedTuple):
    """What stands between the products of an expert, on tensors (rows, d_ff) that are there already.

    Attributes:
        kept: how many tensors ``forward`` writes for ``backward``, beside its result.
        forward: takes what the products gave (up, or up and gate), the kept tensors, and one for the result; it may
            overwrite the first.
        backward: takes tensors for the gradients of what the products gave, of which the last one holds the gradient of
            the result, and what ``forward`` left in the others.
    """

    kept: int
    forward: Callable[..., None]
    backward: Callable[..., None]


def _swiglu(up: Tensor, gate: Tensor, curved: Tensor, hidden: Tensor) -> None:
    aten.silu.out(gate, out=curved)
    torch.mul(curved, up, out=hidden)


def _swiglu_backward(by_up: Tensor, grad: Tensor, up: Tensor, gate: Tensor, curved: Tensor) -> None:
    torch.mul(grad, curved, out=by_up)
    grad.mul_(up)
    aten.silu_backward.grad_input(grad, gate, grad_input=grad)


def _gelu(up: Tensor, hidden: Tensor) -> None:
    aten.gelu.out(up, out=hidden)


def _gelu_backward(grad: Tensor, up: Tensor) -> None:
    aten.gelu_backward.grad_input(grad, up, grad_input=grad)


def _relu2(up: Tensor, hidden: Tensor) -> None:
    up.clamp_(min=0)
    torch.mul(up, up, out=hidden)


def _relu2_backward(grad: Tensor, positive: Tensor) -> None:
    grad.mul_(positive).mul_(2.0)


ACTIVATIONS = {
    "swiglu": Activation(1, _swiglu, _swiglu_backward),
    "gelu": Activation(0, _gelu, _gelu_backward),
    "relu2": Activation(0, _relu2, _relu2_backward),
}


def compute(x: Tensor, ends: Tensor, ffn: str, *, up: Tensor, down: Tensor, gate: Tensor | None = None) -> Tensor:
    """Do what :class:`~apt_model.layers.feed_forward.Experts` does.

    Args:
        x: (rows, d_model), sorted by expert.
        ends: (num_experts,) int32; the rows of expert e end before ``ends[e]``; past the last one nothing is computed.
        ffn: a name of :data:`ACTIVATIONS`.
        up, gate: (num_experts, d_ff, d_model), of the dtype of ``x`` or wider; products are in that of ``x``.
        down: (num_experts, d_model, d_ff).

    Returns:
        (rows, d_model).
    """
    into = (up,) if gate is None else (up, gate)
    output: Tensor = _Experts.apply(x, ends, ffn, *into, down)  # type: ignore[no-untyped-call]
    return output


class _Experts(torch.autograd.Function):
    """Products with single matrices, written where they belong, tile by tile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, ffn: str, *weights: Tensor) -> Tensor:
        *into, down = (weight.transpose(1, 2).unbind() for weight in weights)
        activation, width = ACTIVATIONS[ffn], weights[-1].shape[2]
        inner = [x.new_empty(len(x) + STEP, width) for _ in range(len(into) + activation.kept + 1)]
        output = torch.empty_like(x)
        ctx.tiles = list(_tiles(ends, tile_rows(width)))
        ctx.products = nullcontext if by_onednn(len(x), len(ends), x.dtype) else mkl_products
        with ctx.products():
            for tile in ctx.tiles:
                for part in tile.parts():
                    some = x[part.rows]
                    for matrices, result in zip(into, inner, strict=False):
                        _multiply(some, matrices[part.expert], result[part.rows])
                activation.forward(*(tensor[tile.around] for tensor in inner))
                for part in tile.parts():
                    _multiply(inner[-1][part.rows], down[part.expert], output[part.rows])
        ctx.save_for_backward(x, *weights, *inner)
        ctx.activation, ctx.num_weights = activation, len(weights)
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
        *into, down = (weight.unbind() for weight in weights)
        *by_into, by_down = (weight.unbind() if weight is not None else None for weight in by_weights)
        width = inner[-1].shape[1]
        spare = [x.new_empty(tile_rows(width), width) for _ in into]
        with ctx.products():
            for tile in ctx.tiles:
                for part in tile.parts():
                    some = grad[part.rows]
                    _multiply(some, down[part.expert], spare[-1][part.here])
                    _products(some, inner[-1][part.rows], by_down, part)
                around = [tensor[: tile.length_around] for tensor in spare]
                ctx.activation.backward(*around, *(tensor[tile.around] for tensor in inner[:-1]))
                for part in tile.parts():
                    some, by_some = x[part.rows], by_x[part.rows]
                    for number, tensor in enumerate(spare):
                        by = tensor[part.here]
                        _multiply(by, into[number][part.expert], by_some, add=number > 0)
                        _products(by, some, by_into[number], part)
        by_x[tile.rows.stop :].zero_()
        return by_x, None, None, *by_weights


def tile_rows(width: int) -> int:
    """Return how many rows of ``width`` numbers are computed at a time: a multiple of :data:`STEP`."""
    return max(STEP, TILE_SIZE // width // STEP * STEP)


class _Tile(NamedTuple):
    """Rows that are computed together; the first expert may have begun in the tile before, the last may continue."""

    begin: int
    first: int  # expert
    sizes: list[int]  # rows of each expert here
    goes_on: bool  # whether the first expert had rows before

    @property
    def length(self) -> int:
        """Rows of all experts here."""
        return sum(self.sizes)

    @property
    def length_around(self) -> int:
        """The same, and as many of the rows that follow as make it a multiple of :data:`STEP`."""
        return (self.length + STEP - 1) // STEP * STEP

    @property
    def rows(self) -> slice:
        """Where the rows are."""
        return slice(self.begin, self.begin + self.length)

    @property
    def around(self) -> slice:
        """Where they and those that follow are."""
        return slice(self.begin, self.begin + self.length_around)

    def parts(self) -> Iterator[_Part]:
        """Yield what each expert has here."""
        here, add = 0, self.goes_on
        for expert, size in enumerate(self.sizes, self.first):
            begin = self.begin + here
            yield _Part(expert, slice(begin, begin + size), slice(here, here + size), add)
            here, add = here + size, False


class _Part(NamedTuple):
    """Rows of one expert in a tile."""

    expert: int
    rows: slice  # of all rows
    here: slice  # of the tile's
    goes_on: bool  # whether the expert had rows before


def _multiply(rows: Tensor, matrix: Tensor, out: Tensor, add: bool = False) -> None:
    """Write ``rows`` times ``matrix`` to ``out``, or add them to what is there."""
    if not len(rows):
        return
    if add:
        out.addmm_(rows, matrix.to(rows.dtype))
    else:
        torch.mm(rows, matrix.to(rows.dtype), out=out)


def _products(left: Tensor, right: Tensor, by_weight: Sequence[Tensor] | None, part: _Part) -> None:
    """Write the rows of ``left``, transposed, times those of ``right`` as the expert's gradient, if it is needed."""
    if by_weight is None:
        return
    out = by_weight[part.expert]
    if out.dtype == left.dtype:
        (out if part.goes_on else out.zero_()).addmm_(left.t(), right)  # zeros bring it into the cache
    elif part.goes_on:
        out.add_(torch.mm(left.t(), right))
    else:
        out.copy_(torch.mm(left.t(), right))


def _tiles(ends: Tensor, most: int) -> Iterator[_Tile]:
    """Put experts together while they have no more than ``most`` rows, and cut those that have more.

    Every expert is in one tile at least.
    """
    tile = _Tile(0, 0, [], goes_on=False)
    for expert, size in enumerate(ends.diff(prepend=ends.new_zeros(1)).tolist()):
        if tile.length and tile.length + size > most:
            yield tile
            tile = _Tile(tile.begin + tile.length, expert, [], goes_on=False)
        for _ in range((size - 1) // most):
            tile.sizes.append(most)
            yield tile
            tile, size = _Tile(tile.begin + tile.length, expert, [], goes_on=True), size - most
        tile.sizes.append(size)
    yield tile
