from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from apt_model.errors import ConfigError
from apt_model.layers.feed_forward import FeedForward
from apt_model.layers.in_place import MoEInPlace, add_experts, layers_in_place, moe_layers
from apt_model.schedule import Horizon, ScheduleRunner
from apt_model.training import subject
from apt_model.training.schedule_driver import bind
from tests.late import Late

transformers = Late("transformers")
pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs apt-launch[hf]")

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": {},
}

experts = partial(MoEInPlace, num_experts=4, top_k=2)


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SMALL, **KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # zero in a new model, and in no other
    return model.eval()


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_where_experts_come_and_where_they_go(kind: str, granularity: int) -> None:
    model = model_of(kind)
    tokens = torch.randint(0, 64, (2, 12))
    names = set(model.state_dict())
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        places = add_experts(model, partial(experts, granularity=granularity))
        assert len(places) == 2
        assert torch.equal(model(input_ids=tokens).logits, before)
        assert len(model.state_dict()) == len(names)
        subject.switches(model)["moe"](True)
        assert all(layer.enabled for layer in layers_in_place(model))
        assert torch.allclose(model(input_ids=tokens).logits, before, atol=1e-5)
        subject.switches(model)["moe"](False)
        assert torch.allclose(model(input_ids=tokens).logits, before, atol=1e-5)


def test_a_curriculum_finds_experts_and_router_temperatures_wherever_they_are() -> None:
    model = model_of("llama")
    add_experts(model, experts)
    schedule = ScheduleRunner(
        horizon=Horizon(epochs=4, updates_per_epoch=1),
        modules=["moe"],
        enable_moe_at_epoch=1,
        route_temp={"start": 1.5, "end": 0.5, "by": "epoch"},
    )
    bind(schedule, model)
    schedule.apply(schedule.planned.clock_at(3))
    assert [layer.temperature.item() for layer in moe_layers(model)] == [0.5, 0.5]
    assert all(layer.enabled for layer in moe_layers(model))
    assert schedule.targets == ["model.layers.0.mlp.temperature", "model.layers.1.mlp.temperature"]


def test_a_model_without_routers_is_told() -> None:
    schedule = ScheduleRunner(
        horizon=Horizon(epochs=4, updates_per_epoch=1), route_temp={"start": 1.5, "end": 0.5, "by": "epoch"}
    )
    with pytest.raises(ConfigError, match="the model has no router temperature: no layer of experts"):
        bind(schedule, nn.Linear(2, 2))


def test_gradients_of_the_whole_model_come_with_the_balance_loss() -> None:
    model = model_of("gpt_neox").train()
    add_experts(model, experts)
    subject.switches(model)["moe"](True)
    output = subject.Forward(model)(model, *torch.randint(0, 64, (2, 2, 12)))
    assert output.auxiliary_loss > 0
    assert output.routing.shape[0] == 2
    assert "moe/router_entropy" in output.metrics
    (output.language_loss + output.auxiliary_loss).backward()
    for layer in moe_layers(model):
        assert layer.router.weight.grad is not None
        assert all(weight.grad is not None for weight in layer.experts.parameters())


def test_a_layer_with_biases_is_as_experts_what_it_was() -> None:
    for ffn in ("swiglu", "gelu", "gelu_tanh", "relu2"):
        dense = FeedForward(d_model=8, d_ff=16, ffn=ffn, bias=True).double()
        for parameter in dense.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        expected = dense(x)
        for granularity in (1, 2):
            layer = MoEInPlace(dense, num_experts=4, top_k=2, granularity=granularity, capacity_factor=None)
            layer.enable(True)
            assert torch.allclose(layer(x), expected, atol=1e-12)
            layer.enable(False)
            assert torch.allclose(layer(x), expected, atol=1e-12)
            dense = layer.dense


class Gated(nn.Module):
    def __init__(self, activation: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 8, bias=bias), nn.Linear(4, 8, bias=False)
        self.down_proj, self.act_fn = nn.Linear(8, 4, bias=False), activation


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Linear(2, 2)), "Sequential has no feed-forward layer that experts can take the place of"),
        (nn.Sequential(Gated(nn.Tanh())), "0: its activation Tanh is none that experts have"),
        (nn.Sequential(Gated(nn.SiLU(), bias=True)), "0: some of its linear layers have biases"),
    ],
)
def test_what_experts_cannot_stand_for_is_told(model: nn.Module, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        add_experts(model, experts)
