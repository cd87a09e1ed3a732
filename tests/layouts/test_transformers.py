"""What transformers computes with the folders that are written here, and what is computed here with those that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from apt_launch.config.instantiate import build_model
from apt_launch.config.run_config import RunConfig
from apt_launch.export import OPTIONAL
from apt_model.data.tokenizer import train_tokenizer
from apt_model.generation import Sampling, generate
from apt_model.gpt import GPT
from apt_model.layers.moe import MoE
from apt_model.layouts.architecture import Architecture, ExpertLayers
from apt_model.layouts.families import LAYOUTS, layout_for
from apt_model.layouts.folder import WeightsFolder
from apt_model.layouts.pretrained import PretrainedGPT
from apt_model.layouts.writing import write_weights
from tests.conftest import SMALL

SIZES = {"vocab_size": 50, "d_model": 16, "num_heads": 4, "num_layers": 2, "d_ff": 24, "seq_len": 20}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 8}
GROUPED = {"num_kv_heads": 2, "tie_embeddings": False}


def experts(**options: Any) -> dict[str, Any]:
    return {"num_experts": 8, "top_k": 2} | options


OUT: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    # the layout that is chosen, options of experts (None: dense), options of the model
    "dense": ("llama", None, {}),
    "untied, grouped queries": ("llama", None, GROUPED),
    "biases": ("llama", None, {"qkv_bias": True}),
    "scaled as Llama 3": ("llama", None, {"rope_scaling": LLAMA3, "rope_theta": 5e5, "norm_eps": 1e-5}),
    "scaled linearly": ("llama", None, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "a window": ("mistral", None, {"sliding_window": 5}),
    "a window and biases": ("qwen2", None, {"sliding_window": 5, "qkv_bias": True}),
    "normalised heads": ("qwen3", None, {"qk_norm": "head", "head_dim": 8, "sliding_window": 5, **GROUPED}),
    "softmax": ("mixtral", experts(), {}),
    "one expert a token": ("mixtral", experts(top_k=1), {}),
    "all experts a token": ("mixtral", experts(top_k=8), {}),
    "slices": ("mixtral", experts(granularity=2, top_k=4), {"sliding_window": 5}),
    "three slices": ("mixtral", experts(granularity=3, num_experts=12, top_k=6), GROUPED),
    "experts and normalised heads": (
        "qwen3_moe",
        experts(),
        {"qk_norm": "head", "qkv_bias": True, "sliding_window": 5},
    ),
    "slices and normalised heads": ("qwen3_moe", experts(granularity=2), {"qk_norm": "head", "head_dim": 8, **GROUPED}),
    "normalised at once": ("olmoe", experts(granularity=2), {"qk_norm": "all", **GROUPED}),
    "biases of experts' layers": ("qwen2_moe", experts(), {"qkv_bias": True, "sliding_window": 5}),
    "a shared expert": ("qwen2_moe", experts(shared_expert=True), {}),
    "slices, a shared expert": ("qwen2_moe", experts(granularity=2, shared_expert=True), {"qkv_bias": True, **GROUPED}),
    "sigmoid": ("glm4_moe", experts(router="sigmoid"), {}),
    "sigmoid, one expert a token": ("glm4_moe", experts(router="sigmoid", top_k=1), {"rope_theta": 1e5}),
    "sigmoid, slices, a shared expert": (
        "glm4_moe",
        experts(router="sigmoid", granularity=3, num_experts=12, top_k=3, shared_expert=True),
        {"qk_norm": "head", "qkv_bias": True, **GROUPED},
    ),
}


def trained(moe: dict[str, Any] | None, **options: Any) -> tuple[GPT, Architecture]:
    """A model whose weights are all of their own, as after training, with a temperature of 1.3; and what it is."""
    torch.manual_seed(0)
    gpt = GPT(**SIZES, **options, moe=partial(MoE, **(moe or experts()))).eval()
    gpt.enable_moe(moe is not None)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for layer in gpt.moe_layers:
            layer.temperature.fill_(1.3)
            if layer.router is not None:
                layer.router.bias.normal_(std=0.1 if layer.scoring == "sigmoid" else 0.0)
    return gpt, Architecture.of(SIZES | options | {"ffn": "swiglu"}, ExpertLayers.of(gpt))


def write(folder: Path, gpt: GPT, model: Architecture, layout: str = "auto", dtype: str = "fp32") -> str:
    chosen = layout_for(model, layout)
    folder.mkdir()
    write_weights(folder, chosen, list(chosen.tensors(model)), gpt.state_dict(), dtype, 20_000)
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(chosen.config(model) | {"torch_dtype": "float32"} | tokens))
    return chosen.name


def loaded(folder: Path) -> Any:
    """What transformers loads, once it has found all that it looked for, and nothing else."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def difference(theirs: Any, ours: GPT) -> float:
    tokens = torch.randint(0, 50, (4, 20))
    with torch.no_grad():
        one, other = theirs(tokens).logits, ours(tokens).logits
    assert other.std() > 0.5, "logits that say something"
    return (one - other).abs().max().item()


