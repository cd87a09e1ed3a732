"""Several processes that train one model: who they are, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from apt_model.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """One process among ``world``, by torchrun's names in the environment; alone where they are missing."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """Return what the environment says: RANK, WORLD_SIZE, LOCAL_RANK.

        Raises:
            ConfigError: one of them is no number, or they do not go together.
        """
        given = {name: os.environ.get(name, default) for name, default in _NAMES.items()}
        if not all(text.isascii() and text.isdecimal() for text in given.values()):
            raise _wrong_environment(given)
        read = {name: int(text) for name, text in given.items()}
        if not read["RANK"] < read["WORLD_SIZE"]:
            raise _wrong_environment(given)
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


def _wrong_environment(given: Mapping[str, str], reason: str = "") -> ConfigError:
    said = " ".join(f"{name}={text}" for name, text in given.items())
    return ConfigError(
        f"environment: {said} names no ranks that can find each other{reason}. Start several by torch's launcher, python -m "
        "torch.distributed.run --standalone --nproc-per-node 2 -m apt_launch ..., or unset these variables for one process."
    )


_NAMES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@contextmanager
def process_group(device: str = "auto") -> Iterator[Ranks]:
    """Bring the ranks of the environment together, over NCCL where they train on CUDA and over gloo elsewhere.

    Which devices a process sees is for its launcher to say: CUDA_VISIBLE_DEVICES stays as it is.

    Args:
        device: ``trainer.device``.

    Raises:
        ConfigError: the environment names ranks, and not where they are.
    """
    ranks = Ranks.here()
    if ranks.world == 1 or dist.is_initialized():
        yield ranks
        return
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    try:
        dist.init_process_group("nccl" if on_cuda else "gloo")
    except ValueError as error:  # it has not been told where the others are
        raise _wrong_environment({"WORLD_SIZE": str(ranks.world)}, f" ({error})") from None
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
    """Return of each value whether it is true on some rank."""
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
    stacked = _mean(torch.stack([value.detach().float() for value in values.values()]))
    return dict(zip(values, stacked.unbind(), strict=True))


def average_buffers(model: nn.Module) -> None:
    """Make every buffer that a checkpoint keeps its mean over ranks: those that training moves."""
    if Ranks.of_group().world == 1:
        return
    moved = [
        buffer
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and buffer.is_floating_point()
    ]
    if not moved:
        return
    flat = _mean(torch.cat([buffer.reshape(-1) for buffer in moved]))
    for buffer, mean in zip(moved, torch.split(flat, [buffer.numel() for buffer in moved]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def sum_of(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over ranks, which all call it."""
    return _reduced(values)


def largest_of(values: Tensor) -> Tensor:
    """Return the largest of ``values`` over ranks, which all call it."""
    return _reduced(values, largest=True)


def _reduced(values: Tensor, *, largest: bool = False) -> Tensor:
    if Ranks.of_group().world == 1:
        return values
    found = values.clone()
    dist.all_reduce(found, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return found


def _mean(values: Tensor) -> Tensor:
    """Replace ``values`` by their means over ranks, in place."""
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())
