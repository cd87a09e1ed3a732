from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.forks import run_module

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
def test_memory_that_is_kept_is_not_mapped_again(tmp_path: Path) -> None:
    (tmp_path / "kept.py").write_text(FAULTS.format(before="assert keep_freed_memory()"))
    (tmp_path / "given_back.py").write_text(FAULTS.format(before=""))
    kept, given_back = (int(run_module(name, cwd=tmp_path).stdout) for name in ("kept", "given_back"))
    assert kept < 100
    assert given_back > 10 * kept
