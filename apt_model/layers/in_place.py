"""Experts in models of other people: a layer that gives what a feed-forward layer gives, and keeps its report for the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.errors import ConfigError
from apt_model.layers.counted import Counted
from apt_model.layers.feed_forward import BIASES, FeedForward
from apt_model.layers.moe import MoE, MoEReport


class MoEInPlace(MoE):
    """A :class:`MoE` that returns its output alone, so that it stands where a feed-forward layer stood."""

    with_metrics = True
    counted: Counted | None = None
    report: MoEReport | None = None

    def forward(self, x: Tensor, *unused: Any) -> Tensor:  # type: ignore[override]
        """Map (batch, seq, d_model) to the same shape; :meth:`take_report` has the rest."""
        output, self.report = super().forward(x, self.with_metrics, self.counted)
        return output

    def take_report(self) -> MoEReport | None:
        """Return the report of the last forward pass, once."""
        report, self.report = self.report, None
        return report


def layers_in_place(model: nn.Module) -> list[MoEInPlace]:
    """Return the layers of that kind in ``model``."""
    return [module for module in model.modules() if isinstance(module, MoEInPlace)]


def moe_layers(model: nn.Module) -> list[MoE]:
    """Return the layers of ``model`` that are, or may become, mixtures of experts."""
    return [module for module in model.modules() if isinstance(module, MoE)]


KINDS: Final[dict[tuple[str, ...], dict[str, str]]] = {
    ("gate_proj", "up_proj", "down_proj"): {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    ("dense_h_to_4h", "dense_4h_to_h"): {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    ("up_proj", "down_proj"): {"up": "up_proj", "down": "down_proj"},
    ("fc1", "fc2"): {"up": "fc1", "down": "fc2"},
}
"""Feed-forward layers by the names of their products (Llama, Qwen, Mistral; GPT-NeoX; others), and what we call these."""


def add_experts(model: nn.Module, moe: Callable[..., MoEInPlace]) -> list[str]:
    """Put ``moe`` around each feed-forward layer of ``model``, which keeps its weights; return where.

    The model computes what it did until they are enabled, and there, too, where experts begin as copies.

    Args:
        moe: makes a layer of a :class:`FeedForward`.

    Raises:
        ConfigError: there is no layer of a kind that is known, or one computes something else than it seems.
    """
    found = [(path, kind) for path, module in model.named_modules() if (kind := _kind_of(module)) is not None]
    if not found:
        known = ", ".join(f"{' + '.join(names)}" for names in KINDS)
        raise ConfigError(
            f"model: {type(model).__name__} has no feed-forward layer that experts can take the place of. They are known by "
            f"their linear layers: {known}."
        )
    for path, kind in found:
        above, _, name = path.rpartition(".")
        layer = moe(_as_feed_forward(model.get_submodule(path), kind, path))
        setattr(model.get_submodule(above), name, layer.train(model.training))
    return [path for path, _ in found]


def _kind_of(module: nn.Module) -> dict[str, str] | None:
    linear = {name for name, part in module.named_children() if isinstance(part, nn.Linear)}
    return next((kind for names, kind in KINDS.items() if set(names) == linear), None)


def _as_feed_forward(module: nn.Module, kind: dict[str, str], path: str) -> FeedForward:
    """Return a layer with the weights of ``module`` themselves, no copies.

    Raises:
        ConfigError: its activation is none that experts have, or not all its products have biases.
    """
    products: dict[str, nn.Linear] = {name: module.get_submodule(of) for name, of in kind.items()}  # type: ignore[misc]
    biased = {product.bias is not None for product in products.values()}
    if len(biased) > 1:
        raise ConfigError(
            f"{path}: some of its linear layers have biases and some have none, which experts cannot have."
        )
    with torch.device("meta"):
        d_ff, d_model = products["up"].weight.shape
        layer = FeedForward(
            d_model=d_model, d_ff=d_ff, ffn=_activation(module, "gate" in kind, path), bias=biased.pop()
        )
    for name, product in products.items():
        setattr(layer, name, product.weight)
    for name, of in BIASES.items():
        if hasattr(layer, name):
            setattr(layer, name, products[of].bias)
    return layer


def _activation(module: nn.Module, gated: bool, path: str) -> str:
    """Return what we call the activation of ``module``, by what it does to some numbers."""
    activation = next(
        (getattr(module, name) for name in ("act_fn", "act", "activation_fn") if hasattr(module, name)), None
    )
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu2": lambda x: F.relu(x).square(),
    }
    if gated:
        known = {"swiglu": F.silu}
    x = torch.linspace(-3.0, 3.0, 13, device="cpu")
    if callable(activation):
        with torch.no_grad():
            found = next(
                (name for name, one in known.items() if torch.allclose(activation(x), one(x), atol=1e-7)), None
            )
        if found is not None:
            return found
    raise ConfigError(
        f"{path}: its activation {type(activation).__name__} is none that experts have: silu in a gated layer, gelu, gelu_new or "
        "relu2 in another."
    )
