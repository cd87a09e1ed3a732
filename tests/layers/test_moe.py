from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.errors import ConfigError
from apt_model.layers.feed_forward import FeedForward, grouped_linear
from apt_model.layers.moe import MoE, MoEReport
from apt_model.layers.tally import METRICS, layer_metrics


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


def spoil_free_memory(device: str) -> None:
    """Leave NaN where tensors will be, so that what nobody has written is seen."""
    _ = [torch.full((1000,), math.nan, device=device) for _ in range(1000)]


def metric(report: MoEReport | None, name: str) -> float:
    assert report is not None
    assert report.sums is not None
    return float(layer_metrics(report.sums.unsqueeze(0))[0, METRICS.index(name)])


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
    room = [capacity] * moe.num_experts
    drops = 0
    for e in range(moe.num_experts):
        queue = sorted((entry for entry in wanted if entry[0] == e), key=lambda entry: -entry[1])
        drops += max(0, len(queue) - capacity)
        for _, weight, t in queue[:capacity]:
            kept.setdefault(t, []).append((e, weight))
            room[e] -= 1
    copies = [range(e, e + moe.granularity) for e in range(0, moe.num_experts, moe.granularity)]
    for t in range(len(rows)):
        free = next((copy for copy in copies if all(room[e] > 0 for e in copy)), None)
        if t not in kept and free and moe.overflow == "reroute":
            kept[t] = [(e, 1.0) for e in free]
            for e in free:
                room[e] -= 1
    out = torch.zeros_like(rows)
    for t, entries in kept.items():
        total = sum(weight for _, weight in entries)
        for e, weight in entries:
            up, down, gate = (weights[name][e] for name in ("up", "down", "gate"))
            out[t] += moe.granularity * weight / total * (down @ (F.silu(gate @ rows[t]) * (up @ rows[t])))
    return out.view_as(x), drops


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("capacity_factor", [None, 2.0, 1.0, 0.5])
@pytest.mark.parametrize("overflow", ["reroute", "drop"])
def test_the_layer_equals_a_plain_loop_over_tokens(
    capacity_factor: float | None, granularity: int, overflow: str
) -> None:
    moe = apart(layer(capacity_factor=capacity_factor, granularity=granularity, overflow=overflow))
    x = torch.randn(3, 11, 16)
    expected, drops = plain(moe, x)
    out, report = moe(x)
    assert torch.allclose(out, expected, atol=1e-5)
    assert metric(report, "drop_fraction") == pytest.approx(drops / 66)
    assert (drops > 0) == (capacity_factor in (1.0, 0.5))


def test_the_layer_and_its_gradients_equal_the_mixtral_block_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    moe = apart(layer(num_experts=6, top_k=3, capacity_factor=None))
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=32, num_local_experts=6, num_experts_per_tok=3, router_jitter_noise=0.0
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        theirs.gate.weight.copy_(moe.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat((moe.experts.gate, moe.experts.up), dim=1))
        theirs.experts.down_proj.copy_(moe.experts.down)
    x = torch.randn(2, 20, 16)
    direction = torch.randn(2, 20, 16)
    ours_x, theirs_x = (x.clone().requires_grad_() for _ in range(2))
    ours_out, theirs_out = moe(ours_x)[0], theirs(theirs_x)
    assert torch.allclose(ours_out, theirs_out, atol=1e-5)
    (ours_out * direction).sum().backward()
    (theirs_out * direction).sum().backward()
    assert torch.allclose(ours_x.grad, theirs_x.grad, atol=1e-4)
    assert torch.allclose(moe.router.weight.grad, theirs.gate.weight.grad, atol=1e-4)
    assert torch.allclose(moe.experts.down.grad, theirs.experts.down_proj.grad, atol=1e-4)
    both = torch.cat((moe.experts.gate.grad, moe.experts.up.grad), dim=1)
    assert torch.allclose(both, theirs.experts.gate_up_proj.grad, atol=1e-4)


