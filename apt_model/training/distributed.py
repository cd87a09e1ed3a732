"""What ranks agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist


def from_rank_zero(value: float) -> float:
    """Return the ``value`` of rank 0 on every rank; without a process group, ``value``."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return float(shared.item())
