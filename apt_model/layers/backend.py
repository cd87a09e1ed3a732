"""Where a tensor is computed, and in what precision."""

from __future__ import annotations

import torch
from torch import Tensor


def eager_on_cpu(x: Tensor) -> bool:
    """Return whether ``x`` is on the CPU and nobody compiles: sizes may follow from values there, without waiting."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def computing_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast asks for, else that of ``x``."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
