"""What makes experts differ when they begin: as exact copies they all learn the same until the router separates them."""

from __future__ import annotations

from typing import Final, Literal

import torch

from apt_model.layers.feed_forward import BIASES, Experts, channel_dim

Upcycling = Literal["copy", "noise", "drop"]

SHARES: Final[dict[Upcycling, float]] = {"copy": 0.0, "noise": 0.01, "drop": 0.5}
"""What ``share`` is unless said otherwise."""


@torch.no_grad()
def make_different(experts: Experts, upcycling: Upcycling, share: float | None = None) -> None:
    """Change experts that are copies, each in its own way, with torch's default generator of their device.

    ``copy`` changes nothing, and is the only one that leaves the function as it was. ``noise`` adds normal noise with a
    deviation of ``share`` of the weight's own. ``drop`` draws ``share`` of an expert's d_ff channels anew, from the normal
    distribution with the mean and deviation of what they replace (Drop-Upcycling, arXiv:2502.19261).

    Args:
        share: None: that of :data:`SHARES`.
    """
    share = SHARES[upcycling] if share is None else share
    if upcycling == "noise":
        for weight in experts.parameters():
            weight.add_(share * weight.std() * torch.randn_like(weight))
    elif upcycling == "drop":
        num_experts, d_ff, d_model = experts.up.shape
        num_channels = max(1, round(share * d_ff))
        places = torch.rand(num_experts, d_ff, device=experts.up.device).argsort(dim=1)
        chosen = places < num_channels  # (num_experts, d_ff), num_channels a row
        for name, weight in experts.named_parameters():
            if name in BIASES:
                continue
            drawn = chosen.unsqueeze(-1 if channel_dim(name) == -2 else -2)
            mean = (weight * drawn).sum(dim=(1, 2), keepdim=True) / (num_channels * d_model)
            variance = ((weight - mean).square() * drawn).sum(dim=(1, 2), keepdim=True) / (num_channels * d_model)
            weight.copy_(torch.where(drawn, mean + variance.sqrt() * torch.randn_like(weight), weight))