@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("options", [{}, {"shared_expert": True}, {"router": "sigmoid"}])
@pytest.mark.parametrize("temperature", [0.3, 1.5])
@pytest.mark.parametrize("capacity", [1.0, 1.25])
@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_switching_on_leaves_the_function_as_it_was(
    ffn: str, options: dict, temperature: float, capacity: float, granularity: int
) -> None:
    slices = {"num_experts": 4 * granularity, "top_k": 2 * granularity, "granularity": granularity}
    moe = layer(ffn=ffn, **options, **slices)
    x = torch.randn(2, 40, 16)
    before, nothing = moe(x)
    moe.enable(True)
    moe.temperature.fill_(temperature)
    moe.capacity_factor.fill_(capacity)
    after, report = moe(x)
    assert nothing is None
    whole = metric(report, "dropped_tokens") == 0
    assert whole, "no token lost all its experts in this setting, so that the test compares all of them"
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e-4, 1e-3, 3e-3, 1e-2, 1e3, 1e30])
@pytest.mark.parametrize("capacity", [None, 1.0, 1.25])
@pytest.mark.parametrize(("top_k", "granularity"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_no_temperature_moves_the_function_when_experts_begin(
    router: str, temperature: float, capacity: float | None, top_k: int, granularity: int
) -> None:
    """Scores underflow or saturate for most tokens, or are all the same; one token is 0, so that its logits are."""
    moe = layer(
        router=router,
        capacity_factor=capacity,
        num_experts=4 * granularity,
        top_k=top_k * granularity,
        granularity=granularity,
    )
    x = 3.0 * torch.randn(2, 40, 16) - 1.0
    x[1, 7] = 0.0
    before, _ = moe(x)
    moe.enable(True)
    moe.temperature.fill_(temperature)
    after, report = moe(x)
    assert torch.allclose(before, after, atol=1e-5)
    assert report is not None
    (after.sum() + report.loss).backward()
    assert all(weight.grad is not None and torch.isfinite(weight.grad).all() for weight in moe.parameters())


@pytest.mark.parametrize("granularity", [1, 2, 4])
@pytest.mark.parametrize("shared_expert", [False, True])
def test_tokens_that_all_experts_turned_away_leave_the_function_as_it_was_too(
    granularity: int, shared_expert: bool
) -> None:
    """One copy a token, and a router that sends most tokens to one copy."""
    slices = {"num_experts": 4 * granularity, "top_k": granularity, "granularity": granularity}
    x = torch.randn(2, 40, 16) + 2.0
    for overflow, same in (("reroute", True), ("drop", False)):
        torch.manual_seed(0)
        moe = layer(overflow=overflow, shared_expert=shared_expert, **slices)
        before, _ = moe(x)
        moe.enable(True)
        moe.capacity_factor.fill_(1.0)
        after, report = moe(x)
        assert metric(report, "dropped_tokens") > 0.2
        assert torch.allclose(before, after, atol=1e-5) == same


@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
def test_each_expert_begins_as_its_slice_of_the_dense_layer(ffn: str) -> None:
    moe = layer(ffn=ffn, num_experts=6, top_k=2, granularity=2)
    dense = {name: weight.detach().clone() for name, weight in moe.dense.named_parameters()}
    moe.enable(True)
    for expert in range(6):
        channels = slice(16, 32) if expert % 2 else slice(0, 16)
        assert torch.equal(moe.experts.up[expert], dense["up"][channels])
        assert torch.equal(moe.experts.down[expert], dense["down"][:, channels])
        assert ffn == "gelu" or torch.equal(moe.experts.gate[expert], dense["gate"][channels])
    rows = moe.router.weight
    assert torch.equal(rows[::2], rows[1::2]), "one weight for the two slices of a copy"
    assert len({tuple(row.tolist()) for row in rows}) == 3
    assert rows.std().item() == pytest.approx(0.02, rel=0.35)


def test_a_granularity_costs_a_token_what_whole_copies_cost() -> None:
    whole, fine = layer(), layer(num_experts=16, top_k=8, granularity=4)
    for moe in (whole, fine):
        moe.enable(True)
    assert sum(p.numel() for p in fine.experts.parameters()) == sum(p.numel() for p in whole.experts.parameters())
    assert fine.experts.up.shape == (16, 8, 16)
    assert 8 * fine.experts.up[0].numel() == 2 * whole.experts.up[0].numel()


def test_noise_makes_experts_differ_by_a_share_of_the_weights_deviation() -> None:
    dense = layer(d_model=64, d_ff=128).dense.up.detach().clone()
    for share, expected in ((None, 0.01), (0.1, 0.1)):
        moe = layer(d_model=64, d_ff=128, upcycling="noise", upcycling_share=share)
        moe.enable(True)
        noise = moe.experts.up - dense
        assert noise.std(dim=(1, 2)).tolist() == pytest.approx([expected * dense.std().item()] * 4, rel=0.05)
        assert noise.mean().item() == pytest.approx(0.0, abs=expected * dense.std().item() / 50)
        assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.05


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize(("share", "channels"), [(None, 0.5), (0.25, 0.25), (1.0, 1.0)])
def test_drop_draws_a_share_of_each_experts_channels_anew(
    share: float | None, channels: float, granularity: int
) -> None:
    slices = {"num_experts": 4, "granularity": granularity}
    copies, moe = (layer(d_model=64, d_ff=128, **slices, upcycling=how) for how in ("copy", "drop"))
    moe.upcycling_share = share
    copies.enable(True)
    moe.enable(True)
    changed = [moe.experts.up != copies.experts.up, moe.experts.gate != copies.experts.gate]
    changed += [(moe.experts.down != copies.experts.down).transpose(1, 2)]
    drawn = changed[0].all(dim=2)  # (experts, channels)
    assert all(torch.equal(each, drawn.unsqueeze(2).expand_as(each)) for each in changed), (
        "whole channels, the same in all"
    )
    assert drawn.sum(dim=1).tolist() == [round(channels * 128 / granularity)] * 4
    assert channels == 1.0 or len({tuple(row.tolist()) for row in drawn}) == 4, "each expert has its own"
    for expert in range(4):
        before, now = (m.experts.up[expert][drawn[expert]] for m in (copies, moe))
        assert now.std().item() == pytest.approx(before.std().item(), rel=0.1)
        assert now.mean().item() == pytest.approx(before.mean().item(), abs=0.03)
        assert torch.corrcoef(torch.stack((now.flatten(), before.flatten())))[0, 1].abs() < 0.15


def test_only_copies_promise_the_function_of_the_dense_layer() -> None:
    changes = {}
    for how in ("copy", "noise", "drop"):
        moe = layer(upcycling=how, capacity_factor=None)
        x = torch.randn(2, 40, 16)
        before = moe(x)[0]
        moe.enable(True)
        changes[how] = ((moe(x)[0] - before).norm() / before.norm()).item()
    assert changes["copy"] < 1e-6 < 1e-3 < changes["noise"] < 0.05 < changes["drop"]


def test_jitter_multiplies_the_routers_input_in_training_only() -> None:
    moe = apart(layer(jitter=0.5, capacity_factor=None))
    x = torch.randn(2, 16, 16)
    assert not torch.equal(moe(x)[0], moe(x)[0])
    moe.eval()
    assert torch.equal(moe(x)[0], moe(x)[0])
    router, ones = moe.router, torch.ones(200, 16)
    with torch.no_grad():
        router.weight.zero_()[:, 0] = 1.0
    drawn = router(ones, moe.temperature, moe.jitter).logits[:, 0]  # a noisy 1
    assert 0.5 <= drawn.min() < 0.55 < 1.45 < drawn.max() <= 1.5


def test_jitter_that_nobody_asked_for_is_not_drawn() -> None:
    moe = apart(layer())
    before = torch.get_rng_state()
    moe(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_the_cosine_of_experts_is_that_of_all_pairs_that_began_alike(granularity: int) -> None:
    moe = layer(num_experts=12, top_k=4, granularity=granularity)
    moe.enable(True)
    assert moe.experts.cosine().item() == pytest.approx(1.0, abs=1e-6)
    apart(moe)
    flat = torch.cat([weight.flatten(1) for weight in moe.experts.parameters()], dim=1)
    pairs = [(a, b) for a in range(12) for b in range(a) if a % granularity == b % granularity]
    expected = sum(F.cosine_similarity(flat[a], flat[b], dim=0).item() for a, b in pairs) / len(pairs)
    assert moe.experts.cosine().item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_switching_off_at_once_gives_the_dense_layer_back(granularity: int) -> None:
    for shared in (False, True):
        moe = layer(shared_expert=shared, num_experts=8, top_k=4, granularity=granularity)
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "sigmoid"},
        {"shared_expert": True},
        {"num_experts": 4, "granularity": 2, "ffn": "gelu"},
    ],
    ids=str,
)
def test_gradients_are_right_in_float64_with_and_without_drops(options: dict) -> None:
    for capacity_factor in (None, 0.75):
        sizes = {"d_model": 3, "d_ff": 4, "dtype": torch.float64, "num_experts": 3, "capacity_factor": capacity_factor}
        moe = apart(layer(**(sizes | options)))
        moe.eval()  # the sigmoid router's bias stays
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
    assert metric(report, "drop_fraction") > 0.5
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


