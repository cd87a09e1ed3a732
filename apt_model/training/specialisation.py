"""Metrics of validation: how far the source of a token decides which experts it goes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apt_model.data.sources import Sources
from apt_model.layers.moe import MoE
from apt_model.layers.router import Routing
from apt_model.layers.tally import entropy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class SourceLoads:
    """Counts, for each layer, how many slots (a token at one of its experts) of each source went to each expert.

    Args:
        begins: where the sequences of each batch begin in the split, (num_batches, batch).
    """

    def __init__(self, layers: Sequence[MoE], sources: Sources, begins: NDArray[np.int64]) -> None:
        self.layers = layers
        self.sources = sources
        self.begins = begins
        self.counts: list[Tensor | None] = [None] * len(layers)  # (num_sources, num_experts) int64
        self._of_tokens: Tensor | None = None
        self._counted: Tensor | None = None

    @contextmanager
    def counting(self, number: int, tokens: Tensor, counted: Tensor | None = None) -> Iterator[None]:
        """Count a forward pass on ``tokens`` (batch, seq), the batch of that number, where ``counted`` is true; None: all."""
        of_tokens = self.sources.of(self.begins[number], tokens.shape[1])
        self._of_tokens = torch.from_numpy(of_tokens).flatten().to(tokens.device)
        self._counted = None if counted is None else counted.flatten()
        hooks = [
            layer.router.register_forward_hook(
                lambda router, given, routing, number=number: self._count(number, routing)
            )
            for number, layer in enumerate(self.layers)
            if layer.router is not None
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, number: int, routing: Routing) -> None:
        assert self._of_tokens is not None
        experts = self.layers[number].num_experts
        slots = self._of_tokens.unsqueeze(1) * experts + routing.experts
        found = torch.zeros(len(self.sources.names) * experts, dtype=torch.int64, device=slots.device)
        ones = torch.ones_like(slots)
        if self._counted is not None:
            ones = ones * self._counted.unsqueeze(1)
        found = found.scatter_add(0, slots.flatten(), ones.flatten()).view(-1, experts)
        before = self.counts[number]
        self.counts[number] = found if before is None else before + found

    def metrics(self) -> dict[str, float]:
        """Return the information of a token's source about its expert, in nats, by name.

        ``val/specialisation`` is their mutual information, the mean over layers; ``val/layer_03/specialisation`` that of a
        layer. ``val/source/NAME/specialisation`` is how far the load of one source is from that of all (Kullback-Leibler),
        the mean over layers; weighted by their tokens, these add up to the first.
        """
        known = [(number, counts) for number, counts in enumerate(self.counts) if counts is not None]
        if not known:
            return {}
        counts = torch.stack([counts for _, counts in known]).double()  # (layers, sources, experts)
        of_source = counts.sum(dim=2, keepdim=True)
        load = counts.sum(dim=1, keepdim=True) / counts.sum(dim=(1, 2), keepdim=True)
        own = counts / of_source.clamp(min=1.0)
        apart = -entropy(own) - torch.xlogy(own, load).sum(dim=2)  # (layers, sources)
        share = of_source.squeeze(2) / of_source.sum(dim=1)
        of_layers = (share * apart).sum(dim=1)
        metrics = {"val/specialisation": of_layers.mean().item()}
        metrics |= {
            f"val/layer_{number:02}/specialisation": value
            for (number, _), value in zip(known, of_layers.tolist(), strict=True)
        }
        present = of_source[0, :, 0].tolist()
        return metrics | {
            f"val/source/{name}/specialisation": value
            for name, value, slots in zip(self.sources.names, apart.mean(dim=0).tolist(), present, strict=True)
            if slots
        }
