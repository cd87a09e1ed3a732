from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.layers.feed_forward import FeedForward, grouped_linear, spread
from apt_model.layers.moe import MoE


def layer(d_model: int = 16, d_ff: int = 32, ffn: str = "swiglu", dtype: torch.dtype = torch.float32, **moe) -> MoE:
    torch.manual_seed(0)
    dense = FeedForward(d_model=d_model, d_ff=d_ff, ffn=ffn).to(dtype)
    for weight in dense.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return MoE(dense, **({"num_experts": 4, "top_k": 2} | moe)).to(dtype)


def apart(moe: MoE) -> MoE:
    """Switch on, and move experts and router away from where they began."""
    moe.enable(True)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return moe


def plain(moe: MoE, x: Tensor) -> tuple[Tensor, int]:
    """A mixture of SwiGLU experts token by token, worked out without the layer's own dispatch; also the drops."""
    rows = x.reshape(-1, x.shape[-1])
    weights = dict(moe.experts.named_parameters())
    probabilities = ((rows @ moe.router.weight.T) / moe.temperature).softmax(-1)
    wanted = []
    for t, p in enumerate(probabilities.tolist()):
        best = sorted(range(len(p)), key=lambda e: -p[e])[: moe.top_k]
        total = sum(p[e] for e in best)
        wanted += [(e, p[e] / total, t) for e in best]
    capacity = len(wanted)
    if not moe.dropless:
        capacity = math.ceil(round(moe.capacity_factor.item() * len(wanted) / moe.num_experts, 4))
    kept: dict[int, list[tuple[int, float]]] = {}
    drops = 0
    for e in range(moe.num_experts):
        queue = sorted((entry for entry in wanted if entry[0] == e), key=lambda entry: -entry[1])
        drops += max(0, len(queue) - capacity)
        for _, weight, t in queue[:capacity]:
            kept.setdefault(t, []).append((e, weight))
    out = torch.zeros_like(rows)
    for t, entries in kept.items():
        total = sum(weight for _, weight in entries)
        for e, weight in entries:
            up, down, gate = (weights[name][e] for name in ("up", "down", "gate"))
            out[t] += weight / total * (down @ (F.silu(gate @ rows[t]) * (up @ rows[t])))
    return out.view_as(x), drops


@pytest.mark.parametrize("capacity_factor", [None, 2.0, 1.0, 0.5])
def test_the_layer_equals_a_plain_loop_over_tokens(capacity_factor: float | None) -> None:
    moe = apart(layer(capacity_factor=capacity_factor))
    x = torch.randn(3, 11, 16)
    expected, drops = plain(moe, x)
    out, report = moe(x)
    assert torch.allclose(out, expected, atol=1e-5)
    assert report.metrics["moe/drop_fraction"].item() == pytest.approx(drops / 66)
    assert (drops > 0) == (capacity_factor in (1.0, 0.5))


@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("options", [{}, {"shared_expert": True}, {"router": "sigmoid"}])
@pytest.mark.parametrize("temperature", [0.3, 1.5])
@pytest.mark.parametrize("capacity", [1.0, 1.25])
def test_switching_on_leaves_the_function_as_it_was(
    ffn: str, options: dict, temperature: float, capacity: float
) -> None:
    moe = layer(ffn=ffn, **options)
    x = torch.randn(2, 40, 16)
    before, nothing = moe(x)
    moe.enable(True)
    moe.temperature.fill_(temperature)
    moe.capacity_factor.fill_(capacity)
    after, report = moe(x)
    assert nothing is None
    whole = report.metrics["moe/dropped_tokens"].item() == 0
    assert whole, "no token lost all its experts in this setting, so that the test compares all of them"
    assert torch.allclose(before, after, atol=1e-5)


def test_switching_off_at_once_gives_the_dense_layer_back() -> None:
    for shared in (False, True):
        moe = layer(shared_expert=shared)
        x = torch.randn(2, 5, 16)
        before = moe(x)[0]
        moe.enable(True)
        moe.enable(False)
        assert torch.allclose(moe(x)[0], before, atol=1e-6)
        assert {name for name, _ in moe.named_parameters()} == {"dense.up", "dense.down", "dense.gate"}


def test_only_parameters_in_use_exist() -> None:
    moe = layer()
    dense = 3 * 16 * 32
    assert sum(p.numel() for p in moe.parameters()) == dense
    moe.enable(True)
    assert sum(p.numel() for p in moe.parameters()) == 4 * dense + 4 * 16
    assert moe.dense is None