@pytest.mark.parametrize("case", OUT)
def test_transformers_computes_the_same_logits(case: str, tmp_path: Path) -> None:
    layout, moe, options = OUT[case]
    gpt, model = trained(moe, **options)
    assert write(tmp_path / "out", gpt, model) == layout
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 1, "several files"
    assert difference(loaded(tmp_path / "out"), gpt) < 1e-5


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_have_grown_leave_as_what_a_plain_router_does_with_them(top_k: int, tmp_path: Path) -> None:
    gpt, _ = trained(experts(top_k=top_k, num_experts=4))
    with torch.no_grad():
        for layer in gpt.moe_layers:
            layer.resize(8)
            for parameter in (*layer.experts.parameters(), *layer.router.parameters()):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    families = OPTIONAL["families"]
    assert families.is_there(gpt) == (top_k > 1)
    if top_k > 1:
        families.leave_out(gpt)
    write(tmp_path / "out", gpt, Architecture.of(SIZES | {"ffn": "swiglu"}, ExpertLayers.of(gpt)))
    theirs = loaded(tmp_path / "out")
    assert theirs.config.num_local_experts == 8
    assert difference(theirs, gpt) < 1e-5


@pytest.mark.parametrize(
    ("layout", "moe"), [("qwen2", None), ("qwen2_moe", experts()), ("glm4_moe", experts(router="sigmoid"))]
)
def test_a_layout_that_always_has_a_part_gets_one_that_does_nothing(layout: str, moe: Any, tmp_path: Path) -> None:
    gpt, model = trained(moe)
    write(tmp_path / "out", gpt, model, layout)
    assert difference(loaded(tmp_path / "out"), gpt) < 1e-5


def test_greedy_text_is_the_same(tmp_path: Path) -> None:
    gpt, model = trained(experts(granularity=2, top_k=4), **GROUPED)
    write(tmp_path / "out", gpt, model)
    prompt = [7, 3, 11]
    ours = generate(gpt, [prompt], max_new_tokens=16, sampling=Sampling(temperature=0)).tokens[0]
    theirs = loaded(tmp_path / "out").generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert theirs[0, 3:].tolist() == ours
    assert len(set(ours)) > 2, "not always the same token"


# --- in --------------------------------------------------------------------------------------------------------------

