"""Folders that are damaged, cut off, or of something else are refused with what is wrong where."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_model.errors import ConfigError
from apt_model.gpt import GPT
from apt_model.layers.moe import MoE
from apt_model.layouts.architecture import Architecture
from apt_model.layouts.families import LAYOUTS, LLAMA, QWEN3
from apt_model.layouts.folder import INDEX, SEALS, WEIGHTS, WeightsFolder
from apt_model.layouts.reading import read_weights
from apt_model.layouts.source import locate
from apt_model.layouts.writing import seal, write_weights

SIZES = {"vocab_size": 30, "d_model": 8, "num_heads": 2, "num_layers": 1, "d_ff": 12, "seq_len": 10, "ffn": "swiglu"}


def model() -> GPT:
    return GPT(**SIZES, moe=lambda dense, dropout: MoE(dense, num_experts=2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole folder, with checksums."""
    path = tmp_path / "weights"
    path.mkdir()
    described = Architecture.of(SIZES)
    write_weights(path, LLAMA, list(LLAMA.tensors(described)), model().state_dict(), "fp32", 1 << 20)
    (path / "config.json").write_text(json.dumps(LLAMA.config(described)))
    seal(path, {})
    return path


def read(folder: Path) -> GPT:
    found = model()
    read_weights(WeightsFolder(folder), found)
    return found


def test_a_whole_folder_is_read_as_it_was_written(folder: Path) -> None:
    found, stored = read(folder), load_file(folder / WEIGHTS)
    assert torch.equal(found.embedding.weight, stored["model.embed_tokens.weight"])
    keys = found.blocks[0].attention.qkv.weight[8:16]
    assert torch.equal(keys, stored["model.layers.0.self_attn.k_proj.weight"])


def cut(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-5])


def cut_in_its_header(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:40])


def one_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def another_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))


def a_header(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text.encode())

    return change


def an_index(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))

    return change


def nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "is not what was written"),
        (one_byte, "is not what was written"),
        (another_config, "config.json is not what was written"),
        (nothing, "has no file 'model.safetensors'"),
    ],
)
def test_what_is_not_what_was_written_is_refused(folder: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=told):
        read(folder)


def tensors(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        for name, tensor in changes.items():
            name = name.replace("__", ".")
            if tensor is None:
                del found[name]
            else:
                found[name] = tensor
        save_file(found, folder / WEIGHTS)

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"has [\d,]+ bytes instead of [\d,]+: it is cut off"),
        (cut_in_its_header, "is no file of safetensors, or damaged"),
        (tensors(model__norm__weight=None), "has no tensor 'model.norm.weight'"),
        (tensors(model__norm__weight=torch.ones(9)), r"model.norm.weight has the shape \(9,\) instead of \(8,\)"),
        (tensors(model__norm__weight=torch.ones(8, dtype=torch.int8)), "model.norm.weight is of I8"),
        (tensors(model__norm__weight=torch.full((8,), torch.nan)), "model.norm.weight has numbers that are not finite"),
        (tensors(model__layers__0__mlp__up_proj__bias=torch.ones(12)), "'model.layers.0.mlp.up_proj.bias' has no"),
        (
            a_header('{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}'),
            "or damaged: its header has no names",
        ),
        (an_index("model-00002-of-00002.safetensors"), "has no file 'model-00002-.* names it: fetch the folder again"),
        (an_index("../weights/model.safetensors"), "has no file '../weights/model.safetensors'"),
        (config(model_type="lama"), "model_type = 'lama' has no counterpart here. Did you mean 'llama'"),
        (
            config(model_type="gpt2"),
            "model_type = 'gpt2' has no counterpart here. Valid names: glm4_moe, llama, mistral",
        ),
        (config(hidden_act="gelu"), "hidden_act = 'gelu' has no counterpart here"),
        (config(mlp_bias=True), "mlp_bias = True has no counterpart"),
        (config(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "of the type 'yarn' has no counterpart here"),
        (config(rope_scaling={"type": "linear"}), "rope_scaling.factor = None is no number"),
        (config(quantization_config={"bits": 4}), "quantization_config"),
        (config(hidden_size="8"), "hidden_size = '8' is no int"),
        (config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000 is no int that a model could have"),
        (config(num_hidden_layers=10**4), "has 11 tensors, which are too few for what config.json says of layers"),
        (config(num_hidden_layers=2), "has no tensor 'model.layers.1.input_layernorm.weight'"),
    ],
)
def test_what_has_no_counterpart_or_is_damaged_is_refused_by_name(
    folder: Path, damage: Callable[[Path], None], told: str
) -> None:
    (folder / SEALS).unlink()  # as folders of others
    damage(folder)
    with pytest.raises(ConfigError, match=told):
        read(folder)


