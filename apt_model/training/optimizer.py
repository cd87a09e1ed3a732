"""Optimizers of a model whose parameters are added and removed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from apt_model.layers.moe import Lineage
from apt_model.training.sharding import full_tensor, shared_as

logger = logging.getLogger(__name__)

POWERS: Final = {
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance", "row_var", "col_var"), 2),
    **dict.fromkeys(("acc_delta", "ax", "step_size"), 0),  # of updates or weights, not of gradients
}
"""By which power of the gradient's scale what an optimizer keeps goes, by its name; 1 for others."""

_CANNOT: Final = object()


def groups_for(optimizer: Any, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups that ``optimizer``, a class or a partial of one, wants; :func:`parameter_groups` unless it says so."""
    make = getattr(getattr(optimizer, "func", optimizer), "parameter_groups", parameter_groups)
    groups: list[dict[str, Any]] = make(model, weight_decay)
    return groups


def has_vocabulary(model: nn.Module) -> set[Tensor]:
    """Return the weights of ``model`` with a row a token: embeddings, and heads that are as large as one."""
    tables: set[Tensor] = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    largest = {weight.shape[0] for weight in tables}
    heads = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features in largest and "head" in name.rpartition(".")[2]
    }
    return tables | heads | {p for name, p in model.named_parameters() if name.startswith(("lm_head.", "embed_out."))}


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
    scale, the second by its square. Starting them at zero costs a spike of the loss. Where what an optimizer keeps has a
    shape that says nothing of its parts, a new parameter begins without, and a warning says so.
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
    lost: set[str] = set()
    inherited: dict[Tensor, Any] = {}
    for link in lineage:
        state = optimizer.state.get(link.parent)
        if not state:
            continue
        taken = {name: _inherit(name, value, link) for name, value in state.items()}
        unfit = {name for name, value in taken.items() if value is _CANNOT}
        lost |= unfit
        if not unfit:
            inherited[link.child] = taken
        elif link.child is link.parent:  # it stays, and what is kept of it
            inherited[link.child] = dict(state)
    optimizer.state.update(inherited)
    if lost:
        logger.warning(
            "%s keeps %s, which cannot be handed on where a module is switched: new parameters begin without, and the loss "
            "may jump there",
            type(optimizer).__name__,
            ", ".join(sorted(lost)),
        )
    _complete_state(optimizer)
    alive = set(model.parameters())
    for held in list(optimizer.state):
        if held not in alive:
            del optimizer.state[held]


def _complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of new parameters where torch's optimizer would not find or make it by itself."""
    if isinstance(optimizer, torch.optim.Adagrad):  # makes it where it is made itself
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if parameter not in optimizer.state:
                alike = type(optimizer)([parameter], **optimizer.defaults)
                optimizer.state[parameter] = alike.state[parameter]
    if isinstance(optimizer, torch.optim.SGD) and optimizer.state:  # its fused kernel takes sums for all, or for none
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] and group.get("fused") else ():
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _inherit(name: str, value: Any, link: Lineage) -> Any:
    """Return what a child takes of ``value``, which its parent's state has as ``name``; :data:`_CANNOT`: nothing fits."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.dim() <= 1:
        return value.clone()  # the count of updates, for Adam's bias correction
    if not isinstance(value, Tensor):
        return value if value is None or isinstance(value, int | float | str) else _CANNOT
    power = POWERS.get(name, 2 if name.endswith("sq") else 1)
    full, shape = full_tensor(value), link.parent.shape
    if full.dim() != len(shape) or any(size not in (1, whole) for size, whole in zip(full.shape, shape, strict=True)):
        return _CANNOT
    shaped = link.shaped((full * link.gradient_scale**power).expand(shape))
    for back in range(1, full.dim() + 1):  # a row or a column, of which all are alike: one is kept
        if full.shape[-back] == 1 and shape[-back] != 1:
            shaped = shaped.narrow(-back, 0, 1)
    if value.shape == shape:
        return shared_as(shaped, link.child).clone()
    return shaped.clone()


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
