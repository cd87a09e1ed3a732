"""Where a run computes, and in what precision."""

from __future__ import annotations

from typing import Literal

import torch

from apt_model.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def choose_device(name: str, key: str = "trainer.device") -> torch.device:
    """Return the device that ``name``, under ``key``, means; ``auto`` is CUDA where there is one.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{key}: {name!r} was asked for, but torch {torch.__version__} sees no CUDA device here. "
            f"Set {key}=cpu or {key}=auto."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key}: {name!r} was asked for, but there are {torch.cuda.device_count()} devices here.")
    return device


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype that forward passes compute in.

    Raises:
        ConfigError: fp16 on a device that is not CUDA.
    """
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"trainer.precision: fp16 needs a CUDA device, and this run is on {device.type}. Set trainer.precision=bf16 "
            "or fp32."
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
