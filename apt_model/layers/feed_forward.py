"""Feed-forward layers: one dense layer, and many of the same kind side by side as experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.layers import cpu_experts
from apt_model.layers.backend import computing_dtype, eager_on_cpu

Compute = Callable[[Tensor, Tensor], Tensor]
"""Maps rows (n, d_model), sorted by expert, and the ends of each expert's rows to (n, d_model)."""

Linear = Callable[[Tensor, Tensor], Tensor]
"""Maps rows (n, in) with a weight to (n, out): ``F.linear``, or one matrix an expert."""


def swiglu(x: Tensor, linear: Linear, up: Tensor, down: Tensor, gate: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)). Source: arXiv:2002.05202."""
    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def gelu(x: Tensor, linear: Linear, up: Tensor, down: Tensor) -> Tensor:
    """down(gelu(up(x))). Source: arXiv:1606.08415."""
    return linear(F.gelu(linear(x, up)), down)


def relu2(x: Tensor, linear: Linear, up: Tensor, down: Tensor) -> Tensor:
    """down(relu(up(x))^2). Source: Primer, arXiv:2109.08668."""
    return linear(F.relu(linear(x, up)).square(), down)


def gelu_tanh(x: Tensor, linear: Linear, up: Tensor, down: Tensor) -> Tensor:
    """Do what :func:`gelu` does, by the approximation with tanh that GPT-2 has."""
    return linear(F.gelu(linear(x, up), approximate="tanh"), down)


FFN: dict[str, Callable[..., Tensor]] = {"swiglu": swiglu, "gelu": gelu, "relu2": relu2, "gelu_tanh": gelu_tanh}


BIASES: Final = {"up_bias": "up", "down_bias": "down", "gate_bias": "gate"}
"""Biases that a layer may have, and the weights whose products they are added to."""


class FeedForward(nn.Module):
    """A feed-forward layer, without biases unless it is asked for them.

    Args:
        ffn: a name of :data:`FFN`.
        bias: whether each product has one, which begins at 0.
    """

    def __init__(self, *, d_model: int, d_ff: int, ffn: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.ffn = ffn
        self.up = nn.Parameter(torch.empty(d_ff, d_model))
        self.down = nn.Parameter(torch.empty(d_model, d_ff))
        if ffn == "swiglu":
            self.gate = nn.Parameter(torch.empty(d_ff, d_model))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)
        if bias:
            for name, of in BIASES.items():
                if hasattr(self, of):
                    self.register_parameter(name, nn.Parameter(torch.zeros(getattr(self, of).shape[0])))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to the same shape."""
        weights: dict[str, Tensor] = dict(self.named_parameters())
        biases = {id(weights[of]): weights.pop(name) for name, of in BIASES.items() if name in weights}
        if not biases:
            return FFN[self.ffn](x, F.linear, **weights)
        return FFN[self.ffn](x, lambda rows, weight: F.linear(rows, weight, biases[id(weight)]), **weights)


def channel_dim(name: str) -> int:
    """Return the dimension that runs over the d_ff channels, in the weight of that name; ``down_bias`` has none."""
    return -1 if name == "down" or name in BIASES else -2


