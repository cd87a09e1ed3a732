from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from apt_model.layers.attention import QUERIES, ROWS, RotaryEmbedding, SelfAttention, eager, sdpa
from apt_model.layers.backend import onednn_products


def test_the_fused_kernel_equals_attention_written_out() -> None:
    fused = SelfAttention(d_model=16, num_heads=2, seq_len=12, attention="sdpa")
    plain = SelfAttention(d_model=16, num_heads=2, seq_len=12, attention="eager")
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(3, 12, 16)
    assert torch.allclose(fused(x), plain(x), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_a_gpu_takes_a_fused_kernel(dtype: torch.dtype, error: float) -> None:
    fused = SelfAttention(d_model=128, num_heads=2, seq_len=300, attention="sdpa").cuda()
    plain = SelfAttention(d_model=128, num_heads=2, seq_len=300, attention="eager").cuda()
    plain.load_state_dict(fused.state_dict())
    x, direction = torch.randn(2, 3, 300, 128, device="cuda")
    with (
        sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]),
        torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32),
    ):
        out = fused(x)  # an error where only the kernel that is not fused could be taken
    found = torch.autograd.grad(out, list(fused.parameters()), direction.to(out.dtype))
    expected = torch.autograd.grad(plain(x), list(plain.parameters()), direction)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < error * theirs.norm()


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """Fill memory that nobody has initialised with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("length", [5, QUERIES, 2 * QUERIES + 44])
@pytest.mark.parametrize(
    ("dtype", "by", "error"),
    [(torch.bfloat16, nullcontext, 0.01), (torch.float32, onednn_products, 1e-6)],
    ids=["bf16", "float32"],
)
def test_gradients_are_those_of_attention_written_out(
    length: int, dtype: torch.dtype, by: Callable[[], AbstractContextManager[object]], error: float
) -> None:
    torch.manual_seed(0)
    heads, at_once = 2, ROWS // (2 * min(QUERIES, length))
    *own, grad = (torch.randn(at_once + 1, heads, length, 8, dtype=dtype, requires_grad=True) for _ in range(4))
    exact = [x.detach().double().requires_grad_() for x in own]
    with by():
        found = torch.autograd.grad(sdpa(*own), own, grad)
    for ours, theirs in zip(found, torch.autograd.grad(eager(*exact), exact, grad.double()), strict=True):
        assert (ours - theirs).norm() < error * theirs.norm()


def test_a_position_does_not_see_later_ones() -> None:
    attention = SelfAttention(d_model=16, num_heads=2, seq_len=12)
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 7:] = torch.randn(1, 5, 16)
    assert torch.allclose(attention(x)[:, :7], attention(changed)[:, :7], atol=1e-6)
    assert not torch.allclose(attention(x)[:, 7:], attention(changed)[:, 7:], atol=1e-3)


def test_rotation_keeps_lengths_and_makes_products_depend_on_distance_only() -> None:
    rotate = RotaryEmbedding(head_dim=8, seq_len=32)
    q, k = torch.randn(8), torch.randn(8)
    v = torch.randn(8)
    rotated_q, rotated_k, same = (
        part[0, 0] for part in rotate(torch.stack([q, k, v])[None, None, :, None].expand(1, 32, 3, 1, 8))
    )
    assert torch.equal(same, v.expand(32, 8))
    assert torch.allclose(rotated_q.norm(dim=-1), q.norm().expand(32), atol=1e-5)
    products = rotated_q @ rotated_k.T
    assert torch.allclose(products[5:, 3:-2].diagonal(), products[5, 3].expand(27), atol=1e-4)
    assert not torch.allclose(products[5, 3], products[5, 4], atol=1e-3)


def test_pairs_of_channels_are_turned_by_angles_worked_out_by_hand() -> None:
    """Channels 0 and 2 turn by 1 radian a position, channels 1 and 3 by 1/100."""
    rotate = RotaryEmbedding(head_dim=4, seq_len=8)
    qkv = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 3, 1, 4)
    query, key, value = rotate(qkv, start=5)
    c, s, c1, s1 = math.cos(5), math.sin(5), math.cos(0.05), math.sin(0.05)
    by_hand = torch.tensor([c - 3 * s, 2 * c1 - 4 * s1, 3 * c + s, 4 * c1 + 2 * s1])
    assert torch.allclose(query[0, 0, 0], by_hand, atol=1e-5)
    assert torch.equal(query, key)
    assert torch.equal(value[0, 0, 0], qkv[0, 0, 2, 0])


def test_gradients_of_a_rotation_by_differences() -> None:
    rotate = RotaryEmbedding(head_dim=4, seq_len=8).double()
    qkv = torch.randn(2, 3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: rotate(given, 2), (qkv,))
