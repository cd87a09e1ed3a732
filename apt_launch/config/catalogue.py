"""What a curriculum can name in the model that a config describes.

For this project's model nothing is built, and torch stays unloaded; a test compares what stands here with the model itself.
Any other model is asked itself, built on the meta device, where weights take no memory and no time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

from apt_launch.config.instantiate import GPTS
from apt_model.errors import ConfigError, cause_of
from apt_model.layers.metrics import EXPERT_COSINE, METRICS
from apt_model.schedule.targets import BELOW_ONE, MODULES, NOT_NEGATIVE, OF_EXPERTS, OF_OPTIMIZER, Domain

PARTS: Final = ("attention", "feed_forward", "experts", "router", "embedding", "align", "other")
"""Parts of this project's model whose gradients have metrics of their own."""


def modules(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that can be enabled, by name."""
    return MODULES if _is_gpt(values) else _of_model(values).modules


def vocab_size(values: Mapping[str, Any]) -> int | None:
    """Return how many tokens the model knows; None: nobody says."""
    known: int | None = values["model"].get("vocab_size")
    return known if known is not None or _is_gpt(values) else _of_model(values).vocab_size


class _Found(NamedTuple):
    """What a model on the meta device has."""

    modules: tuple[str, ...]
    targets: Mapping[str, Domain]
    parameters: tuple[str, ...]
    metrics: frozenset[str]
    vocab_size: int | None


def _is_gpt(values: Mapping[str, Any]) -> bool:
    return bool(values["model"]["_target_"] in GPTS)


def _of_model(values: Mapping[str, Any]) -> _Found:
    wanted = {name: values[name] for name in ("model", "moe", "align", "voter")}
    return _asked(json.dumps(wanted, sort_keys=True))


@lru_cache(maxsize=8)
def _asked(wanted: str) -> _Found:
    """Build the model of a config on the meta device, and ask it.

    Raises:
        ConfigError: it cannot be built.
    """
    import torch

    from apt_launch.config.instantiate import build_model
    from apt_model.layers import scheduled
    from apt_model.layers.in_place import moe_layers
    from apt_model.training import subject

    try:
        with torch.device("meta"):
            model = build_model(json.loads(wanted))
            targets, names = scheduled.targets(model), dict.fromkeys(subject.freezable(model))
            switches, parts = subject.switches(model), set(subject.parameter_parts(model))
            for switch in switches.values():  # some parts are there only once they are enabled
                switch(True)
            names |= dict.fromkeys(subject.freezable(model))
            parts |= subject.parameter_parts(model).keys()
    except ConfigError:
        raise
    except Exception as error:  # of somebody else's code, which may raise anything
        target = json.loads(wanted)["model"]["_target_"]
        raise ConfigError(f"model: {target} cannot be built on the meta device: {cause_of(error)}") from error
    found = {"train/loss", "train/auxiliary_loss", "train/grad_norm", "lr", "val/loss", *getattr(model, "metrics", ())}
    found |= {f"train/grad_norm/{part}" for part in parts}
    if layers := len(moe_layers(model)):
        places = ["moe", *(f"moe/layer_{number:02}" for number in range(layers))]
        found |= {f"{place}/{name}" for place in places for name in (*METRICS, EXPERT_COSINE)}
    size = getattr(model, "vocab_size", None) or getattr(getattr(model, "config", None), "vocab_size", None)
    size = size if isinstance(size, int) else None
    return _Found(tuple(switches), targets, tuple(names), frozenset(found), size)


def metrics(values: Mapping[str, Any]) -> frozenset[str]:
    """Return what a latch can watch; ``values`` is a run's config.

    A module's metrics exist while it is enabled; ``voter/entropy`` exists always when it is watched.
    """
    if not _is_gpt(values):
        return _of_model(values).metrics
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
    found |= {f"train/grad_norm/{part}" for part in PARTS}
    if values["model"].get("z_loss_weight"):
        found.add("head/z_loss")
    if values["trainer"].get("qk_clip") is not None:
        found.add("train/max_attention_logit")
    layers = ["moe", *(f"moe/layer_{layer:02}" for layer in range(values["model"]["num_layers"]))]
    return frozenset(found | {f"{layer}/{name}" for layer in layers for name in (*METRICS, EXPERT_COSINE)})


def targets(values: Mapping[str, Any]) -> dict[str, Domain]:
    """Return what anneals can write, by path, with its domain; ``values`` is a run's config."""
    if not _is_gpt(values):
        return {**_of_model(values).targets, **OF_OPTIMIZER}
    found = {"label_smoothing": BELOW_ONE, "z_loss_weight": NOT_NEGATIVE}
    for layer in range(values["model"]["num_layers"]):
        found[f"blocks.{layer}.attention.dropout"] = BELOW_ONE
        found[f"blocks.{layer}.ffn.dropout"] = BELOW_ONE
        found |= {f"blocks.{layer}.ffn.{name}": domain for name, domain in OF_EXPERTS.items()}
    return found | {"align.weight": NOT_NEGATIVE, "voter.threshold": NOT_NEGATIVE, **OF_OPTIMIZER}


def parameters(values: Mapping[str, Any]) -> list[str]:
    """Return the modules that events can freeze, by path."""
    if not _is_gpt(values):
        return list(_of_model(values).parameters)
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
