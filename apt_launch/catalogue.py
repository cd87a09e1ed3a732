"""What a curriculum can name in the model that a config describes, without building it: torch stays unloaded.

A test compares this with the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from apt_model.schedule.targets import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Domain

METRICS: Final = frozenset(
    {
        "train/loss",
        "train/auxiliary_loss",
        "train/grad_norm",
        "lr",
        "val/loss",
        "voter/entropy",
        "voter/voted_fraction",
        "align/loss",
        "align/agreement",
        "moe/balance_loss",
        "moe/z_loss",
        "moe/max_load",
        "moe/load_entropy",
        "moe/dead_experts",
        "moe/drop_fraction",
        "moe/dropped_tokens",
        "moe/router_entropy",
        "moe/top1_probability",
    }
)
"""What a latch can watch. Those of a module come while it is on; ``voter/entropy`` comes always when it is watched."""


def targets(values: Mapping[str, Any]) -> dict[str, Domain]:
    """Return what anneals can write, by path, with its domain; ``values`` is a run's config."""
    found = {"label_smoothing": BELOW_ONE}
    for layer in range(values["model"]["num_layers"]):
        found[f"blocks.{layer}.attention.dropout"] = BELOW_ONE
        found[f"blocks.{layer}.ffn.temperature"] = POSITIVE
        found[f"blocks.{layer}.ffn.capacity_factor"] = POSITIVE
        found[f"blocks.{layer}.ffn.balance_loss_weight"] = NOT_NEGATIVE
        found[f"blocks.{layer}.ffn.z_loss_weight"] = NOT_NEGATIVE
        found[f"blocks.{layer}.ffn.dropout"] = BELOW_ONE
    return found | {
        "align.weight": NOT_NEGATIVE,
        "voter.threshold": NOT_NEGATIVE,
        "optimizer.lr": NOT_NEGATIVE,
        "optimizer.weight_decay": NOT_NEGATIVE,
    }


def parameters(values: Mapping[str, Any]) -> list[str]:
    """Return the modules that events can freeze, by path."""
    found = ["embedding", "blocks", "align", "norm"]
    parts = (
        "attention_norm",
        "attention",
        "attention.qkv",
        "attention.out",
        "ffn_norm",
        "ffn",
        "ffn.router",
        "ffn.experts",
    )
    for layer in range(values["model"]["num_layers"]):
        found += [f"blocks.{layer}", *(f"blocks.{layer}.{part}" for part in parts)]
    return found
