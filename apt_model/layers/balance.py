"""The balance of experts over a whole update: its forward passes (accumulated gradients), and its ranks.

The balance loss of a layer is E x sum over experts of (share of the slots that wanted it x its mean probability). Where the
shares are those of one forward pass, each has to be balanced by itself, texts of one kind, too; over an update experts may
specialise (arXiv:2501.11873, ACL 2025.acl-long.249). The loss is linear in the probabilities, so that with the shares of the
whole update the mean over its forward passes and ranks is the loss of the whole, and so is the gradient. The shares have to be
known before the first backward pass: where an update has several forward passes, whoever drives it counts in passes of their
own before (``MoE.load``). Where nobody does, the shares are those of the update so far, as in that paper.

The counts also say how the bias of a ``sigmoid`` router moves, once an update, by all that the update had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from apt_model.layers.metrics import MEANS
from apt_model.layers.moe import MoE, MoEReport


def complete(layers: Sequence[MoE], reports: Sequence[MoEReport]) -> list[MoEReport]:
    """Count a forward pass in its update; return ``reports`` with the balance loss of the update, where it is asked for."""
    for layer, report in zip(layers, reports, strict=True):
        if layer.training and layer.driven and layer.load is None:
            layer.counts = report.counts if layer.counts is None else layer.counts + report.counts
    lacking = [number for number, report in enumerate(reports) if report.shares is not None]
    completed = list(reports)
    if not lacking or not torch.is_grad_enabled():
        return completed
    if any(layers[number].load is None for number in lacking):
        so_far = [_so_far(layers[number], reports[number]) for number in lacking]
        loads = [_shares(counts) for counts in _over_ranks(layers[lacking[0]], so_far)]
    else:
        loads = [load for number in lacking if (load := layers[number].load) is not None]
    for number, load in zip(lacking, loads, strict=True):
        completed[number] = _with_balance(layers[number], reports[number], load)
    return completed


def _so_far(layer: MoE, report: MoEReport) -> Tensor:
    return report.counts if layer.counts is None else layer.counts


def _over_ranks(layer: MoE, counts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return ``counts``, each (num_experts,), as their sums over ranks, in one exchange."""
    if layer.over_ranks is None:
        return counts
    return torch.split(layer.over_ranks(torch.cat(list(counts))), [len(part) for part in counts])


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum().clamp(min=1)


def _with_balance(layer: MoE, report: MoEReport, load: Tensor) -> MoEReport:
    assert report.shares is not None
    balance = len(load) * (load * report.shares).sum()
    sums = report.sums
    if sums is not None:
        sums = sums.clone()
        sums[MEANS.index("balance_loss")] = report.counts.sum() * balance.detach()
    return report._replace(loss=report.loss + layer.balance_loss_weight * balance, sums=sums)


def begin_update(layers: Sequence[MoE], over_ranks: Callable[[Tensor], Tensor]) -> None:
    """Move the bias as the update before planned it, and forget that update's counts.

    Args:
        over_ranks: returns a tensor's sum over ranks.
    """
    for layer in layers:
        layer.driven, layer.over_ranks = True, over_ranks
        layer.counts = layer.load = None
        layer.balance()


def settle_loads(layers: Sequence[MoE]) -> None:
    """Take what was counted so far as the counts of the whole update."""
    counting = [layer for layer in layers if layer.counts is not None]
    if counting:
        counts = _over_ranks(counting[0], [layer.counts for layer in counting if layer.counts is not None])
        for layer, of_update in zip(counting, counts, strict=True):
            layer.load = _shares(of_update)


def end_update(layers: Sequence[MoE]) -> None:
    """Plan how the bias moves when the next update begins, by the counts of this one over all ranks."""
    counting = [layer for layer in layers if layer.counts is not None and layer.scoring == "sigmoid"]
    if counting:
        counts = _over_ranks(counting[0], [layer.counts for layer in counting if layer.counts is not None])
        for layer, of_update in zip(counting, counts, strict=True):
            layer.plan_balance(of_update)


def skip_update(layers: Sequence[MoE]) -> None:
    """Leave the bias where it is: the update did not happen."""
    for layer in layers:
        layer.counts = layer.load = None
        if layer.router is not None:
            layer.router.bias_step.zero_()
