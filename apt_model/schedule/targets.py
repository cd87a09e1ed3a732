"""What a curriculum may change: modules that it enables and values that move, each with its domain."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Domain:
    """The values that make sense for a target: from ``low`` to ``high``, with or without the ends themselves."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = value >= self.low if self.includes_low else value > self.low
        return above and (value <= self.high if self.includes_high else value < self.high)

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'at least' if self.includes_low else 'greater than'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'at most' if self.includes_high else 'less than'} {self.high:g}")
        return " and ".join([*parts, "finite"])


POSITIVE: Final = Domain(0.0, includes_low=False)
NOT_NEGATIVE: Final = Domain(0.0)
BELOW_ONE: Final = Domain(0.0, 1.0, includes_high=False)

MODULES: Final = ("moe", "align", "voter")
"""Modules that every model of this project can switch."""

BINDINGS: Final[dict[str, tuple[str, str]]] = {
    "route_temp": ("router.temperature", "moe"),
    "moe_capacity": ("moe.capacity_factor", "moe"),
    "align_weight": ("align.weight", "align"),
    "vote_threshold": ("voter.threshold", "voter"),
}
"""Names of a curriculum that stand for a target, and the module that reads it."""

OF_EXPERTS: Final[dict[str, Domain]] = {
    "temperature": POSITIVE,
    "capacity_factor": POSITIVE,
    "balance_loss_weight": NOT_NEGATIVE,
    "z_loss_weight": NOT_NEGATIVE,
    "jitter": BELOW_ONE,
}
"""What moves in each layer of experts, and is read while they are enabled."""

OF_OPTIMIZER: Final[dict[str, Domain]] = {"optimizer.lr": NOT_NEGATIVE, "optimizer.weight_decay": NOT_NEGATIVE}
"""Targets of the optimizer: the learning rate, and the decay of matrices."""

DOMAINS: Final[dict[str, Domain]] = {
    "router.temperature": OF_EXPERTS["temperature"],
    "moe.capacity_factor": OF_EXPERTS["capacity_factor"],
    "align.weight": NOT_NEGATIVE,
    "voter.threshold": NOT_NEGATIVE,
}
"""The domains of the targets that :data:`BINDINGS` names; a model declares those of all others."""

ALIASES: Final[dict[str, str]] = {
    "router.temperature" if name == "temperature" else f"moe.{name}": f"blocks.*.ffn.{name}" for name in OF_EXPERTS
}
"""Short names for what every layer has; a model that has a target of that very name is meant by it first.

In another model than this project's they mean what its layers of experts have, wherever those are.
"""

ALIASED: Final[dict[str, str]] = {
    "router.temperature": "router temperature: no layer of experts, and no router with a scheduled value of that name",
    "moe.capacity_factor": "capacity factor: no layer of experts",
    "align.weight": "weight of an alignment loss",
    "voter.threshold": "threshold of a voter",
}
"""What is missing where a model has nothing that such a name means."""


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that ``pattern`` means, in their order: a dotted path in which ``*`` stands within one part."""
    names = list(names)
    expression = re.compile(r"\.".join(re.escape(part).replace(r"\*", "[^.]*") for part in pattern.split(".")))
    meant = [name for name in names if expression.fullmatch(name)]
    if meant or pattern not in ALIASES:
        return meant
    return matching(ALIASES[pattern], names) or _of_layers(ALIASES[pattern].rpartition(".")[2], names)


def common(one: str, other: str) -> str | None:
    """Return the pattern of what is part of both ``one`` and ``other``, which is the smaller of them where it is a part of the
    larger; None: nothing can be. A pattern means all below the paths that it means, too.
    """
    parts = [pattern.split(".") for pattern in (one, other)]
    shared = [_common_part(*pair) for pair in zip(*parts, strict=False)]
    if None in shared:
        return None
    return ".".join([*(part for part in shared if part is not None), *max(parts, key=len)[len(shared) :]])


def _common_part(one: str, other: str) -> str | None:
    if matching(one, [other]):
        return other
    if matching(other, [one]):
        return one
    if "*" not in one or "*" not in other:
        return None
    head = max(one.partition("*")[0], other.partition("*")[0], key=len)
    tail = max(one.rpartition("*")[2], other.rpartition("*")[2], key=len)
    both = f"{head}*{tail}"
    meet = all(
        head.startswith(name.partition("*")[0]) and tail.endswith(name.rpartition("*")[2]) for name in (one, other)
    )
    return both if meet else None


def covers(whole: str, part: str) -> bool:
    """Return whether all that the pattern ``part`` means is ``whole``, or a part of it."""
    return common(whole, part) == part


def _of_layers(value: str, names: list[str]) -> list[str]:
    """Return the names of ``value`` wherever a layer of experts, or a router by its name, has one."""
    found = [name.rpartition(".") for name in names]
    layers = {owner for owner, _, last in found if last == "capacity_factor"}
    routers = {owner for owner, _, last in found if "router" in owner.rpartition(".")[2] and last == "temperature"}
    owners = layers or (routers if value == "temperature" else layers)
    return [f"{owner}{dot}{last}" for owner, dot, last in found if last == value and owner in owners]
