from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from apt_model.training.memory import keep_freed_memory

{before}
for _ in range(40):
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Prints how many pages were mapped for ten tensors of 64 MB, one after another, after forty of them."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what it sets is glibc's")
def test_memory_that_is_kept_is_not_mapped_again() -> None:
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(before=line)], capture_output=True, check=True).stdout)
        for line in ("assert keep_freed_memory()", "")
    )
    assert kept < 100
    assert given_back > 10 * kept
