"""Tensors of which each rank holds a part: gathered, cut, and the norm of their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered on every rank, which all call; any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor, without loading what those need."""
    return hasattr(tensor, "device_mesh")


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, sharded as ``like``; as it is, if that is not sharded or another shape."""
    if not is_sharded(like) or is_sharded(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered_state(state: Any, *, keep: bool) -> Any:
    """Return ``state`` with every sharded tensor whole and on the CPU, one after another; all ranks call it.

    Args:
        keep: False: an empty tensor in the place of each; for ranks that write nothing.
    """
    if isinstance(state, Tensor) and is_sharded(state):
        full = full_tensor(state.detach())
        return full.cpu() if keep else full.new_empty(0)
    if isinstance(state, Mapping):
        return {name: gathered_state(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered_state(value, keep=keep) for value in state)
    return state


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to a norm of ``limit``; return the norm over all ranks before, 0-dim."""
    by_mesh = _by_mesh(parameters)
    norm = _norm(by_mesh)
    for members in by_mesh.values():
        nn.utils.clip_grads_with_norm_(members, limit, norm)
    return norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of gradients over all ranks, 0-dim."""
    return _norm(_by_mesh(parameters))


def _by_mesh(parameters: Iterable[nn.Parameter]) -> dict[Any, list[nn.Parameter]]:
    """Return the parameters that have a gradient, by the ranks that share each."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return by_mesh


def _norm(by_mesh: Mapping[Any, list[nn.Parameter]]) -> Tensor:
    if not by_mesh:
        return torch.zeros(())
    norms = [
        full_tensor(nn.utils.get_total_norm([p.grad for p in members if p.grad is not None]))
        for members in by_mesh.values()
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
