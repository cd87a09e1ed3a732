from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from apt_model.gpt import GPT
from apt_model.layers.moe import MoE
from apt_model.training.muon import Muon, orthogonalised
from apt_model.training.optimizer import follow_model, groups_for, load_named_state, named_state
from tests.training.test_optimizer import update


def model_of(optimizer, **moe) -> tuple[GPT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 16, "seq_len": 6}
    gpt = GPT(**sizes, moe=partial(MoE, **({"num_experts": 4} | moe)))
    made = optimizer(groups_for(optimizer, gpt, 0.1))
    update(gpt, made, 3)
    return gpt, made


def pair(shape: tuple[int, ...]) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    weight = torch.nn.Parameter(torch.randn(shape))
    return weight, torch.nn.Parameter(weight.detach().clone())


def trained_alike(one, first, other, second, updates: int = 5) -> bool:
    for _ in range(updates):
        gradient = torch.randn(one.shape)
        one.grad, other.grad = gradient, gradient.clone()
        first.step()
        second.step()
    return torch.equal(one, other)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_on_matrices_it_is_torchs_to_the_bit(adjust: str, nesterov: bool, shape: tuple[int, int]) -> None:
    one, other = pair(shape)
    theirs = torch.optim.Muon([one], lr=0.1, weight_decay=0.1, adjust_lr_fn=adjust, nesterov=nesterov)
    ours = Muon([{"params": [other], "use_muon": True}], lr=0.1, weight_decay=0.1, adjust=adjust, nesterov=nesterov)
    assert trained_alike(one, theirs, other, ours)


def test_on_the_rest_it_is_adamw() -> None:
    one, other = pair((7,))
    theirs = torch.optim.AdamW([one], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    assert trained_alike(one, theirs, other, Muon([other], lr=0.1, weight_decay=0.1))


def test_experts_are_as_many_matrices() -> None:
    experts = torch.randn(3, 8, 16)
    alone = torch.stack([orthogonalised(expert) for expert in experts])
    assert torch.allclose(orthogonalised(experts), alone, atol=1e-2)  # bf16
    values = torch.linalg.svdvals(orthogonalised(experts.mT).float())
    assert values.min() > 0.5
    assert values.max() < 1.5
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([torch.nn.Parameter(experts)])


def test_embeddings_and_vectors_are_adamws_and_vectors_do_not_decay() -> None:
    gpt, optimizer = model_of(partial(Muon, lr=1e-2))
    muon, tables, vectors = optimizer.param_groups
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False, False]
    assert tables["params"] == [gpt.embedding.weight]
    assert all(p.dim() == 2 for p in muon["params"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert set(vectors["params"]) == {p for p in gpt.parameters() if p.dim() == 1}


def test_momentum_is_carried_over_the_switch_and_back() -> None:
    gpt, optimizer = model_of(partial(Muon, lr=1e-2))
    dense = gpt.moe_layers[0].dense
    before = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in dense.named_parameters()}
    gpt.enable_moe(True)
    follow_model(optimizer, gpt, gpt.take_lineage())
    for name, weight in gpt.moe_layers[0].experts.named_parameters():
        assert weight in set(optimizer.param_groups[0]["params"])
        for expert in optimizer.state[weight]["momentum_buffer"]:
            assert torch.allclose(expert, before[name] / 4)
    update(gpt, optimizer)
    saved = named_state(optimizer, gpt)
    again, other = model_of(partial(Muon, lr=1e-2))
    again.enable_moe(True)
    again.load_state_dict(gpt.state_dict())
    again.take_lineage()
    load_named_state(other, again, saved)
    torch.manual_seed(1)
    loss = update(gpt, optimizer, 2)
    torch.manual_seed(1)
    assert update(again, other, 2) == loss
    gpt.enable_moe(False)
    follow_model(optimizer, gpt, gpt.take_lineage())
    update(gpt, optimizer)


OTHERS = {
    "SGD": {"momentum": 0.9, "fused": True},
    "Adafactor": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Rprop": {},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("granularity", [1, 2])
def test_every_optimizer_of_torchs_follows_a_switch(
    name: str, granularity: int, caplog: pytest.LogCaptureFixture
) -> None:
    gpt, optimizer = model_of(partial(getattr(torch.optim, name), lr=1e-3, **OTHERS[name]), granularity=granularity)
    gpt.enable_moe(True)
    follow_model(optimizer, gpt, gpt.take_lineage())
    update(gpt, optimizer, 2)
    gpt.freeze("blocks.0.ffn.experts", True)
    update(gpt, optimizer)
    gpt.freeze("blocks.0.ffn.experts", False)
    follow_model(optimizer, gpt, gpt.take_lineage())
    update(gpt, optimizer)
    gpt.enable_moe(False)
    follow_model(optimizer, gpt, gpt.take_lineage())
    update(gpt, optimizer)
    assert all(torch.isfinite(p).all() for p in gpt.parameters())
    assert not caplog.records


def test_rows_and_columns_of_second_moments_are_carried_over() -> None:
    gpt, optimizer = model_of(partial(torch.optim.Adafactor, lr=1e-3))
    dense = gpt.moe_layers[0].dense
    before = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in dense.named_parameters()}
    gpt.enable_moe(True)
    follow_model(optimizer, gpt, gpt.take_lineage())
    up = optimizer.state[gpt.moe_layers[0].experts.up]
    assert (up["row_var"].shape, up["col_var"].shape) == ((4, 16, 1), (4, 1, 8))
    for expert in range(4):
        assert torch.allclose(up["row_var"][expert], before["up"]["row_var"] / 16)
        assert torch.allclose(up["col_var"][expert], before["up"]["col_var"] / 16)


class Preconditioned(torch.optim.SGD):
    """Keeps something that says nothing of a weight's parts."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.dim() == 2:
                    self.state[p].setdefault("left", torch.eye(p.shape[0]))
        return super().step(closure)


def test_what_cannot_be_carried_over_is_told(caplog: pytest.LogCaptureFixture) -> None:
    gpt, optimizer = model_of(partial(Preconditioned, lr=1e-3, momentum=0.9))
    gpt.enable_moe(True)
    with caplog.at_level(logging.WARNING):
        follow_model(optimizer, gpt, gpt.take_lineage())
    (record,) = caplog.records
    assert "Preconditioned keeps left, which cannot be handed on" in record.getMessage()
    assert gpt.moe_layers[0].experts.up not in optimizer.state
    update(gpt, optimizer)
