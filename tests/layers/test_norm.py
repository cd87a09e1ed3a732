from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from apt_model.layers.norm import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_what_torch_computes_with_its_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(8).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8))
    x = torch.randn(3, 5, 8, dtype=dtype)
    x[0, 0] = 0.0
    found = []
    for compute in (norm, lambda x: F.rms_norm(x, (8,), norm.weight)):
        given = x.clone().requires_grad_()
        output = compute(given)
        found.append((output, *torch.autograd.grad((output * torch.arange(8.0)).sum(), (given, norm.weight))))
    (ours, ours_by_x, ours_by_weight), (torchs, by_x, by_weight) = found
    torch.testing.assert_close((ours, ours_by_weight), (torchs, by_weight))
    torch.testing.assert_close(ours_by_x[1:], by_x[1:])
    scale = by_x[0].abs().max().item()  # of the row of zeros, thousands of the others'
    torch.testing.assert_close(ours_by_x[0], by_x[0], atol=1e-7 * scale, rtol=1e-5)


def test_gradients_by_differences() -> None:
    norm = RMSNorm(4).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
