"""The random state of a process: what it draws next."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed every generator that code of a run may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators, of the CPU and of ``device``, as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(_plain(value) for value in rest)),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Take up what :func:`random_state` returned; a device of another kind continues from its own."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def check_random_state(state: Mapping[str, Any]) -> None:
    """Make sure that ``state`` is one that :func:`restore_random_state` can take up, without doing so.

    Raises:
        Exception: what Python, NumPy or torch has to say of it.
    """
    random.Random().setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.Generator().set_state(state["cpu"])
    if state["cuda"] is not None and (
        not isinstance(state["cuda"], torch.Tensor) or state["cuda"].dtype != torch.uint8
    ):
        raise TypeError("cuda: no tensor of bytes")


def _plain(value: Any) -> int | float:
    return float(value) if isinstance(value, float) else int(value)
