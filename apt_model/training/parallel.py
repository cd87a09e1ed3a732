"""How ranks share one model: torch's engines, kept going while modules come and go.

A process alone needs none. What it takes to train in shards is loaded for that only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from apt_model.errors import ConfigError
from apt_model.gpt import GPT, Output
from apt_model.training.distributed import Ranks

Parallel = Literal["ddp", "fsdp"]


def engine(
    parallel: Parallel,
    model: GPT,
    ranks: Ranks,
    *,
    expert_parallel: int = 1,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
) -> Engine:
    """Return what trains ``model`` on ``ranks``: ``parallel``, or nothing but the model where there is one rank.

    Args:
        expert_parallel: ranks that share one set of experts.
        dtype: that autocast computes in.

    Raises:
        ConfigError: experts or ranks cannot be shared so.
    """
    if ranks.world % expert_parallel:
        raise ConfigError(
            f"trainer.expert_parallel = {expert_parallel} does not divide {ranks.world} ranks. Choose a divisor, or start "
            "another number of ranks."
        )
    if expert_parallel > 1 and parallel != "fsdp":
        raise ConfigError(f"trainer.expert_parallel = {expert_parallel} needs trainer.parallel=fsdp. Set it, or 1.")
    if ranks.world == 1:
        return Engine(model)
    if parallel == "ddp":
        return Replicas(model)
    from apt_model.training.fsdp import Sharded

    return Sharded(model, ranks.world, expert_parallel=expert_parallel, dtype=dtype, device_type=device_type)


class Engine:
    """A model on one rank, alone; what the others are more than that is theirs."""

    whole_blocks: ClassVar[bool] = True  # whether a compiler can take a block in one piece

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.forward: Callable[..., Output] = model
        self._had: list[tuple[int, bool]] | None = None

    def switches(self) -> Mapping[str, Callable[[bool], None]]:
        """Return what enables and disables each module of the model."""
        return self.model.switches()

    def settle(self) -> None:
        """Take note of parameters that came, went, froze or thawed; every rank calls it at the same time."""
        self.rest()
        has = [(id(parameter), parameter.requires_grad) for parameter in self.model.parameters()]
        if has != self._had:
            self._had = has
            self._settle()

    def _settle(self) -> None:
        pass

    def batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surround the forward and backward pass of a batch; ``last``: of its update."""
        return nullcontext()

    def rest(self) -> None:
        """Come back to where an update begins: after validation, or after a backward pass that never came."""


class Replicas(Engine):
    """Every rank holds the whole model; gradients are averaged while the backward pass runs (DistributedDataParallel)."""

    def _settle(self) -> None:
        """Wrap the model anew, which also gives every rank the weights and buffers of rank 0."""
        self.forward = self.model
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            self.forward = DistributedDataParallel(self.model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    def batch(self, *, last: bool) -> AbstractContextManager[Any]:
        """Average gradients after the last batch of an update only."""
        if last or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()


# --- tensors, whole and in shards -----------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as it is on one rank; all ranks call it. Others stay as they are."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def is_sharded(tensor: Tensor) -> bool:
    """Say whether ``tensor`` is a DTensor, without loading what those need."""
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
        full = whole(state.detach())
        return full.cpu() if keep else full.new_empty(0)
    if isinstance(state, Mapping):
        return {name: gathered_state(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered_state(value, keep=keep) for value in state)
    return state


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients down to a norm of ``limit``; return the norm over all ranks before, 0-dim."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    if not by_mesh:
        return torch.zeros(())
    norms = [
        whole(nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])) for members in by_mesh.values()
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for members in by_mesh.values():
        nn.utils.clip_grads_with_norm_(members, limit, norm)
    return norm