def as_experts(value: Tensor, name: str, *, num_experts: int, granularity: int) -> Tensor:
    """Cut a dense layer's weight, or what is of its shape, along d_ff into ``granularity`` slices and repeat them.

    Returns:
        (num_experts, out, in), a copy: expert e has slice e modulo ``granularity``.
    """
    if name == "down_bias":
        return value.expand(num_experts, *value.shape).clone()
    slices = torch.stack(value.chunk(granularity, dim=channel_dim(name)))
    return slices.repeat(num_experts // granularity, *[1] * value.dim())


def as_dense(value: Tensor, name: str, *, granularity: int) -> Tensor:
    """Undo :func:`as_experts`: put the slices together again, each the mean of the experts that have it."""
    slices = value.reshape(-1, granularity, *value.shape[1:]).mean(dim=0)
    if name == "down_bias":
        return slices.mean(dim=0)
    return torch.cat(slices.unbind(), dim=channel_dim(name))


class Experts(nn.Module):
    """Feed-forward layers of one kind, side by side: weights are (num_experts, out, in).

    They begin as copies of ``dense`` (sparse upcycling, arXiv:2212.05055), or of its slices: ``granularity`` experts in
    a row make one copy. ``exchange`` takes the place of computing where other ranks have some of them.
    """

    up: nn.Parameter
    down: nn.Parameter

    def __init__(self, dense: FeedForward, num_experts: int, granularity: int = 1) -> None:
        super().__init__()
        self.ffn = dense.ffn
        self.granularity = granularity
        self.exchange: Callable[[Tensor, Tensor, Compute], Tensor] | None = None
        for name, weight in dense.named_parameters():
            pieces = as_experts(weight.detach(), name, num_experts=num_experts, granularity=granularity)
            if name == "down_bias":  # what the slices of a copy give is added up
                pieces /= granularity
            self.register_parameter(name, nn.Parameter(pieces))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Send each expert its own rows.

        Args:
            x: (rows, d_model), sorted by expert.
            ends: (num_experts,) int32; the rows of expert e end before ``ends[e]``. Rows past the last end are computed
                by nobody: what comes out there is undefined.

        Returns:
            (rows, d_model), in the dtype that autocast asks for, else in that of ``x``.
        """
        x = x.to(computing_dtype(x))  # grouped_mm does not listen to autocast
        return self._compute(x, ends) if self.exchange is None else self.exchange(x, ends, self._compute)

    def _compute(self, x: Tensor, ends: Tensor) -> Tensor:
        weights: dict[str, Tensor] = dict(self.named_parameters())
        if self.exchange is not None:
            weights = {name: weight.to_local() for name, weight in weights.items()}  # type: ignore[attr-defined]
        biased = {of: weights.pop(name) for name, of in BIASES.items() if name in weights}
        if biased or self.ffn == "gelu_tanh":
            return self._with_biases(x, ends, weights, biased)
        if eager_on_cpu(x):
            return cpu_experts.compute(x, ends, self.ffn, **weights)
        weights = {name: weight.to(x.dtype) for name, weight in weights.items()}
        return FFN[self.ffn](x, partial(grouped_linear, ends=ends), **weights)

    def _with_biases(
        self, x: Tensor, ends: Tensor, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]
    ) -> Tensor:
        """Compute as :meth:`_compute` does, and add to each row the biases of its expert."""
        rows = torch.arange(x.shape[0], device=x.device)
        owner = torch.searchsorted(ends, rows, right=True).clamp(max=ends.shape[0] - 1)
        cast = {name: weight.to(x.dtype) for name, weight in weights.items()}
        bias_of = {id(cast[name]): bias.to(x.dtype) for name, bias in biases.items()}

        def linear(given: Tensor, weight: Tensor) -> Tensor:
            product = grouped_linear(given, weight, ends)
            return product + bias_of[id(weight)].index_select(0, owner) if id(weight) in bias_of else product

        return FFN[self.ffn](x, linear, **cast)

    @torch.no_grad()
    def cosine(self) -> Tensor:
        """Return the mean cosine similarity of any two experts that began alike, 0-dim: 1 as long as they are equal.

        Each weight is read twice, and no two experts are compared: the squared length of the sum of n unit vectors is
        n plus the cosines of all pairs.
        """
        weights = [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in self.parameters()]
        weights = [weight.flatten(1) for weight in weights]  # whole ones, also where ranks hold shards of them
        lengths = torch.stack([torch.linalg.vector_norm(weight, dim=1) for weight in weights])
        inverse = 1.0 / torch.linalg.vector_norm(lengths, dim=0)
        copies = len(inverse) // self.granularity
        scale = inverse.view(copies, self.granularity).t().unsqueeze(1)  # (slices, 1, copies)
        squares = torch.zeros_like(scale[:, 0, 0])
        for weight in weights:
            alike = weight.view(copies, self.granularity, -1).transpose(0, 1)  # (slices, copies, ...)
            squares += torch.bmm(scale, alike).square().sum(dim=(1, 2))
        return (squares.mean() - copies) / (copies * (copies - 1))


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows with its own matrix.

    Args:
        x: (rows, in), sorted by group.
        weight: (groups, out, in), of the dtype of ``x``.
        ends: (groups,) int32; the rows of group g end before ``ends[g]``.

    Returns:
        (rows, out); rows past the last end are undefined.
    """
    row_bytes = (x.shape[-1] * x.element_size(), weight.shape[1] * x.element_size())
    native = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(size % 16 == 0 for size in row_bytes)
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        native = False  # inductor has no lowering for others (torch 2.13)
    if native:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    output: Tensor = _grouped_loop(x, weight, ends)
    return output


@torch.library.custom_op("apt_model::grouped_loop", mutates_args=())
def _grouped_loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Do what ``F.grouped_mm`` does, for float64, odd sizes and, under torch.compile, all but bf16; opaque to compilers."""
    edges = [0, *ends.tolist()]
    output = x.new_zeros(x.shape[0], weight.shape[1])
    for group in range(weight.shape[0]):
        rows = slice(edges[group], edges[group + 1])
        torch.mm(x[rows], weight[group].t(), out=output[rows])
    return output


@torch.library.custom_op("apt_model::grouped_outer", mutates_args=())
def _grouped_outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return (groups, out, in): for each group, its rows of ``grad`` transposed times its rows of ``x``."""
    edges = [0, *ends.tolist()]
    output = x.new_zeros(ends.shape[0], grad.shape[1], x.shape[1])
    for group in range(ends.shape[0]):
        rows = slice(edges[group], edges[group + 1])
        torch.mm(grad[rows].t(), x[rows], out=output[group])
    return output


@_grouped_loop.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_loop_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return _grouped_loop(grad, weight.transpose(1, 2).contiguous(), ends), _grouped_outer(grad, x, ends), None


def _grouped_outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, x, ends = ctx.saved_tensors
    return _grouped_loop(x, grad.contiguous(), ends), _grouped_loop(rows, grad.transpose(1, 2).contiguous(), ends), None


_grouped_loop.register_autograd(_grouped_loop_backward, setup_context=_save)
_grouped_outer.register_autograd(_grouped_outer_backward, setup_context=_save)
