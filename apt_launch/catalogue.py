"""What a curriculum can name in the model that a config describes, without building it: torch stays unloaded.

A test compares this with the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from apt_model.schedule.targets import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Domain

ROUTING: Final = (
    "balance_loss",
    "z_loss",
    "router_entropy",
    "top1_probability",
    "drop_fraction",
    "dropped_tokens",
    "max_load",
    "load_entropy",
    "dead_experts",
    "specialisation",
    "expert_cosine",
)
"""What experts tell, of all layers (``moe/max_load``) and of each (``moe/layer_03/max_load``)."""


def metrics(values: Mapping[str, Any]) -> frozenset[str]:
    """Return what a latch can watch; ``values`` is a run's config.

    What a module tells comes while it is on; ``voter/entropy`` comes always when it is watched.
    """
    found = {
        "train/loss",
        "train/auxiliary_loss",
        "train/grad_norm",
        "lr",
        "val/loss",
        "voter/entropy",
        "voter/voted_fraction",
        "align/loss",
        "align/agreement",
    }
    layers = ["moe", *(f"moe/layer_{layer:02}" for layer in range(values["model"]["num_layers"]))]
    return frozenset(found | {f"{layer}/{name}" for layer in layers for name in ROUTING})


def targets(values: Mapping[str, Any]) -> dict[str, Domain]:
    """Return what anneals can write, by path, with its domain; ``values`` is a run's config."""
    found = {"label_smoothing": BELOW_ONE}
    for layer in range(values["model"]["num_layers"]):
        found[f"blocks.{layer}.attention.dropout"] = BELOW_ONE
        found[f"blocks.{layer}.ffn.temperature"] = POSITIVE
        found[f"blocks.{layer}.ffn.capacity_factor"] = POSITIVE
        found[f"blocks.{layer}.ffn.balance_loss_weight"] = NOT_NEGATIVE
        found[f"blocks.{layer}.ffn.z_loss_weight"] = NOT_NEGATIVE
        found[f"blocks.{layer}.ffn.jitter"] = BELOW_ONE
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
