"""The layouts: for each, which of our models it holds, how ``config.json`` says so, and what tensors are called.

One table each, for both directions: what is written by it is read by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple

from apt_model.errors import ConfigError
from apt_model.layouts.architecture import Architecture, ExpertLayers

KEYS: Final = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our names of what every ``config.json`` says, and theirs."""

OUTSIDE: Final = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
"""Our tensors outside of blocks, and theirs."""

BLOCK: Final = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.dense.gate": "mlp.gate_proj.weight",
    "ffn.dense.up": "mlp.up_proj.weight",
    "ffn.dense.down": "mlp.down_proj.weight",
}
"""Our tensors within a block (``blocks.N.``), and theirs (``model.layers.N.``)."""

MOST: Final = {"num_layers": 1 << 14, "num_experts": 1 << 16}
"""Of what a model is made of a list of, so that a damaged number ends in a message."""

ROPE: Final = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of ``rope_scaling`` that there are here, and their numbers."""


class Piece(NamedTuple):
    """A tensor of a layout, and where it is in our model."""

    theirs: str
    shape: tuple[int, ...]
    ours: str | None  # None: all zeros
    part: int | slice | None = None  # along the first dimension; None: all of it
    scale: float = 1.0  # theirs over ours


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One of Hugging Face's families of models.

    Args:
        name: the ``model_type``.
        class_name: of the model.
        fixed: keys with the only value that a model of ours can have; the first is written, the others are read as well.
        silent: what a ``config.json`` means that does not say it.
        bias: of queries, keys and values: ``never``, ``always``, or the key that says so.
        output_bias: whether the output projection then has one, too: zeros are written, and nothing else is read.
        qk_norm: which there are.
        qk_norm_key: what says whether there are norms; None: nothing.
        window: how a sliding window is said: ``all`` layers have it, or it stands in a list of ``layers``.
        any_head_dim: whether heads may be of another width than hidden_size / heads.
        router: of experts; None: layers are dense.
        expert_keys: our names of what is said of experts, and theirs; ``width`` is that of one.
        expert: our tensors of one expert, and theirs, with its number for ``{}``.
        router_weight, router_bias: names of the router's tensors.
        shared: our tensors of the shared expert, and theirs; none: there never is one.
        shared_gate: a tensor of zeros that stands for an equal share of the shared expert and the others.
    """

    name: str
    class_name: str
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    silent: Mapping[str, Any] = field(default_factory=dict)
    bias: str = "never"
    output_bias: bool = False
    qk_norm: tuple[Literal["head", "all"] | None, ...] = (None,)
    qk_norm_key: str | None = None
    window: Literal["all", "layers", "never"] = "never"
    any_head_dim: bool = True
    router: Literal["softmax", "sigmoid"] | None = None
    expert_keys: Mapping[str, str] = field(default_factory=dict)
    expert: Mapping[str, str] = field(default_factory=dict)
    router_weight: str = "mlp.gate.weight"
    router_bias: str | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_gate: str | None = None

    # --- what it holds -----------------------------------------------------------------------------------------------

    def problems(self, model: Architecture) -> list[str]:
        """Say what of ``model`` the layout cannot hold."""
        found, experts = [], model.experts
        if model.ffn != "swiglu":
            found.append(f"model.ffn = {model.ffn}: its feed-forward layers are swiglu")
        if model.qk_norm not in self.qk_norm:
            wanted = " or ".join(str(kind or "null") for kind in self.qk_norm)
            found.append(f"model.qk_norm = {model.qk_norm or 'null'}: it has {wanted}")
        if model.qkv_bias and self.bias == "never":
            found.append("model.qkv_bias: it has no biases")
        if model.sliding_window is not None and self.window == "never":
            found.append(f"model.sliding_window = {model.sliding_window}: it has no window")
        if not self.any_head_dim and model.head_dim * model.num_heads != model.d_model:
            found.append(f"model.head_dim = {model.head_dim}: its heads are hidden_size / heads wide")
        if experts is None and self.router is not None:
            found.append("the feed-forward layers are dense: its layers have experts")
        elif experts is not None and self.router is None:
            found.append("there are experts: its layers are dense")
        elif experts is not None:
            if experts.router != self.router:
                found.append(f"moe.router = {experts.router}: it has {self.router}")
            if experts.shared_expert and not self.shared:
                found.append("moe.shared_expert: it has none")
        return found

    # --- config.json -------------------------------------------------------------------------------------------------

    def config(self, model: Architecture) -> dict[str, Any]:
        """Return what ``config.json`` says of ``model``, which the layout holds."""
        found: dict[str, Any] = {"architectures": [self.class_name], "model_type": self.name}
        found |= {theirs: getattr(model, ours) for ours, theirs in KEYS.items()}
        found["intermediate_size"] = model.d_ff
        found["rope_theta"], found["rope_scaling"] = model.rope_theta, model.rope_scaling
        if self.bias not in ("never", "always"):
            found[self.bias] = model.qkv_bias
        if self.qk_norm_key is not None:
            found[self.qk_norm_key] = model.qk_norm is not None
        if self.window == "all":
            found["sliding_window"] = model.sliding_window
        if self.name.startswith("qwen"):
            found |= {"use_sliding_window": model.sliding_window is not None, "max_window_layers": 0}
            found["sliding_window"] = model.sliding_window
        if self.window == "layers":
            kind = "full" if model.sliding_window is None else "sliding"
            found["layer_types"] = [f"{kind}_attention"] * model.num_layers
        found |= {key: values[0] for key, values in self.fixed.items()}
        if (experts := model.experts) is not None:
            width = model.d_ff // experts.granularity
            said = {"num_experts": experts.num_experts, "top_k": experts.top_k, "width": width}
            said |= {"shared_width": model.d_ff, "num_shared": model.d_ff // width if experts.shared_expert else 1}
            found |= {theirs: said[ours] for ours, theirs in self.expert_keys.items()}
        return found

    def read(self, config: Mapping[str, Any], where: str) -> Architecture:
        """Return the model that ``config``, of a ``config.json``, describes; ``where`` it stands.

        Where an expert has a width of its own and the shared one another, the quotient is the granularity; else it is 1.

        Raises:
            ConfigError: it has no counterpart here, or something is missing.
        """
        said = {key: value for key, value in {**self.silent, **_as_older(config, self)}.items() if value is not None}
        problems = [
            f"{where}: {key} = {said[key]!r} has no counterpart here; it would have to be "
            f"{' or '.join(repr(value) for value in values)}."
            for key, values in {**self.fixed, **NEVER}.items()
            if key in said and said[key] not in values
        ]
        width, heads = said.get("hidden_size"), said.get("num_attention_heads")
        said.setdefault("num_key_value_heads", heads)
        if isinstance(width, int) and isinstance(heads, int) and heads > 0:
            said.setdefault("head_dim", width // heads)
        ours: dict[str, Any] = {}
        numbers = self.expert_keys or {"width": "intermediate_size"}
        for name, theirs in {**KEYS, **numbers}.items():
            ours[name] = said.get(theirs)
            kind = {"norm_eps": float, "tie_embeddings": bool}.get(name, int)
            if type(ours[name]) is not kind or (kind is not bool and not 0 < ours[name] <= MOST.get(name, 1 << 31)):
                problems.append(f"{where}: {theirs} = {ours[name]!r} is no {kind.__name__} that a model could have.")
        try:
            theta, scaling = _rope(said, where)
            window = self._window(said, where)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(*problems)
        normed = self.qk_norm_key is None or said.get(self.qk_norm_key, False)
        experts, width = None, ours["width"]
        if self.router is not None:
            experts = self._experts(ours, where)
            width *= experts.granularity
        return Architecture(
            **{name: ours[name] for name in KEYS},
            d_ff=width,
            experts=experts,
            rope_theta=theta,
            rope_scaling=scaling,
            qk_norm=self.qk_norm[-1] if normed else None,
            qkv_bias=self.bias == "always" or bool(said.get(self.bias, False)),
            sliding_window=window,
        )

    def _experts(self, ours: Mapping[str, Any], where: str) -> ExpertLayers:
        """Return what ``ours``, the numbers of :attr:`expert_keys` among them, says of experts."""
        assert self.router is not None
        slices, rest = ours.get("num_shared", 1), 0
        if "shared_width" in ours:
            slices, rest = divmod(ours["shared_width"], ours["width"])
        number, top_k = ours["num_experts"], ours["top_k"]
        if top_k > number:
            raise ConfigError(
                f"{where}: {self.expert_keys['top_k']} = {top_k} is more than there are experts, {number}."
            )
        if rest or not slices or number % slices or top_k % slices:
            key = self.expert_keys["shared_width" if "shared_width" in ours else "num_shared"]
            raise ConfigError(
                f"{where}: {key}: the shared expert has to be as wide as a number of experts that divides {number} (those that "
                f"there are) and {top_k} (those of a token)."
            )
        return ExpertLayers(
            num_experts=number,
            top_k=top_k,
            granularity=slices,
            router=self.router,
            shared_expert=bool(self.shared),
            temperatures=(1.0,) * ours["num_layers"],
        )

    def _window(self, said: Mapping[str, Any], where: str) -> int | None:
        window: int | None = said.get("sliding_window")
        if self.window == "never" or (self.name.startswith("qwen") and not said.get("use_sliding_window", False)):
            return None
        if self.window == "all" or window is None:
            return window
        kinds = said.get("layer_types")
        if kinds is None:
            first = said.get("max_window_layers", 0)
            kinds = ["full_attention" if n < first else "sliding_attention" for n in range(said["num_hidden_layers"])]
        if len(set(kinds)) > 1:
            raise ConfigError(f"{where}: layer_types: some layers have a window and some none; here all are alike.")
        return window if kinds and kinds[0] == "sliding_attention" else None

    # --- tensors -----------------------------------------------------------------------------------------------------

    def tensors(self, model: Architecture) -> Iterator[Piece]:
        """Yield every tensor of ``model``, which the layout holds."""
        wide = (model.vocab_size, model.d_model)
        yield Piece(OUTSIDE["embedding.weight"], wide, "embedding.weight")
        for number in range(model.num_layers):
            for piece in self._of_block(model, number):
                ours = piece.ours and f"blocks.{number}.{piece.ours}"
                yield piece._replace(theirs=f"model.layers.{number}.{piece.theirs}", ours=ours)
        yield Piece(OUTSIDE["norm.weight"], (model.d_model,), "norm.weight")
        if not model.tie_embeddings:
            yield Piece(OUTSIDE["unembedding.weight"], wide, "unembedding.weight")

    def _of_block(self, model: Architecture, layer: int) -> Iterator[Piece]:
        d, a, b = model.d_model, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        yield _whole("attention_norm.weight", d)
        rows = {"q_proj": slice(0, a), "k_proj": slice(a, a + b), "v_proj": slice(a + b, a + 2 * b)}
        biased = self.bias == "always" or (model.qkv_bias and self.bias != "never")
        for name, part in rows.items():
            height = part.stop - part.start
            yield Piece(f"self_attn.{name}.weight", (height, d), "attention.qkv.weight", part)
            if biased:
                ours = "attention.qkv.bias" if model.qkv_bias else None
                yield Piece(f"self_attn.{name}.bias", (height,), ours, part)
        yield _whole("attention.out.weight", d, a)
        if biased and self.output_bias:
            yield Piece("self_attn.o_proj.bias", (d,), None)
        if model.qk_norm is not None:
            width = {"head": (model.head_dim, model.head_dim), "all": (a, b)}[model.qk_norm]
            yield _whole("attention.q_norm.weight", width[0])
            yield _whole("attention.k_norm.weight", width[1])
        yield _whole("ffn_norm.weight", d)
        if model.experts is None:
            for name in ("gate", "up"):
                yield _whole(f"ffn.dense.{name}", model.d_ff, d)
            yield _whole("ffn.dense.down", d, model.d_ff)
        else:
            yield from self._of_experts(model, model.experts, layer)

    def _of_experts(self, model: Architecture, experts: ExpertLayers, layer: int) -> Iterator[Piece]:
        d, number, width = model.d_model, experts.num_experts, model.d_ff // experts.granularity
        yield Piece(self.router_weight, (number, d), "ffn.router.weight", scale=1.0 / experts.temperatures[layer])
        if self.router_bias is not None:
            yield Piece(self.router_bias, (number,), "ffn.router.bias")
        for one in range(number):
            for name, theirs in self.expert.items():
                shape, scale = ((d, width), experts.output_scale) if name == "down" else ((width, d), 1.0)
                yield Piece(theirs.format(one), shape, f"ffn.experts.{name}", one, scale)
        if self.shared_gate is not None:
            yield Piece(self.shared_gate, (1, d), None)
        # what always has a shared expert gets one of zeros
        shared_width = model.d_ff if experts.shared_expert or "shared_width" in self.expert_keys else width
        half = 1.0 if self.shared_gate is not None else 0.5
        for name, theirs in self.shared.items():
            shape, scale = ((d, shared_width), half) if name == "down" else ((shared_width, d), 1.0)
            yield Piece(theirs, shape, f"ffn.dense.{name}" if experts.shared_expert else None, scale=scale)


def _as_older(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return ``config`` with the names that transformers before its version 5 wrote, too."""
    found, rope, experts = dict(config), config.get("rope_parameters"), layout.expert_keys.get("num_experts")
    if experts is not None and "num_local_experts" in config:
        found.setdefault(experts, config["num_local_experts"])
    if isinstance(rope, Mapping) and "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return found


def _whole(ours: str, *shape: int) -> Piece:
    return Piece(BLOCK[ours], shape, ours)


def _rope(said: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Return base and scaling of rotary positions, as older and newer versions of transformers write them."""
    given = said.get("rope_parameters") or said.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: rope_scaling = {given!r} is no mapping.")
    theta = given.get("rope_theta", said.get("rope_theta", 10_000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    share = said.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor = {share} has no counterpart here: all channels turn.")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise ConfigError(f"{where}: rope_theta = {theta!r} is no number above 0.")
    if kind == "default":
        return float(theta), None
    if kind not in ROPE:
        raise ConfigError(
            f"{where}: rope_scaling of the type {kind!r} has no counterpart here. Known: {', '.join(ROPE)}."
        )
    scaling = {name: given.get(name) for name in ROPE[kind]}
    wrong = [name for name, value in scaling.items() if isinstance(value, bool) or not isinstance(value, int | float)]
    if wrong:
        raise ConfigError(*[f"{where}: rope_scaling.{name} = {scaling[name]!r} is no number." for name in wrong])
    return float(theta), {"rope_type": kind, **scaling}


NEVER: Final[dict[str, tuple[Any, ...]]] = {
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "no_rope_layers": ((),),
    "clip_qkv": (None,),
}
"""Keys of any family that change what a model computes, with the values that there are here."""

_DENSE = {"hidden_act": ("silu", "swish")}
_EXPERT_KEYS = {"top_k": "num_experts_per_tok"}
_EXPERT = {name: f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")}

LLAMA = Layout(
    name="llama",
    class_name="LlamaForCausalLM",
    fixed=_DENSE | {"mlp_bias": (False,)},
    silent={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048},
    bias="attention_bias",
    output_bias=True,
)
MISTRAL = Layout(
    name="mistral",
    class_name="MistralForCausalLM",
    fixed=_DENSE,
    silent={
        **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 131072},
        **{"num_key_value_heads": 8, "sliding_window": 4096},
    },
    window="all",
)
QWEN2 = Layout(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    fixed=_DENSE,
    silent={
        **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 32768},
        **{"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    },
    bias="always",
    window="layers",
)
QWEN3 = replace(
    QWEN2,
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    silent={**QWEN2.silent, "head_dim": 128},
    bias="attention_bias",
    output_bias=True,
    qk_norm=("head",),
)
MIXTRAL = Layout(
    name="mixtral",
    class_name="MixtralForCausalLM",
    fixed=_DENSE | {"router_jitter_noise": (0.0,)},
    silent={
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 131072},
        **{"num_key_value_heads": 8, "rope_theta": 1e6},
    },
    window="all",
    router="softmax",
    expert_keys=_EXPERT_KEYS | {"num_experts": "num_local_experts", "width": "intermediate_size"},
    expert={name: f"block_sparse_moe.experts.{{}}.w{w}.weight" for name, w in (("gate", 1), ("down", 2), ("up", 3))},
    router_weight="block_sparse_moe.gate.weight",
)
QWEN3_MOE = Layout(
    name="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    fixed=_DENSE | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    silent={
        **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 32768},
        **{"num_key_value_heads": 4, "norm_topk_prob": False},
    },
    bias="attention_bias",
    output_bias=True,
    qk_norm=("head",),
    window="all",
    router="softmax",
    expert_keys=_EXPERT_KEYS | {"num_experts": "num_experts", "width": "moe_intermediate_size"},
    expert=_EXPERT,
)
OLMOE = Layout(
    name="olmoe",
    class_name="OlmoeForCausalLM",
    fixed=_DENSE | {"norm_topk_prob": (True,), "clip_qkv": (None,)},
    silent={
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 4096},
        **{"norm_topk_prob": False},
    },
    bias="attention_bias",
    output_bias=True,
    qk_norm=("all",),
    any_head_dim=False,
    router="softmax",
    expert_keys=_EXPERT_KEYS | {"num_experts": "num_experts", "width": "intermediate_size"},
    expert=_EXPERT,
)
QWEN2_MOE = Layout(
    name="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    fixed=_DENSE | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    silent={
        **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 32768},
        **{"num_key_value_heads": 16, "norm_topk_prob": False, "qkv_bias": True, "max_window_layers": 28},
    },
    bias="qkv_bias",
    window="layers",
    router="softmax",
    expert_keys={
        **_EXPERT_KEYS,
        **{"num_experts": "num_experts", "width": "moe_intermediate_size"},
        "shared_width": "shared_expert_intermediate_size",
    },
    expert=_EXPERT,
    shared={name: f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")},
    shared_gate="mlp.shared_expert_gate.weight",
)
GLM4_MOE = Layout(
    name="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    fixed=_DENSE
    | {"norm_topk_prob": (True,), "first_k_dense_replace": (0,), "partial_rotary_factor": (1.0,), "n_group": (1,)}
    | {"topk_group": (1,), "routed_scaling_factor": (1.0,), "num_nextn_predict_layers": (0, 1)},
    silent={
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 131072},
        **{"num_key_value_heads": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5},
    },
    bias="attention_bias",
    qk_norm=(None, "head"),
    qk_norm_key="use_qk_norm",
    router="sigmoid",
    expert_keys={
        **_EXPERT_KEYS,
        **{"num_experts": "n_routed_experts", "width": "moe_intermediate_size", "num_shared": "n_shared_experts"},
    },
    expert=_EXPERT,
    router_bias="mlp.gate.e_score_correction_bias",
    shared={name: f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
)

LAYOUTS: Final = {
    layout.name: layout for layout in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, OLMOE, QWEN2_MOE, GLM4_MOE)
}
"""All of them; of those that hold a model, the first is chosen."""


def layout_for(model: Architecture, asked: str = "auto") -> Layout:
    """Return the layout ``asked`` for, one of :data:`LAYOUTS`, or the first that holds ``model``.

    Raises:
        ConfigError: it does not hold the model, or none does.
    """
    reasons = {name: LAYOUTS[name].problems(model) for name in (LAYOUTS if asked == "auto" else [asked])}
    fitting = [name for name, found in reasons.items() if not found]
    if fitting:
        return LAYOUTS[fitting[0]]
    alike = [name for name in reasons if asked != "auto" or (LAYOUTS[name].router is None) == (model.experts is None)]
    others = [name for name, layout in LAYOUTS.items() if not layout.problems(model)]
    remedy = f" What holds it: --layout {others[0]}." if others else ""
    raise ConfigError(*[f"--layout {name}: {'; '.join(reasons[name])}.{remedy}" for name in alike])
