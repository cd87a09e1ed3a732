from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.layers import cpu_experts
from apt_model.layers.cpu_experts import STEP, combine, compute, gather, places, tile_rows
from apt_model.layers.router import Dispatch


def dispatched(experts: list[list[int | None]], num_experts: int) -> Dispatch:
    """Tokens at experts, None where nobody computes the slot; a token's weights are equal."""
    slots = [expert for of_token in experts for expert in of_token]
    order = sorted(range(len(slots)), key=lambda slot: num_experts if slots[slot] is None else slots[slot])
    kept = torch.tensor([[expert is not None for expert in of_token] for of_token in experts])
    counts = torch.tensor([slots.count(expert) for expert in range(num_experts)])
    weights = kept / kept.sum(dim=1, keepdim=True).clamp(min=1)
    return Dispatch(torch.tensor(order), weights, counts.cumsum(0).int(), counts, kept)


SOME = [[2, 0], [0, None], [None, None], [2, 3], [2, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_slot_has_a_place_among_those_of_its_expert(dtype: torch.dtype) -> None:
    where = places(dispatched(SOME, num_experts=4), dtype)
    ends = where.ends.tolist()
    assert ends == ([3, 3, 6, 7] if dtype == torch.float32 else [8, 8, 16, 24])
    taken = set()
    for token, of_token in enumerate(SOME):
        for slot, expert in enumerate(of_token):
            assert where.served[token, slot] == (expert is not None)
            if expert is None:
                continue
            place = int(where.of_token[token, slot])
            assert (0, *ends)[expert] <= place < ends[expert]
            assert where.token[place] == token
            taken.add(place)
    assert len(taken) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_are_as_many_places_whatever_the_routing(dtype: torch.dtype) -> None:
    everywhere = [[0, 1], [1, 2], [2, 3], [3, 0], [0, 1]]
    at_one = [[1, None]] * 5
    numbers = {len(places(dispatched(experts, 4), dtype).token) for experts in (SOME, everywhere, at_one)}
    assert numbers == {10 if dtype == torch.float32 else 10 + 4 * 7}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_come_back_as_weighted_sums_and_gradients_go_the_same_way(dtype: torch.dtype) -> None:
    dispatch = dispatched(SOME, num_experts=4)
    rows = torch.arange(1.0, 11.0).view(5, 2).to(dtype).requires_grad_()
    precise = torch.promote_types(dtype, torch.float32)
    weights = dispatch.weights.to(precise).requires_grad_()
    where = places(dispatch, dtype)
    here = gather(rows, where)
    factors = torch.tensor([1.0, 0.0, 10.0, 100.0], dtype=dtype)  # what each expert multiplies with
    expert = torch.searchsorted(where.ends, torch.arange(len(here)), right=True).clamp(max=3)
    mixed = combine(here * factors[expert].unsqueeze(1), weights, where)
    assert mixed.dtype == precise
    share = torch.tensor([5.5, 1.0, 0.0, 55.0, 5.5], dtype=precise)  # of tokens at (2, 0), (0,), none, (2, 3), (2, 0)
    assert torch.equal(mixed, rows.to(precise) * share.unsqueeze(1))
    mixed.sum().backward()
    assert torch.equal(rows.grad, share.unsqueeze(1).expand(5, 2).to(dtype))
    sums = rows.detach().sum(dim=1).tolist()
    by_weight = [[10 * sums[0], sums[0]], [sums[1], 0], [0, 0], [10 * sums[3], 100 * sums[3]], [10 * sums[4], sums[4]]]
    assert torch.equal(weights.grad, torch.tensor(by_weight, dtype=precise))


def alone(x: Tensor, sizes: list[int], ffn: str, into: list[Tensor], down: Tensor) -> Tensor:
    outputs = []
    for expert, rows in enumerate(x.split(sizes)):
        up = rows @ into[0][expert].T
        if ffn == "swiglu":
            hidden = F.silu(rows @ into[1][expert].T) * up
        else:
            hidden = F.gelu(up) if ffn == "gelu" else F.relu(up) ** 2
        outputs.append(hidden @ down[expert].T)
    return torch.cat(outputs)


@pytest.mark.parametrize("sizes", [[5, 0, 300, 2, 70], [0, 0, 0, 64], [63, 1, 65, 0, 128]], ids=str)
@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu2"])
def test_blocks_compute_what_each_expert_alone_does(
    ffn: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_experts, "TILE_SIZE", 64 * 6)  # experts of more than 64 rows are cut
    torch.manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).int()
    shapes = [(len(sizes), 6, 4)] * (2 if ffn == "swiglu" else 1) + [(len(sizes), 4, 6)]
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(sum(sizes), 4), *shapes]]
    x, *into, down = values
    beyond = torch.randn(9, 4, dtype=torch.float64)  # rows past the last end
    gate = into[1] if ffn == "swiglu" else None
    ours = compute(torch.cat((x, beyond)), ends, ffn, up=into[0], down=down, gate=gate)[: len(x)]
    plain = alone(x, sizes, ffn, into, down)
    assert torch.allclose(ours, plain)
    grad = torch.randn_like(plain)
    for one, other in zip(
        torch.autograd.grad(ours, values, grad, retain_graph=True),
        torch.autograd.grad(plain, values, grad),
        strict=True,
    ):
        assert torch.allclose(one, other)
    again = torch.autograd.grad(ours, values, grad)
    assert all(torch.isfinite(value).all() for value in again)


def test_in_16_bits_weights_and_their_gradients_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_experts, "TILE_SIZE", 64 * 6)
    torch.manual_seed(0)
    sizes = [200, 0, 24]
    ends = torch.tensor(sizes).cumsum(0).int()
    up, down = (torch.randn(shape, requires_grad=True) for shape in ((3, 6, 4), (3, 4, 6)))
    x = torch.randn(sum(sizes), 4, dtype=torch.bfloat16)
    ours = compute(x, ends, "relu2", up=up, down=down)
    plain = alone(x.float(), sizes, "relu2", [up.bfloat16().float()], down.bfloat16().float())
    assert ours.dtype == torch.bfloat16
    assert (ours - plain).norm() < 0.01 * plain.norm()
    grad = torch.randn_like(plain).bfloat16()
    for one, other in zip(
        torch.autograd.grad(ours, (up, down), grad), torch.autograd.grad(plain, (up, down), grad.float()), strict=True
    ):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()
        assert (one[1] == 0).all()


def test_nobody_computes_gradients_of_frozen_experts() -> None:
    up, down = torch.randn(2, 6, 4), torch.randn(2, 4, 6, requires_grad=True)
    x = torch.randn(5, 4, requires_grad=True)
    compute(x, torch.tensor([2, 5], dtype=torch.int32), "gelu", up=up, down=down).sum().backward()
    assert up.grad is None
    assert down.grad is not None
    assert x.grad is not None


def test_activations_see_few_lengths_whatever_the_routing() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, rows = set(), 8192
    for _ in range(50):
        cuts = torch.randint(0, rows + 1, (7,), generator=generator).sort().values
        found = list(cpu_experts._tiles(torch.cat((cuts, torch.tensor([rows]))).int(), tile_rows(512)))
        lengths |= {block.around.stop - block.around.start for block in found}
        assert [row for block in found for row in range(block.rows.start, block.rows.stop)] == list(range(rows))
    assert all(length % STEP == 0 for length in lengths)
    assert max(lengths) <= tile_rows(512) == 2048
