"""Where a tensor is computed, in what precision, and by which library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ONEDNN, _MKL = "bf16", "ieee"


def eager_on_cpu(x: Tensor) -> bool:
    """Return whether ``x`` is on the CPU and nothing is compiled: sizes may follow from values there, without waiting."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def computing_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast asks for, else that of ``x``."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Return whether products in ``dtype`` on the CPU are oneDNN's, which compiles a kernel for each new size."""
    return dtype.itemsize == 2 or (dtype == torch.float32 and _float32_products() == _ONEDNN)


@contextmanager
def onednn_products() -> Iterator[bool]:
    """Within, have oneDNN do products in float32 on processors where it is faster than MKL: AMD's with AVX-512.

    torch hands them over when it is allowed to compute them in bf16. Only AMX lets oneDNN do that; elsewhere it computes in
    float32, and a product of numbers that bf16 does not hold makes sure of it. Yields whether it does.
    """
    before = _float32_products()
    try:
        if _amd_with_avx512():
            _have_float32_products(_ONEDNN)
            if not _exact():
                _have_float32_products(before)
        yield onednn_multiplies(torch.float32)
    finally:
        _have_float32_products(before)


@contextmanager
def mkl_products() -> Iterator[None]:
    """Within :func:`onednn_products`, leave many small products to MKL."""
    before = _float32_products()
    _have_float32_products(_MKL if before == _ONEDNN else before)
    try:
        yield
    finally:
        _have_float32_products(before)


def _amd_with_avx512() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:  # before torch 2.11
        return False
    there = capabilities()
    return bool(there["cpu_name"].startswith("AMD") and there["avx512_f"] and not there["amx_tile"])


def _exact() -> bool:
    numbers = torch.linspace(1.0, 2.0, 64 * 64).view(64, 64)
    return torch.equal(numbers @ torch.eye(64), numbers)


def _float32_products() -> str:
    how: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return how


def _have_float32_products(how: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = how  # type: ignore[attr-defined]
