"""What a piece of work takes, its part on a GPU included."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long ``work`` takes, until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most that tensors take of a GPU's memory while ``work`` runs, those from before it included."""
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def waits(work: Callable[[], object]) -> int:
    """Return how often the host waits for a GPU in ``work``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