def test_metrics_show_load_and_certainty() -> None:
    moe = layer(num_experts=4, top_k=1, capacity_factor=None)
    moe.enable(True)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[0, 0] = moe.router.weight[1, 1] = 50.0
    x = torch.zeros(1, 4, 16)
    x[0, :3, 0] = x[0, 3, 1] = 1.0  # three tokens to expert 0, one to expert 1
    report = moe(x)[1]
    assert metric(report, "max_load") == pytest.approx(3.0)  # 3/4 of the slots against an equal share of 1/4
    assert metric(report, "dead_experts") == 2
    assert metric(report, "load_entropy") == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert metric(report, "top1_probability") == pytest.approx(1.0)
    assert metric(report, "router_entropy") == pytest.approx(0.0, abs=1e-6)
    assert metric(report, "balance_loss") == pytest.approx(4 / 16 * (3 * 3 + 1 * 1))


def test_specialisation_is_what_a_sequence_says_about_its_experts() -> None:
    moe = layer(num_experts=4, top_k=1, capacity_factor=None)
    moe.enable(True)
    with torch.no_grad():
        moe.router.weight.copy_(50.0 * torch.eye(4, 16))

    def told(*sequences: list[int]) -> float:
        return metric(moe(F.one_hot(torch.tensor(sequences), 16).float())[1], "specialisation")

    assert told([0, 1, 0, 1], [0, 1, 1, 0]) == pytest.approx(0.0, abs=1e-6)
    assert told([0, 0, 0, 0], [1, 1, 1, 1]) == pytest.approx(math.log(2))
    # experts 0 to 2 have 4, 3 and 1 of 8 slots; the sequences' own loads are 4 of 4, and 3 and 1 of 4
    whole = -sum(n / 8 * math.log(n / 8) for n in (4, 3, 1))
    own = -sum(n / 4 * math.log(n / 4) for n in (3, 1)) / 2
    assert told([0, 0, 0, 0], [1, 1, 2, 1]) == pytest.approx(whole - own)


