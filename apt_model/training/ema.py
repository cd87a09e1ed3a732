"""An exponential average of a model's weights, kept while it trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apt_model.training.sharding import shared_as


class WeightAverage:
    """After each update a little of the weights is mixed into their average: average = decay x average + (1 - decay) x weights.

    A parameter that appears, at the begin or where a module is switched on, begins as its own average.

    Args:
        decay: below 1; 1 / (1 - decay) is about the number of updates that count.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take note of an update."""
        now = dict(self.model.named_parameters())
        known = {name: one for name, one in self.averages.items() if name in now and one.shape == now[name].shape}
        for name, parameter in now.items():
            if name in known:
                known[name].lerp_(parameter, 1 - self.decay)
        self.averages = {name: known.get(name, parameter.detach().clone()) for name, parameter in now.items()}

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take up what a checkpoint has of :attr:`averages`; the model has the parameters of that time."""
        now = dict(self.model.named_parameters())
        self.averages = {
            name: shared_as(value, now[name]).to(now[name].device, copy=True)
            for name, value in averages.items()
            if name in now
        }
