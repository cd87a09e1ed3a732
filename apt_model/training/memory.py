"""How the C library keeps memory that tensors have freed."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Keep freed memory in the process instead of giving it back to the system; return whether the C library could.

    A training step allocates and frees the same large tensors again and again. By default glibc gets each from the system
    and gives it back, so every page is zeroed and mapped anew: half the time of a layer with many experts. The process
    holds its peak of memory from then on.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never
