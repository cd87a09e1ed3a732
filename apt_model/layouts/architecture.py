"""What a model is, in our words: all that decides which tensors it has, and what it computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from apt_model.gpt import GPT

SMALLEST = 1.1920928955078125e-07
"""What ``model.norm_eps=null`` adds in float32."""


@dataclass(frozen=True, kw_only=True)
class ExpertLayers:
    """Feed-forward layers as experts; ``temperatures`` of the routers, one for each layer."""

    num_experts: int
    top_k: int
    granularity: int
    router: Literal["softmax", "sigmoid"]
    shared_expert: bool
    temperatures: tuple[float, ...]

    @classmethod
    def of(cls, model: GPT) -> ExpertLayers | None:
        """Return what the layers of ``model`` are now; None: dense."""
        first = model.moe_layers[0]
        if not first.enabled:
            return None
        return cls(
            num_experts=first.num_experts,
            top_k=first.top_k,
            granularity=first.granularity,
            router=first.scoring,
            shared_expert=first.shared_expert,
            temperatures=tuple(float(layer.temperature) for layer in model.moe_layers),
        )

    def values(self) -> dict[str, Any]:
        """Return what a config's group ``moe`` says of them."""
        values = asdict(self)
        del values["temperatures"]
        return values

    @property
    def output_scale(self) -> float:
        """What an expert's output is multiplied by beside its weight, where weights of a token's experts sum to 1."""
        return self.granularity / 2 if self.shared_expert else float(self.granularity)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder; see :class:`apt_model.gpt.GPT`. ``max_seq_len``: the longest text that it is meant for."""

    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    d_ff: int
    max_seq_len: int
    tie_embeddings: bool
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    norm_eps: float
    qk_norm: Literal["head", "all"] | None
    qkv_bias: bool
    sliding_window: int | None
    ffn: str = "swiglu"
    experts: ExpertLayers | None = None

    @classmethod
    def of(cls, model: Mapping[str, Any], experts: ExpertLayers | None = None) -> Architecture:
        """Return that of a config's group ``model``."""
        heads = model["num_heads"]
        return cls(
            **{name: model[name] for name in ("vocab_size", "d_model", "num_heads", "num_layers", "d_ff", "ffn")},
            num_kv_heads=model.get("num_kv_heads") or heads,
            head_dim=model.get("head_dim") or model["d_model"] // heads,
            max_seq_len=model.get("max_seq_len") or model["seq_len"],
            tie_embeddings=model.get("tie_embeddings", True),
            rope_theta=float(model.get("rope_theta", 10_000.0)),
            rope_scaling=model.get("rope_scaling"),
            norm_eps=model.get("norm_eps") or SMALLEST,
            qk_norm=model.get("qk_norm"),
            qkv_bias=model.get("qkv_bias", False),
            sliding_window=model.get("sliding_window"),
            experts=experts,
        )

    def values(self) -> dict[str, Any]:
        """Return what a config's group ``model`` says."""
        values = asdict(self)
        del values["experts"]
        return values
