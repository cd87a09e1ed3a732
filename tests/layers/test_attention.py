from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from apt_model.layers.attention import QUERIES, ROWS, KeyValues, SelfAttention, eager, largest_logits, sdpa
from apt_model.layers.backend import onednn_products
from apt_model.layers.rotary import RotaryEmbedding, frequencies
from apt_model.training.qk_clip import QKClip


def test_the_fused_kernel_equals_attention_written_out() -> None:
    fused = SelfAttention(d_model=16, num_heads=2, seq_len=12, attention="sdpa")
    plain = SelfAttention(d_model=16, num_heads=2, seq_len=12, attention="eager")
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(3, 12, 16)
    assert torch.allclose(fused(x), plain(x), atol=1e-6)


FEATURES = {
    "grouped queries": {"num_kv_heads": 2},
    "one pair of wide heads": {"num_kv_heads": 1, "head_dim": 8},
    "normalised heads": {"num_kv_heads": 2, "qk_norm": "head", "norm_eps": 1e-5},
    "normalised at once": {"num_kv_heads": 2, "qk_norm": "all"},
    "biases": {"qkv_bias": True},
    "a window": {"sliding_window": 5, "num_kv_heads": 2},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_every_feature_computes_the_same_fused_and_written_out_and_position_by_position(features) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_heads": 4, "seq_len": 12, **features}
    fused, plain = SelfAttention(**sizes, attention="sdpa"), SelfAttention(**sizes, attention="eager")
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    plain.load_state_dict(fused.state_dict())
    x, direction = torch.randn(2, 3, 12, 16)
    outputs = [layer(x) for layer in (fused, plain)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad((out * direction).sum(), list(layer.parameters()))
        for out, layer in zip(outputs, (fused, plain), strict=True)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    seen = KeyValues()
    with torch.no_grad():
        parts = [fused(x[:, begin:end], seen) for begin, end in ((0, 7), (7, 8), (8, 9), (9, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), outputs[0].detach(), atol=1e-5, rtol=1e-5)


def test_heads_of_queries_share_those_of_keys_in_order() -> None:
    query, shared = torch.randn(1, 4, 6, 8), torch.randn(2, 1, 2, 6, 8)
    grouped = sdpa(query, *shared)
    for head in range(4):
        alone = eager(query[:, head : head + 1], *(tensor[:, head // 2 : head // 2 + 1] for tensor in shared))
        assert torch.allclose(grouped[:, head : head + 1], alone, atol=1e-6)


@pytest.mark.parametrize("attend", [sdpa, eager])
def test_a_window_of_one_gives_each_position_its_own_value_and_a_long_one_changes_nothing(attend) -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 8)
    assert torch.allclose(attend(query, key, value, 1), value)
    assert torch.equal(attend(query, key, value, 6), attend(query, key, value))
    moved = value.clone()
    moved[:, :, :3] += 1
    changed = (attend(query, key, value, 2) != attend(query, key, moved, 2)).any(-1).any(1)[0]
    assert changed.tolist() == [True, True, True, True, False, False]  # position 3 still sees position 2


def test_frequencies_are_scaled_as_worked_out_by_hand() -> None:
    plain = frequencies(8, 10_000.0)
    assert plain.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert torch.equal(frequencies(8, 10_000.0, {"rope_type": "linear", "factor": 4.0}), plain / 4)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = frequencies(8, 10_000.0, llama3 | {"original_max_position_embeddings": 100})
    # waves of 6.3, 63, 628 and 6283 positions: below 100 / 4 as they are, above 100 / 1 slowed, between in shares
    share = (100 * 0.1 / (2 * math.pi) - 1) / 3
    assert scaled.tolist() == pytest.approx([1.0, 0.1 * (share + (1 - share) / 8), 0.01 / 8, 0.001 / 8])


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
@pytest.mark.parametrize(("length", "shared"), [(5, 2), (QUERIES, 2), (2 * QUERIES + 44, 2), (2 * QUERIES + 44, 1)])
@pytest.mark.parametrize(
    ("dtype", "by", "error"),
    [(torch.bfloat16, nullcontext, 0.01), (torch.float32, onednn_products, 1e-6)],
    ids=["bf16", "float32"],
)
def test_gradients_are_those_of_attention_written_out(
    length: int, shared: int, dtype: torch.dtype, by: Callable[[], AbstractContextManager[object]], error: float
) -> None:
    torch.manual_seed(0)
    at_once = ROWS // (2 * min(QUERIES, length))
    *own, grad = (
        torch.randn(at_once + 1, heads, length, 8, dtype=dtype, requires_grad=True) for heads in (2, shared, shared, 2)
    )
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


@pytest.mark.parametrize("shared", [None, 2])
@pytest.mark.parametrize("window", [None, 5])
def test_the_largest_logit_of_each_head_is_that_of_attention_written_out(
    shared: int | None, window: int | None
) -> None:
    torch.manual_seed(0)
    length = QUERIES + 9  # more than one group of queries
    query, key = torch.randn(2, 4, length, 6), torch.randn(2, shared or 4, length, 6)
    keys = key.repeat_interleave(4 // (shared or 4), dim=1)
    logits = query @ keys.transpose(-2, -1) / math.sqrt(6)
    ago = torch.arange(length).unsqueeze(1) - torch.arange(length)
    seen = (ago >= 0) & (ago < (window or length))
    expected = logits.masked_fill(~seen, -math.inf).flatten(2).amax(dim=(0, 2))
    assert torch.allclose(largest_logits(query, key, window), expected, atol=1e-5)


@pytest.mark.parametrize("shared", [None, 2])
def test_logits_above_the_limit_come_down_to_it_and_other_heads_stay(shared: int | None) -> None:
    torch.manual_seed(0)
    layer = SelfAttention(d_model=16, num_heads=4, seq_len=12, num_kv_heads=shared, qkv_bias=True)
    torch.nn.init.normal_(layer.qkv.weight)
    torch.nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, 12, 16)
    layer.watch_logits()
    layer(x)
    before, limit = layer.largest.clone(), layer.largest.sort().values[1].item() + 1e-4  # two heads are above
    weight = layer.qkv.weight.detach().clone()
    clip = QKClip(layer, limit)  # which forgets what it has not seen
    layer(x)
    clip()
    assert clip.largest == before.max()
    layer(x)
    assert torch.allclose(layer.largest, before.clamp(max=limit), rtol=1e-5)
    rows = layer.qkv.weight.detach().view(-1, layer.head_dim, 16)
    stayed = [bool(torch.equal(now, then)) for now, then in zip(rows, weight.view_as(rows), strict=True)]
    above = (before > limit).tolist()
    heads = shared or 4
    assert stayed[:4] == [not one for one in above]
    assert stayed[4 : 4 + heads] == ([True] * heads if shared else stayed[:4]), "keys that heads share stay"
    assert all(stayed[4 + heads :]), "values stay"
    assert layer.largest.isfinite().all()
    clip.forget()
    layer.eval()(x)
    assert not layer.largest.isfinite().any(), "evaluation is not watched"
