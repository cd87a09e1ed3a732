"""What a model makes of the validation split: its loss, and which experts serve which sources."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.data.batches import Batches
from apt_model.ignored import IGNORED
from apt_model.layers.in_place import moe_layers
from apt_model.training.compiling import eagerly
from apt_model.training.specialisation import SourceLoads
from apt_model.training.subject import Forward


class Validation:
    """Computes the same batches each time it is called, without a trace in training.

    Args:
        forward: calls the model.
        seed: of what is drawn: the voter's votes, the same each time.
        autocast: returns what surrounds a forward pass.
        compiled: whether the model's parts are; validation goes without.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        batches: Batches,
        *,
        seed: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        compiled: bool,
    ) -> None:
        self.model = model
        self.forward = forward
        self.layers = moe_layers(model)
        self.batches = batches
        self.seed = seed
        self.device = device
        self.autocast = autocast
        self.compiled = compiled

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return ``val/loss``, the mean over batches, and where the text has several sources how different they are."""
        self.model.eval()
        losses, weights = [], []
        loads = self._loads_by_source()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), eagerly() if self.compiled else nullcontext():
            torch.manual_seed(self.seed)  # draws that training does not miss
            for number, (tokens, targets) in enumerate(self.batches.epoch(0, device=self.device)):
                counts = targets != IGNORED
                weights.append(counts.sum().double())
                with self.autocast(), loads.counting(number, tokens, counts) if loads else nullcontext():
                    losses.append(self._loss(tokens, targets))
        self.model.train()
        weight = torch.stack(weights)
        loss = (torch.stack(losses) * (weight / weight.mean().clamp(min=1e-9)).float()).mean().item()
        return {"val/loss": loss} | (loads.metrics() if loads else {})

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.forward(self.model, tokens, targets, with_metrics=False).language_loss
        assert loss is not None
        return loss

    def _loads_by_source(self) -> SourceLoads | None:
        """Return what counts who serves whom, where the validation text has several sources and experts are enabled."""
        sources = self.batches.tokens.sources
        if sources is None or len(sources.names) < 2 or not any(layer.enabled for layer in self.layers):
            return None
        return SourceLoads(self.layers, sources, self.batches.sampler.windows(0))
