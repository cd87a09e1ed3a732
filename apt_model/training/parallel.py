"""Chooses how ranks share one model. A process alone loads nothing of what it takes to train in shards."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from apt_model.errors import ConfigError
from apt_model.training.distributed import Ranks
from apt_model.training.engines import Engine, Replicas

Parallel = Literal["ddp", "fsdp"]


def engine(
    parallel: Parallel,
    model: nn.Module,
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
