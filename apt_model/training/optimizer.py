"""Optimizers of a model whose parameters are added and removed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.layers.moe import Lineage
from apt_model.training.sharding import full_tensor, shared_as


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices, which decay, and vectors, which do not."""
    parameters = list(model.parameters())  # frozen ones too: without a gradient an optimizer leaves them alone
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@torch.no_grad()
def follow_model(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    lineage: Sequence[Lineage] = (),
    *,
    left_out: Collection[nn.Parameter] = (),
) -> None:
    """Make the optimizer's parameters those that ``model`` has now, but for ``left_out`` and what comes of them.

    A new parameter joins the group of the one it took over from, or the first group that holds its kind: matrices or
    vectors. One that took over from another takes its moments too, scaled to the gradients it will see: the first by the
    scale, the second by its square. Starting them at zero costs a spike of the loss.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    place = {parameter: number for number, group in enumerate(groups) for parameter in group["params"]}
    parents = {link.child: link.parent for link in lineage}
    kinds = [{parameter.dim() >= 2 for parameter in group["params"]} for group in groups]
    wanted: list[list[nn.Parameter]] = [[] for _ in groups]
    for parameter in model.parameters():
        origin = parents.get(parameter, parameter)
        if parameter in left_out or origin in left_out:
            continue
        kin = next((number for number, kind in enumerate(kinds) if (parameter.dim() >= 2) in kind), 0)
        wanted[place.get(parameter, place.get(origin, kin))].append(parameter)
    for group, now in zip(groups, wanted, strict=True):
        group["params"] = now
    for link in lineage:
        state = optimizer.state.get(link.parent)
        if state:
            optimizer.state[link.child] = {name: _inherit(name, value, link) for name, value in state.items()}
    alive = set(model.parameters())
    for held in list(optimizer.state):
        if held not in alive:
            del optimizer.state[held]


def _inherit(name: str, value: Any, link: Lineage) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape != link.parent.shape:  # the count of updates, for Adam's bias correction
        return value.clone()
    power = 2 if name.endswith("sq") else 1
    return shared_as(link.shaped(full_tensor(value) * link.gradient_scale**power), link.child).clone()


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state by parameter name, which survives a change of the parameters' order."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_named_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Take up what :func:`named_state` returned; the model already has the parameters of that time."""
    follow_model(optimizer, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {key: _taken_over(value, p) for key, value in saved[names[p]].items()}
        for index, p in enumerate(ordered)
        if names[p] in saved
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _taken_over(value: Any, parameter: nn.Parameter) -> Any:
    """Return this rank's own copy of a saved value, which may lie in a file."""
    if not isinstance(value, Tensor):
        return value
    own = shared_as(value, parameter)
    return own.clone() if own is value else own