def test_layers_that_differ_in_their_window_are_refused() -> None:
    said = {"model_type": "qwen3", "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 9}
    said |= {"intermediate_size": 8, "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2}
    with pytest.raises(ConfigError, match="layer_types: some layers have a window"):
        QWEN3.read(said, "here")
    assert QWEN3.read(said | {"max_window_layers": 4}, "here").sliding_window is None
    assert QWEN3.read(said | {"max_window_layers": 0, "sliding_window": 7}, "here").sliding_window == 7


def test_a_bias_that_is_not_zero_is_refused_where_there_is_none_here(folder: Path) -> None:
    (folder / SEALS).unlink()
    biases = {f"model__layers__0__self_attn__{name}_proj__bias": torch.zeros(8) for name in "qkvo"}
    config(attention_bias=True)(folder)
    tensors(**biases)(folder)
    biased = GPT(**SIZES, qkv_bias=True, moe=lambda dense, dropout: MoE(dense, num_experts=2))
    read_weights(WeightsFolder(folder), biased)
    tensors(model__layers__0__self_attn__o_proj__bias=torch.ones(8))(folder)
    with pytest.raises(ConfigError, match=r"o_proj\.bias has no counterpart here, unless it is zero"):
        read_weights(WeightsFolder(folder), biased)


def test_a_place_that_is_none_is_told_with_what_could_be_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder 'nowhere' .* Name a folder as transformers saves it"):
        locate("nowhere")
    with pytest.raises(ConfigError, match=r"there is no file .*model.gguf"):
        locate(str(tmp_path / "model.gguf"))
    with pytest.raises(ConfigError, match="cannot be fetched from the Hugging Face hub"):
        locate("nobody/nothing")  # the tests' environment asks no network


def test_experts_that_have_no_counterpart_are_refused_by_name() -> None:
    said = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 9,
    }
    said |= {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 4, "norm_topk_prob": True}
    said |= {"shared_expert_intermediate_size": 12}
    found = LAYOUTS["qwen2_moe"].read(said, "here")
    assert found.experts is not None
    assert (found.d_ff, found.experts.granularity, found.experts.shared_expert) == (12, 3, True)
    for changes, told in (
        ({"norm_topk_prob": None}, "norm_topk_prob = False has no counterpart here; it would have to be True"),
        ({"num_experts": None}, "num_experts = None is no int"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok = 7 is more than there are experts, 6"),
        (
            {"shared_expert_intermediate_size": 10},
            "shared_expert_intermediate_size: the shared expert has to be as wide as",
        ),
        ({"shared_expert_intermediate_size": 16}, r"divides 6 \(those that there are\) and 3"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] has no counterpart"),
    ):
        with pytest.raises(ConfigError, match=told):
            LAYOUTS["qwen2_moe"].read(
                {key: value for key, value in (said | changes).items() if value is not None}, "here"
            )
    for changes, told in (
        ({}, "first_k_dense_replace = 1 has no counterpart here"),
        ({"first_k_dense_replace": 0}, "partial_rotary_factor = 0.5 has no counterpart here"),
    ):
        with pytest.raises(ConfigError, match=told):
            LAYOUTS["glm4_moe"].read(said | {"n_routed_experts": 6} | changes, "here")


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no config.json. It is an adapter, .*merge_and_unload"):
        WeightsFolder(tmp_path).config  # noqa: B018


def test_numbers_that_16_bits_have_no_room_for_are_refused(tmp_path: Path) -> None:
    described, state = Architecture.of(SIZES), model().state_dict()
    state["norm.weight"][3] = 70_000.0
    pieces = list(LLAMA.tensors(described))
    write_weights(tmp_path, LLAMA, pieces, state, "bf16", 1 << 20)
    with pytest.raises(ConfigError, match=r"--dtype: model.norm.weight has 70000, which torch.float16 has no room for"):
        write_weights(tmp_path, LLAMA, pieces, state, "fp16", 1 << 20)
    state["norm.weight"][3] = torch.nan
    with pytest.raises(ConfigError, match=r"RUN: norm.weight has numbers that are not finite"):
        write_weights(tmp_path, LLAMA, pieces, state, "fp32", 1 << 20)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    described, state = Architecture.of(SIZES), model().state_dict()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_weights(tmp_path, LLAMA, list(LLAMA.tensors(described)), state, "fp32", 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
