from __future__ import annotations

import math

import pytest
import torch

from apt_model.layers.align import BiStateAlignment


def module(on: bool = True, **options) -> BiStateAlignment:
    torch.manual_seed(0)
    align = BiStateAlignment(**({"d_model": 8, "rank": 4} | options))
    align.enable(on)
    return align


def test_off_it_passes_the_hidden_state_on_and_has_no_parameters() -> None:
    align = module(on=False)
    x = torch.randn(2, 3, 8)
    assert align(x) == (x, None)
    assert not list(align.parameters())


def test_switching_on_leaves_the_hidden_state_as_it_was() -> None:
    x = torch.randn(2, 3, 8)
    hidden, report = module()(x)
    assert torch.equal(hidden, x)
    assert report.loss > 0


def test_alpha_mixes_the_states_and_beta_brings_the_mixture_back() -> None:
    align = module(alpha=0.25, beta=0.5)
    with torch.no_grad():
        align.back.weight.copy_(torch.randn(8, 4))
    x = torch.randn(1, 3, 8)
    hidden, _ = align(x)
    for t in range(3):
        stable = align.down.weight @ x[0, : t + 1].mean(dim=0)
        fluid = align.down.weight @ x[0, t]
        expected = x[0, t] + 0.5 * (align.back.weight @ (0.25 * stable + 0.75 * fluid))
        assert torch.allclose(hidden[0, t], expected, atol=1e-5)


def test_nothing_comes_from_later_positions() -> None:
    align = module()
    with torch.no_grad():
        align.back.weight.copy_(torch.randn(8, 4))
    x = torch.randn(2, 6, 8)
    changed = x.clone()
    changed[:, 4:] = 0.0
    assert torch.allclose(align(x)[0][:, :4], align(changed)[0][:, :4])


def test_the_loss_is_the_number_worked_out_by_hand() -> None:
    align = module(tau=0.5)
    # two sequences, one position; cosines: own 1 and 0.8, other 0 and 0.6
    fluid = torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]])
    stable = torch.tensor([[[2.0, 0.0]], [[0.0, 5.0]]])
    loss, agreement = align.alignment_loss(fluid, stable)
    first = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0)))
    second = -math.log(math.exp(0.8 / 0.5) / (math.exp(0.8 / 0.5) + math.exp(0.6 / 0.5)))
    assert loss.item() == pytest.approx((first + second) / 2)
    assert agreement.item() == pytest.approx(0.9)


def test_a_batch_of_one_has_nothing_to_distinguish() -> None:
    assert module()(torch.randn(1, 5, 8))[1].loss.item() == pytest.approx(0.0, abs=1e-6)


def test_the_stable_side_gets_no_gradient_and_the_weight_scales_the_loss() -> None:
    align = module()
    fluid, stable = torch.randn(3, 2, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    align.alignment_loss(fluid, stable)[0].backward()
    assert fluid.grad.abs().sum() > 0
    assert stable.grad is None
    x = torch.randn(3, 4, 8)
    align.weight.fill_(0.3)
    report = align(x)[1]
    assert torch.allclose(report.loss, 0.3 * report.metrics["align/loss"])


def test_the_loss_trains_the_way_into_the_subspace_alone_or_the_layers_below_too() -> None:
    found = {}
    for trains in ("projection", "all"):
        align = module(trains=trains)
        x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        hidden, report = align(x)
        report.loss.backward(retain_graph=True)
        found[trains] = (report.loss.item(), align.down.weight.grad.clone(), x.grad)
        assert align.back.weight.grad is None
        x.grad = None
        hidden.sum().backward()
        assert x.grad is not None  # what is predicted from the hidden state trains it in any case
    (loss, way, below), (other_loss, other_way, other_below) = found.values()
    assert loss == other_loss
    assert torch.equal(way, other_way)
    assert below is None
    assert other_below.abs().sum() > 0
