"""QK-clip: attention's logits are kept small by weights that are scaled down after an update (Kimi K2, arXiv:2507.20534)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError
from apt_model.layers.attention import SelfAttention
from apt_model.training.distributed import largest_of
from apt_model.training.sharding import shared_as


class QKClip:
    """Watches the largest logit of each head in training, and scales the head's queries and keys down where it is too large.

    A head whose largest logit s in an update, over its batches and ranks, is above the limit t has its logits multiplied by
    t / s: queries and keys by the root of that each; where heads share keys (grouped queries), those stay and queries take all.
    Other heads, and values, stay to the bit; so do the optimizer's moments.

    Args:
        limit: t, positive.

    Raises:
        ConfigError: the model has no attention of this project's, or normalises queries and keys.
    """

    def __init__(self, model: nn.Module, limit: float) -> None:
        self.limit = limit
        self.layers: Sequence[SelfAttention] = [part for part in model.modules() if isinstance(part, SelfAttention)]
        if not self.layers:
            raise ConfigError("trainer.qk_clip: the model has no attention of model=gpt. Set trainer.qk_clip=null.")
        if any(layer.qk_norm is not None for layer in self.layers):
            raise ConfigError(
                "trainer.qk_clip: model.qk_norm makes logits small whatever the weights. Set one to null."
            )
        self.largest = torch.tensor(math.nan)  # logit of the last update, 0-dim
        for layer in self.layers:
            layer.watch_logits()

    @torch.no_grad()
    def __call__(self) -> None:
        """Scale the weights after an update, and forget its logits; all ranks call it."""
        largest = largest_of(torch.stack([layer.largest for layer in self.layers if layer.largest is not None]))
        self.largest = largest.amax()
        factors = torch.where(largest > self.limit, self.limit / largest, 1.0)
        factors = factors.where(factors.isfinite() & (factors > 0), 1.0)  # of an update that is left out
        for layer, of_heads in zip(self.layers, factors, strict=True):
            if layer.qkv.weight.requires_grad:
                rows = layer.scales(of_heads)
                _multiply(layer.qkv.weight, rows.unsqueeze(1).expand(layer.qkv.weight.shape))
                if layer.qkv.bias is not None:
                    _multiply(layer.qkv.bias, rows)
        self.forget()

    def forget(self) -> None:
        """Forget the logits of an update that did not happen."""
        for layer in self.layers:
            if layer.largest is not None:
                layer.largest.fill_(-math.inf)


def _multiply(parameter: Tensor, scales: Tensor) -> None:
    parameter.mul_(shared_as(scales.to(parameter.dtype).contiguous(), parameter))
