from __future__ import annotations

import torch

from apt_model.layers.attention import RotaryEmbedding, SelfAttention


def test_the_fused_kernel_equals_attention_written_out() -> None:
    fused = SelfAttention(d_model=16, num_heads=2, seq_len=12, attention="sdpa")
    plain = SelfAttention(d_model=16, num_heads=2, seq_len=12, attention="eager")
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(3, 12, 16)
    assert torch.allclose(fused(x), plain(x), atol=1e-6)


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
    rotated_q, rotated_k = rotate(q.expand(1, 1, 32, 8))[0, 0], rotate(k.expand(1, 1, 32, 8))[0, 0]
    assert torch.allclose(rotated_q.norm(dim=-1), q.norm().expand(32), atol=1e-5)
    products = rotated_q @ rotated_k.T
    assert torch.allclose(products[5:, 3:-2].diagonal(), products[5, 3].expand(27), atol=1e-4)
    assert not torch.allclose(products[5, 3], products[5, 4], atol=1e-3)