THEIRS = {
    **{"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None},
}
NORMALISED = {"norm_topk_prob": True}
GLM = {"moe_intermediate_size": 12, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0, "head_dim": 4}
IN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("LlamaConfig", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "llama, scaled": ("LlamaConfig", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "llama, biases of zeros": ("LlamaConfig", {"attention_bias": True, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": 5, "head_dim": 8}),
    "mistral without a window": ("MistralConfig", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 5}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        NORMALISED | {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "head_dim": 8},
    ),
    "olmoe": ("OlmoeConfig", NORMALISED | {"num_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        NORMALISED
        | {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", GLM | {"n_routed_experts": 4, "num_experts_per_tok": 2, "use_qk_norm": True}),
    "glm4_moe, wider shared experts": (
        "Glm4MoeConfig",
        GLM | {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 3, "attention_bias": True},
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> str:
    content = train_tokenizer(["some text of a few words, and some more text\n" * 9], 300).content
    assert content is not None
    return content


def save(name: str, options: dict[str, Any], folder: Path, tokenizer: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers' own, saved in several files."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    config = getattr(transformers, name)(**{**THEIRS, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if not path.endswith(("o_proj.bias", "shared_expert_gate.weight")):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for path, parameter in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith("shared_expert_gate.weight"):
                parameter.zero_()
            elif path.endswith("e_score_correction_bias"):
                parameter.normal_(std=0.1)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text(tokenizer)
    return model


@pytest.fixture
def pretrained(composed: Callable[..., RunConfig], text_file: Path) -> Callable[..., RunConfig]:
    """Compose a very small run that begins with a folder."""
    rest = [override for override in SMALL if not override.startswith("model.")]
    text = ("data=text", f"data.path={text_file}", "model=pretrained", "model.seq_len=32")
    sparse = ("moe=pretrained", "schedule=none", "schedule.enable_moe_at_epoch=0")

    def compose(folder: Path, *more: str) -> RunConfig:
        if LAYOUTS[json.loads((folder / "config.json").read_text())["model_type"]].router is not None:
            return composed(
                *(one for one in rest if not one.startswith("moe.")), *text, f"model.path={folder}", *sparse
            )
        return composed(*rest, *text, f"model.path={folder}", *more)

    return compose


def imported(config: RunConfig) -> GPT:
    model = build_model(config.values).eval()
    assert isinstance(model, PretrainedGPT)
    model.load_pretrained()
    return model


@pytest.mark.parametrize("case", IN)
def test_logits_here_are_those_of_transformers(
    case: str, pretrained: Callable[..., RunConfig], tokenizer: str, tmp_path: Path
) -> None:
    name, options = IN[case]
    theirs = save(name, options, tmp_path / "in", tokenizer)
    ours = imported(pretrained(tmp_path / "in"))
    assert difference(theirs, ours) < 1e-5


@pytest.mark.parametrize("case", IN)
def test_a_round_trip_is_bitwise(
    case: str, pretrained: Callable[..., RunConfig], tokenizer: str, tmp_path: Path
) -> None:
    name, options = IN[case]
    save(name, options, tmp_path / "in", tokenizer, torch.bfloat16)
    config = pretrained(tmp_path / "in")
    there = json.loads((tmp_path / "in" / "config.json").read_text())
    ours = imported(config)
    described = Architecture.of(config.values["model"], ExpertLayers.of(ours))
    assert write(tmp_path / "out", ours, described, there["model_type"], "bf16")
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    in_full = {name for name, tensor in after.items() if tensor.dtype == torch.float32}
    assert all(name.endswith("e_score_correction_bias") for name in in_full)
    back = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("max_position_embeddings", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "num_key_value_heads"):
        assert back[key] == there[key]
    assert WeightsFolder(tmp_path / "out").architecture == WeightsFolder(tmp_path / "in").architecture


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in IN.values()))
def test_what_a_config_does_not_say_is_what_transformers_takes_for_it(name: str) -> None:
    import transformers

    kind = getattr(transformers, name)
    said = {key: THEIRS[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    said["intermediate_size"] = 24
    if LAYOUTS[kind.model_type].router is not None:  # what has to be said
        said |= GLM if name.startswith("Glm") else NORMALISED
        said |= {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
        said[LAYOUTS[kind.model_type].expert_keys["num_experts"]] = 4
    theirs, ours = kind(**said), LAYOUTS[kind.model_type].read(said, "here")
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 4)
    assert (ours.norm_eps, ours.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or None)


def test_the_switch_to_experts_leaves_a_pretrained_models_logits(
    pretrained: Callable[..., RunConfig], tokenizer: str, tmp_path: Path
) -> None:
    theirs = save("LlamaConfig", {"attention_bias": False}, tmp_path / "in", tokenizer)
    for more in ((), ("moe.granularity=2", "moe.top_k=4"), ("moe.shared_expert=true",), ("moe.router=sigmoid",)):
        ours = imported(pretrained(tmp_path / "in", *more))
        ours.enable_moe(True)
        assert difference(theirs, ours) < 1e-5, more


def tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return found
