"""Feed-forward layers: one dense layer, and many of the same kind side by side as experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


FFN: dict[str, Callable[..., Tensor]] = {"swiglu": swiglu, "gelu": gelu, "relu2": relu2}


class FeedForward(nn.Module):
    """A feed-forward layer without biases.

    Args:
        ffn: a name of :data:`FFN`.
    """

    def __init__(self, *, d_model: int, d_ff: int, ffn: str = "swiglu") -> None:
        super().__init__()
        self.ffn = ffn
        self.up = nn.Parameter(torch.empty(d_ff, d_model))
        self.down = nn.Parameter(torch.empty(d_model, d_ff))
        if ffn == "swiglu":
            self.gate = nn.Parameter(torch.empty(d_ff, d_model))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to the same shape."""
        return FFN[self.ffn](x, F.linear, **dict(self.named_parameters()))


class Experts(nn.Module):
    """Feed-forward layers of one kind, side by side: weights are (num_experts, out, in).

    They begin as copies of ``dense`` (sparse upcycling, arXiv:2212.05055).
    """

    def __init__(self, dense: FeedForward, num_experts: int) -> None:
        super().__init__()
        self.ffn = dense.ffn
        for name, weight in dense.named_parameters():
            copies = weight.detach().expand(num_experts, -1, -1).clone()
            self.register_parameter(name, nn.Parameter(copies))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Send each expert its own rows.

        Args:
            x: (rows, d_model), sorted by expert.
            ends: (num_experts,) int32; the rows of expert e end before ``ends[e]``. Rows past the last end are computed
                by nobody: what comes out there is undefined.

        Returns:
            (rows, d_model), in the dtype that autocast asks for, else in that of ``x``.
        """
        if torch.is_autocast_enabled(x.device.type):  # grouped_mm does not listen to autocast
            x = x.to(torch.get_autocast_dtype(x.device.type))

        def linear(rows: Tensor, weight: Tensor) -> Tensor:
            return grouped_linear(rows, weight.to(rows.dtype), ends)

        return FFN[self.ffn](x, linear, **dict(self.named_parameters()))


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
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(size % 16 == 0 for size in row_bytes):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # float64 and odd sizes; unbind: indexing would allocate a full zero gradient for every expert
    edges = [0, *ends.tolist()]
    groups = [F.linear(x[edges[g] : edges[g + 1]], w) for g, w in enumerate(weight.unbind(0))]
    tail = x.new_zeros(x.shape[0] - edges[-1], weight.shape[1])
    return torch.cat([*groups, tail])