def test_sums_of_two_batches_give_the_metrics_of_one_batch_with_both() -> None:
    moe = apart(layer(capacity_factor=None))
    x = torch.randn(2, 30, 16)
    both, first, second = (moe(part)[1].sums for part in (x, x[:1], x[1:]))
    together, added = (layer_metrics(sums.unsqueeze(0))[0] for sums in (both, first + second))
    balance = METRICS.index("balance_loss")  # the one that is no mean over tokens: it is that of each batch
    assert torch.allclose(together[balance + 1 :], added[balance + 1 :], atol=1e-5)
    each = [layer_metrics(sums.unsqueeze(0))[0, balance] for sums in (first, second)]
    assert added[balance].item() == pytest.approx(sum(each).item() / 2)


def test_what_is_not_asked_for_is_not_reported_and_the_output_is_the_same() -> None:
    moe = apart(layer())
    x = torch.randn(2, 8, 16)
    told, silent = moe(x), moe(x, with_metrics=False)
    assert silent[1].sums is None
    assert torch.equal(told[0], silent[0])
    assert torch.equal(told[1].loss, silent[1].loss)


def test_the_loss_is_weighted() -> None:
    moe = apart(layer(balance_loss_weight=0.5, z_loss_weight=0.25))
    report = moe(torch.randn(2, 8, 16))[1]
    expected = 0.5 * metric(report, "balance_loss") + 0.25 * metric(report, "z_loss")
    assert report.loss.item() == pytest.approx(expected)


