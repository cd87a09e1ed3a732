"""Root mean square normalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.layers.backend import eager_on_cpu


class RMSNorm(nn.Module):
    """Divides each vector by its root mean square and scales its channels. Source: arXiv:1910.07467.

    Torch's own, but on the CPU, where that is many small operations: there, in eager mode, half of them.

    Args:
        eps: is added to the mean square; None: the least difference from 1 of numbers in the vector's precision.
    """

    def __init__(self, d_model: int, eps: float | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_model) to the same shape."""
        if eager_on_cpu(x) and x.dtype == self.weight.dtype:
            output: Tensor = _OnCPU.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return output
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _OnCPU(torch.autograd.Function):
    """What ``F.rms_norm`` computes, with few passes over the memory.

    Its gradient is that of layer normalisation about a mean of 0, for which torch has a fused kernel, but for the term by
    which that one takes the mean out of the gradient: it is added back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(torch.finfo(x.dtype).eps if eps is None else eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        scaled: Tensor = (x * inverse).mul_(weight)
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse, weight = ctx.saved_tensors
        by_x, by_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, weight.shape, torch.zeros_like(inverse), inverse, weight, None, [True, True, False]
        )
        mean = (grad @ weight).unsqueeze(-1).div_(len(weight))
        return by_x.add_(mean.mul_(inverse)), by_weight, None
