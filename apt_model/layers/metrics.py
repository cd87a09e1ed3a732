"""Metrics of experts, by name. Torch stays unloaded, so that a config can be judged by these names."""

from __future__ import annotations

from typing import Final

MEANS: Final = (
    "balance_loss",
    "z_loss",
    "router_entropy",
    "top1_probability",
    "drop_fraction",
    "dropped_tokens",
)
OF_LOADS: Final = ("max_load", "load_entropy", "dead_experts", "specialisation")

METRICS: Final[tuple[str, ...]] = (*MEANS, *OF_LOADS)
"""Metrics of each layer; entropies in nats. Over all layers: the largest ``max_load``, all ``dead_experts``, else the mean.

``specialisation`` is the mutual information of sequence and expert: the entropy of the load less the
mean entropy of a sequence's own load. It is 0 where all texts use experts alike (but for chance, which adds about
num_experts / (2 top_k seq_len)), and ``load_entropy`` where each text has its own.
"""

EXPERT_COSINE: Final = "expert_cosine"
"""A metric of the weights of a layer's experts; over all layers the mean."""