def test_a_sigmoid_router_balances_itself_in_training_only() -> None:
    moe = apart(layer(router="sigmoid", bias_update_rate=0.1))
    x = torch.randn(2, 16, 16)
    moe.eval()
    moe(x)
    moe.balance()
    assert not moe.router.bias.any()
    moe.train()
    first = moe(x)[0]
    assert torch.equal(moe(x)[0], first), "a pass that is computed again routes as it did"
    moe.balance()
    moved = moe.router.bias.clone()
    assert moved.abs().max().item() == pytest.approx(0.1)
    moe.balance()
    assert torch.equal(moe.router.bias, moved), "and moves the bias once"
    assert "router.bias" in moe.state_dict()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_experts_in_16_bits_compute_what_each_alone_does(device: str) -> None:
    experts = apart(layer()).experts.to(device)
    x = torch.randn(74, 16).bfloat16().to(device)
    ends = torch.tensor([30, 30, 70, 71], dtype=torch.int32, device=device)
    weights = {name: weight.bfloat16() for name, weight in experts.named_parameters()}
    alone = []
    for expert, rows in enumerate((x[:30], x[30:30], x[30:70], x[70:71])):
        up, down, gate = (weights[name][expert] for name in ("up", "down", "gate"))
        alone.append((torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T)
    spoil_free_memory(device)
    found, expected = experts(x, ends)[:71], torch.cat(alone)
    assert torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02)
    direction = torch.randn_like(found)
    for ours, theirs in zip(
        *(torch.autograd.grad(out, list(experts.parameters()), direction) for out in (found, expected)), strict=True
    ):
        assert torch.count_nonzero(ours[1]) == 0, "nobody came to the second expert"
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_a_gpu_gives_the_output_and_the_gradients_of_the_cpu(
    capacity_factor: float | None, dtype: torch.dtype, error: float
) -> None:
    moe = apart(layer(capacity_factor=capacity_factor, overflow="drop"))
    x, direction = torch.randn(2, 3, 40, 16)
    found = []
    for device in ("cpu", "cuda"):
        moe.to(device).zero_grad()
        given = x.detach().to(device).requires_grad_()
        spoil_free_memory(device)
        with torch.autocast(device, dtype=dtype, enabled=device == "cuda" and dtype != torch.float32):
            out = moe(given)[0]
        (out * direction.to(device)).sum().backward()
        found.append([tensor.cpu() for tensor in (out, given.grad, *(p.grad for p in moe.parameters()))])
    for exact, own in zip(*found, strict=True):
        assert (own - exact).norm() < error * exact.norm()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.3, "shared_expert": True},
        {"top_k": 1},
        {"router": "sigmoid", "top_k": 3},
        {"granularity": 2, "num_experts": 6, "top_k": 4},
        {"router": "sigmoid", "granularity": 2, "top_k": 2},
    ],
)
def test_experts_that_grow_leave_the_function_and_share_their_tokens(given: dict) -> None:
    moe = apart(layer(capacity_factor=None, **given))
    moe.router.bias.uniform_(-0.1, 0.1)
    x = torch.randn(4, 64, 16)
    routings: list = []
    before, _ = moe(x)
    moe.router.register_forward_hook(lambda router, inputs, routing: routings.append(routing))
    moe.lineage = []
    old = moe.num_experts
    frozen = moe.experts.up.detach().clone()
    moe.resize(4 * old)
    after, _ = moe(x)
    assert torch.allclose(after, before, atol=2e-5 * before.abs().max().item())
    assert torch.equal(moe.experts.up[2 * old : 3 * old], frozen)
    families = (routings[0].experts % old).sort(dim=1).values
    assert (families.diff(dim=1) > 0).all(), "of a family a token takes one"
    assert len(routings[0].experts.unique()) > 2.5 * old, "and all of them have tokens"
    scale = {link.gradient_scale for link in moe.lineage}
    assert scale == {0.25}
    moe.resize(old)
    assert torch.allclose(moe(x)[0], before, atol=2e-5 * before.abs().max().item())
    assert torch.equal(moe.experts.up, frozen)
    assert {link.gradient_scale for link in moe.lineage} == {4.0}


def test_copies_get_the_gradient_of_what_they_copy_in_parts_and_so_go_apart() -> None:
    moe = apart(layer(capacity_factor=None, balance_loss_weight=0.0, z_loss_weight=0.0))
    x = torch.randn(4, 64, 16)
    moe(x)[0].square().sum().backward()
    whole = {name: weight.grad.clone() for name, weight in moe.experts.named_parameters()}
    moe.resize(8)
    moe(x)[0].square().sum().backward()
    for name, weight in moe.experts.named_parameters():
        first, second = weight.grad.view(2, 4, *weight.shape[1:]).unbind()
        assert torch.allclose(first + second, whole[name], rtol=1e-3, atol=1e-3 * whole[name].abs().max().item())
        assert (first - second).norm() > 0.1 * whole[name].norm()


def test_experts_that_have_grown_stay_that_many_while_they_are_dense() -> None:
    moe = apart(layer())
    moe.resize(8)
    moe.enable(False)
    assert moe.dense.up.shape == (32, 16)
    moe.enable(True)
    assert moe.experts.up.shape[0] == moe.router.weight.shape[0] == 8
    assert moe.router.num_families == 4
    with pytest.raises(ConfigError, match=r"8 experts cannot become 12: .* such as 16"):
        moe.resize(12)
