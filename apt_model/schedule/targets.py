"""What a curriculum may turn: modules that switch and values that move, each with the domain it may move in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Domain:
    """The values that make sense for a target: ``low`` to infinity, with or without ``low`` itself."""

    low: float
    includes_low: bool

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and (value > self.low or (self.includes_low and value == self.low))

    def __str__(self) -> str:
        return f"{'at least' if self.includes_low else 'greater than'} {self.low:g} and finite"


@dataclass(frozen=True)
class Target:
    """A value of the model that an anneal writes: its dotted name, its domain and the module that reads it."""

    name: str
    domain: Domain
    module: str


MODULES: Final = ("moe", "align", "voter")

BINDINGS: Final[dict[str, Target]] = {
    "route_temp": Target("router.temperature", Domain(0.0, includes_low=False), "moe"),
    "moe_capacity": Target("moe.capacity_factor", Domain(0.0, includes_low=False), "moe"),
    "align_weight": Target("align.weight", Domain(0.0, includes_low=True), "align"),
    "vote_threshold": Target("voter.threshold", Domain(0.0, includes_low=True), "voter"),
}
