from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from apt_model.gpt import GPT
from apt_model.layers.feed_forward import as_dense
from apt_model.layers.moe import MoE
from apt_model.training.optimizer import follow_model, load_named_state, named_state, parameter_groups


def trained(steps: int = 3, **moe) -> tuple[GPT, torch.optim.AdamW]:
    torch.manual_seed(0)
    gpt = GPT(
        vocab_size=20,
        d_model=8,
        num_heads=2,
        num_layers=2,
        d_ff=16,
        seq_len=6,
        moe=partial(MoE, **({"num_experts": 4} | moe)),
    )
    optimizer = torch.optim.AdamW(parameter_groups(gpt, 0.1), lr=1e-3, fused=True)
    update(gpt, optimizer, steps)
    return gpt, optimizer


def update(gpt: GPT, optimizer: torch.optim.Optimizer, steps: int = 1) -> float:
    """Make so many updates; return the last loss, nan of none."""
    loss = math.nan
    for _ in range(steps):
        output = gpt(torch.randint(0, 20, (2, 6)), torch.randint(0, 20, (2, 6)))
        (output.language_loss + output.auxiliary_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = output.language_loss.item()
    return loss


def test_matrices_decay_and_vectors_do_not() -> None:
    gpt, optimizer = trained()
    decaying, constant = optimizer.param_groups
    assert (decaying["weight_decay"], constant["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decaying["params"])
    assert all(p.dim() == 1 for p in constant["params"])
    assert len(decaying["params"]) + len(constant["params"]) == len(list(gpt.parameters()))


def test_experts_take_over_their_share_of_the_moments() -> None:
    gpt, optimizer = trained()
    dense = dict(gpt.moe_layers[0].dense.named_parameters())
    before = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in dense.items()}
    gpt.enable_moe(True)
    follow_model(optimizer, gpt, gpt.take_lineage())
    for name, weight in gpt.moe_layers[0].experts.named_parameters():
        state = optimizer.state[weight]
        assert state["step"] == 3
        for expert in range(4):
            assert torch.allclose(state["exp_avg"][expert], before[name]["exp_avg"] / 4)
            assert torch.allclose(state["exp_avg_sq"][expert], before[name]["exp_avg_sq"] / 16)
    assert set(optimizer.state) <= set(gpt.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in gpt.parameters()}
    update(gpt, optimizer)  # the new parameters, the router's among them, are trained
    assert gpt.moe_layers[0].router.weight in optimizer.state


def test_folding_back_restores_the_moments() -> None:
    gpt, optimizer = trained()
    before = {k: v.clone() for k, v in optimizer.state[gpt.moe_layers[1].dense.up].items()}
    gpt.enable_moe(True)
    follow_model(optimizer, gpt, gpt.take_lineage())
    gpt.enable_moe(False)
    follow_model(optimizer, gpt, gpt.take_lineage())
    after = optimizer.state[gpt.moe_layers[1].dense.up]
    assert all(torch.allclose(after[name], before[name]) for name in before)


@pytest.mark.parametrize("granularity", [1, 2])
def test_copies_share_the_gradient_of_the_dense_layer(granularity: int) -> None:
    dense, sparse = (trained(0, num_experts=4, granularity=granularity, capacity_factor=None)[0] for _ in range(2))
    sparse.enable_moe(True)
    tokens, targets = torch.randint(0, 20, (2, 5, 6))
    for gpt in (dense, sparse):
        gpt(tokens, targets).language_loss.backward()
    copies = 4 // granularity
    for name, weight in dense.moe_layers[0].dense.named_parameters():
        experts = getattr(sparse.moe_layers[0].experts, name)
        assert torch.allclose(copies * as_dense(experts.grad, name, granularity=granularity), weight.grad, atol=1e-6)
    scales = {link.gradient_scale for link in sparse.take_lineage()}
    assert scales == {1 / copies}


def test_a_slice_takes_over_its_own_part_of_the_moments() -> None:
    gpt, optimizer = trained(num_experts=4, granularity=2)
    dense = dict(gpt.moe_layers[0].dense.named_parameters())
    before = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in dense.items()}
    gpt.enable_moe(True)
    follow_model(optimizer, gpt, gpt.take_lineage())
    experts = gpt.moe_layers[0].experts
    for expert in range(4):
        channels = slice(8, 16) if expert % 2 else slice(0, 8)
        up, down = (optimizer.state[weight] for weight in (experts.up, experts.down))
        assert torch.allclose(up["exp_avg"][expert], before["up"]["exp_avg"][channels] / 2)
        assert torch.allclose(down["exp_avg_sq"][expert], before["down"]["exp_avg_sq"][:, channels] / 4)
    gpt.enable_moe(False)
    follow_model(optimizer, gpt, gpt.take_lineage())
    for name, p in gpt.moe_layers[0].dense.named_parameters():
        assert all(torch.allclose(optimizer.state[p][key], before[name][key]) for key in before[name])


def test_beside_a_shared_expert_both_sides_get_half_the_gradient() -> None:
    gpt, optimizer = trained(shared_expert=True)
    dense = gpt.moe_layers[0].dense.up
    before = optimizer.state[dense]["exp_avg"].clone()
    gpt.enable_moe(True)
    follow_model(optimizer, gpt, gpt.take_lineage())
    assert torch.allclose(optimizer.state[dense]["exp_avg"], before / 2)
    assert torch.allclose(optimizer.state[gpt.moe_layers[0].experts.up]["exp_avg"][0], before / 8)


def test_state_by_name_survives_another_order_of_parameters() -> None:
    gpt, optimizer = trained()
    gpt.enable_moe(True)
    follow_model(optimizer, gpt, gpt.take_lineage())
    update(gpt, optimizer)
    saved = named_state(optimizer, gpt)

    fresh, other = trained(steps=0)
    fresh.enable_moe(True)
    fresh.load_state_dict(gpt.state_dict())
    other.param_groups[0]["params"].reverse()
    load_named_state(other, fresh, saved)
    restored = named_state(other, fresh)
    assert restored.keys() == saved.keys()
    for name, state in saved.items():
        assert all(torch.equal(restored[name][key], value) for key, value in state.items())
    assert other.param_groups[0]["weight_decay"] == pytest.approx(0.1)
