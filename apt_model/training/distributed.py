"""Several processes that train one model: who they are, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """One process among ``world``, by torchrun's names in the environment; alone where they are missing."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """Return what the environment says: RANK, WORLD_SIZE, LOCAL_RANK."""
        read = {name: int(os.environ.get(name, default)) for name, default in _NAMES.items()}
        return cls(read["RANK"], read["WORLD_SIZE"], read["LOCAL_RANK"])

    @classmethod
    def of_group(cls) -> Ranks:
        """Return this process in torch's process group; alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), cls.here().local_rank)

    def share(self, batch: Tensor) -> Tensor:
        """Return this rank's rows of ``batch``, (batch, ...)."""
        return batch[self.rank :: self.world]


_NAMES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Bring the ranks of the environment together, over NCCL where there is CUDA and over gloo elsewhere.

    Which devices a process sees is for its launcher to say: CUDA_VISIBLE_DEVICES stays as it is.
    """
    ranks = Ranks.here()
    if ranks.world == 1 or dist.is_initialized():
        yield ranks
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ranks
        dist.barrier()  # the first rank holds the store that the others still talk to
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def from_rank_zero(value: float) -> float:
    """Return the ``value`` of rank 0 on every rank; without a process group, ``value``."""
    if Ranks.of_group().world == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=_device())
    dist.broadcast(shared, src=0)
    return float(shared.item())


def barrier() -> None:
    """Wait for all ranks."""
    if Ranks.of_group().world > 1:
        dist.barrier()


def any_rank(*values: bool) -> tuple[bool, ...]:
    """Say of each value whether it is true on some rank."""
    if Ranks.of_group().world == 1:
        return values
    shared = torch.tensor([float(value) for value in values], device=_device())
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return tuple(bool(value) for value in shared.tolist())


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order."""
    ranks = Ranks.of_group()
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


def mean_of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return 0-dim ``values`` as their means over ranks; every rank has the same names."""
    if Ranks.of_group().world == 1 or not values:
        return dict(values)
    stacked = torch.stack([value.detach().float() for value in values.values()])
    _average([stacked])
    return dict(zip(values, stacked.unbind(), strict=True))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make every gradient its mean over ranks; one that is missing on some ranks counts as zero there."""
    if Ranks.of_group().world == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    present = torch.tensor([float(parameter.grad is not None) for parameter in trained], device=_device())
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, somewhere in zip(trained, present.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    _average(gradients)


def average_buffers(model: nn.Module) -> None:
    """Make every buffer that a checkpoint keeps its mean over ranks: those that training moves."""
    if Ranks.of_group().world == 1:
        return
    kept = model.state_dict(keep_vars=True)
    moved = [buffer for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point()]
    _average(moved)


def equalise(model: nn.Module) -> None:
    """Give every rank the weights of rank 0."""
    if Ranks.of_group().world == 1:
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.data, src=0)


def _average(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over ranks, in place, a few of them at a time."""
    world = Ranks.of_group().world
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        flat /= world
        begin = 0
        for tensor in bucket:
            tensor.copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
            begin += tensor.numel()


def _buckets(tensors: list[Tensor], most: int = 25_000_000) -> Iterator[list[Tensor]]:
    """Yield lists of tensors of one dtype, of about ``most`` elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(member.numel() for member in bucket) + tensor.numel() > most
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
