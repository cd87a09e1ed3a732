from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apt_model.layers.attention import SelfAttention
from apt_model.layers.backend import mkl_products, onednn_products
from apt_model.layers.cpu_experts import places
from apt_model.layers.feed_forward import FeedForward
from apt_model.layers.moe import MoE
from apt_model.layers.router import plan_dispatch

CPUINFO = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""

on_amd = pytest.mark.skipif(
    not ("AuthenticAMD" in CPUINFO and "avx512f" in CPUINFO), reason="oneDNN is for AMD's processors with AVX-512"
)


def setting() -> str:
    how: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return how


def error(product: Tensor, exact: Tensor) -> float:
    return float((product - exact).norm() / exact.norm())


def test_products_stay_in_float32_whoever_does_them() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    exact = a.double() @ b.double()
    assert error((a.bfloat16() @ b.bfloat16()).float(), exact) > 1e-3
    with onednn_products():
        assert error(a @ b, exact) < 1e-6
        with mkl_products():
            assert error(a @ b, exact) < 1e-6


def test_the_setting_is_what_it_was_also_after_an_error() -> None:
    before = setting()
    with pytest.raises(RuntimeError), onednn_products():
        torch.ones(2, 3) @ torch.ones(2, 3)
    with onednn_products():
        within = setting()
        with mkl_products():
            assert setting() == ("ieee" if within != before else before)
        assert setting() == within
    assert setting() == before


@on_amd
def test_amd_has_onednn() -> None:
    with onednn_products() as there:
        assert there
        assert setting() != "ieee"


@on_amd
@pytest.mark.parametrize(("tokens", "round_sizes"), [(600, True), (500, False)])
def test_experts_of_many_rows_have_round_sizes_for_onednn(tokens: int, round_sizes: bool) -> None:
    moe = MoE(FeedForward(d_model=8, d_ff=16), num_experts=4)
    moe.enable(True)
    assert moe.router is not None
    dispatch = plan_dispatch(moe.router(torch.randn(tokens, 8), moe.temperature), 4)
    with onednn_products():
        sizes = places(dispatch, torch.float32).ends.diff(prepend=torch.zeros(1, dtype=torch.int32))
    assert dispatch.counts.sum() == 2 * tokens
    assert (dispatch.counts % 8).any()
    assert torch.equal(sizes, (dispatch.counts + 7) // 8 * 8 if round_sizes else dispatch.counts)


@pytest.mark.parametrize("num_experts", [4, 16])
@pytest.mark.parametrize("capacity_factor", [None, 1.1])
def test_a_layer_computes_the_same_with_onednn(capacity_factor: float | None, num_experts: int) -> None:
    torch.manual_seed(0)
    dense = FeedForward(d_model=16, d_ff=32)
    moe = MoE(dense, num_experts=num_experts, capacity_factor=capacity_factor, upcycling="noise")
    moe.enable(True)
    attention = SelfAttention(d_model=16, num_heads=2, seq_len=300)
    x = torch.randn(2, 300, 16, requires_grad=True)
    parameters = [x, *moe.parameters(), *attention.parameters()]

    def gradients() -> list[Tensor]:
        output, report = moe(attention(x))
        assert report is not None
        return [output, *torch.autograd.grad(output.square().mean() + report.loss, parameters)]

    here = gradients()
    with onednn_products():
        there = gradients()
    for ours, theirs in zip(there, here, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