def test_gradients_are_right_in_float64_with_and_without_drops() -> None:
    for capacity_factor in (None, 0.75):
        moe = apart(layer(d_model=3, d_ff=5, dtype=torch.float64, num_experts=3, capacity_factor=capacity_factor))
        x = torch.randn(1, 6, 3, dtype=torch.float64, requires_grad=True)
        names, parameters = zip(*moe.named_parameters(), strict=True)

        def run(x: Tensor, *values: Tensor, moe=moe, names=names) -> tuple[Tensor, Tensor]:
            out, report = torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))
            return out, report.loss

        assert torch.autograd.gradcheck(run, (x, *parameters))


def test_gradients_stay_finite_where_slots_are_dropped() -> None:
    moe = apart(layer(capacity_factor=0.25))
    x = torch.randn(2, 32, 16, requires_grad=True)
    out, report = moe(x)
    (out.sum() + report.loss).backward()
    assert report.metrics["moe/drop_fraction"] > 0.5
    assert all(torch.isfinite(p.grad).all() for p in (x, *moe.parameters()))


def test_grouped_matrices_equal_a_loop_for_every_kind_of_size() -> None:
    ends = torch.tensor([3, 3, 10], dtype=torch.int32)
    for dtype, inner, outer in (
        (torch.float32, 8, 4),
        (torch.float32, 7, 5),
        (torch.float64, 8, 4),
        (torch.bfloat16, 8, 8),
    ):
        x, weight = torch.randn(12, inner, dtype=dtype), torch.randn(3, outer, inner, dtype=dtype)
        out = grouped_linear(x, weight, ends)
        assert out.shape == (12, outer)
        expected = torch.cat([x[:3] @ weight[0].T, x[3:10] @ weight[2].T])
        assert torch.allclose(out[:10].double(), expected.double(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_metrics_tell_of_load_and_certainty() -> None:
    moe = layer(num_experts=4, top_k=1, capacity_factor=None)
    moe.enable(True)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0, 0] = moe.router.weight[1, 1] = 50.0
    x = torch.zeros(1, 4, 16)
    x[0, :3, 0] = x[0, 3, 1] = 1.0  # three tokens to expert 0, one to expert 1
    metrics = {name: value.item() for name, value in moe(x)[1].metrics.items()}
    assert metrics["moe/max_load"] == pytest.approx(3.0)  # 3/4 of the slots against an equal share of 1/4
    assert metrics["moe/dead_experts"] == 2
    assert metrics["moe/load_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert metrics["moe/top1_probability"] == pytest.approx(1.0)
    assert metrics["moe/router_entropy"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["moe/balance_loss"] == pytest.approx(4 / 16 * (3 * 3 + 1 * 1))


def test_the_loss_is_weighted() -> None:
    moe = apart(layer(balance_loss_weight=0.5, z_loss_weight=0.25))
    report = moe(torch.randn(2, 8, 16))[1]
    expected = 0.5 * report.metrics["moe/balance_loss"] + 0.25 * report.metrics["moe/z_loss"]
    assert torch.allclose(report.loss, expected)


def test_a_sigmoid_router_balances_itself_in_training_only() -> None:
    moe = apart(layer(router="sigmoid", bias_update_rate=0.1))
    x = torch.randn(2, 16, 16)
    moe.eval()
    moe(x)
    assert not moe.router.bias.any()
    moe.train()
    moe(x)
    assert moe.router.bias.any()
    assert "router.bias" in moe.state_dict()


@pytest.mark.parametrize("counts", [[3, 0, 40, 9], [0, 0, 0, 0], [200, 1, 0, 0]])
def test_rows_spread_over_groups_of_round_sizes_are_found_again(counts: list[int]) -> None:
    ends = torch.tensor(counts).cumsum(0).int()
    x = torch.randn(sum(counts) + 5, 3)  # five past the last end
    spread_out, new_ends, place = spread(x, ends)
    kept = sum(counts)
    assert torch.equal(spread_out[place[:kept]], x[:kept])
    assert all(size % 8 == 0 for size in new_ends.tolist())
    assert len(place) == len(x)
    begins = [0, *new_ends.tolist()]
    groups = torch.searchsorted(new_ends, place[:kept], right=True)
    assert groups.tolist() == [group for group, count in enumerate(counts) for _ in range(count)]
    assert spread_out.abs().sum() == pytest.approx(x[:kept].abs().sum().item())
    assert len(spread_out) == begins[-1]


def test_experts_in_16_bits_compute_what_each_alone_does() -> None:
    experts = apart(layer()).experts
    x = torch.randn(74, 16).bfloat16()
    ends = torch.tensor([30, 30, 70, 71], dtype=torch.int32)
    weights = {name: weight.bfloat16() for name, weight in experts.named_parameters()}
    alone = []
    for expert, rows in enumerate((x[:30], x[30:30], x[30:70], x[70:71])):
        up, down, gate = (weights[name][expert] for name in ("up", "down", "gate"))
        alone.append((torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T)
    assert torch.allclose(experts(x, ends)[:71].float(), torch.cat(alone).float(), rtol=0.02, atol=0.02)
