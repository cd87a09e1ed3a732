"""What a curriculum can name in the model that a config describes, without building it: torch stays unloaded.

A test compares this with the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apt_model.layers.metrics import EXPERT_COSINE, METRICS
from apt_model.schedule.targets import BELOW_ONE, NOT_NEGATIVE, OF_EXPERTS, OF_OPTIMIZER, Domain


def metrics(values: Mapping[str, Any]) -> frozenset[str]:
    """Return what a latch can watch; ``values`` is a run's config.

    A module's metrics exist while it is enabled; ``voter/entropy`` exists always when it is watched.
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
    return frozenset(found | {f"{layer}/{name}" for layer in layers for name in (*METRICS, EXPERT_COSINE)})


def targets(values: Mapping[str, Any]) -> dict[str, Domain]:
    """Return what anneals can write, by path, with its domain; ``values`` is a run's config."""
    found = {"label_smoothing": BELOW_ONE}
    for layer in range(values["model"]["num_layers"]):
        found[f"blocks.{layer}.attention.dropout"] = BELOW_ONE
        found[f"blocks.{layer}.ffn.dropout"] = BELOW_ONE
        found |= {f"blocks.{layer}.ffn.{name}": domain for name, domain in OF_EXPERTS.items()}
    return found | {"align.weight": NOT_NEGATIVE, "voter.threshold": NOT_NEGATIVE, **OF_OPTIMIZER}


def parameters(values: Mapping[str, Any]) -> list[str]:
    """Return the modules that events can freeze, by path."""
    model = values["model"]
    found = ["embedding", "blocks", "align", "norm", *([] if model.get("tie_embeddings", True) else ["unembedding"])]
    parts = (
        "attention_norm",
        "attention",
        "attention.qkv",
        "attention.out",
        *(("attention.q_norm", "attention.k_norm") if model.get("qk_norm") else ()),
        "ffn_norm",
        "ffn",
        "ffn.router",
        "ffn.experts",
    )
    for layer in range(values["model"]["num_layers"]):
        found += [f"blocks.{layer}", *(f"blocks.{layer}.{part}" for part in parts)]
    return found
