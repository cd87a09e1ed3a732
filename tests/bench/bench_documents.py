"""Attention within documents, beside attention over whole sequences: forward and backward, milliseconds.

    python -m tests.bench.bench_documents [--device cuda] [--dtype bfloat16]

A report, no test. Lengths of documents are exponential, as a text's are roughly; each line is a mean length. ``whole`` has no
documents, ``documents`` is what data.pack=document runs, ``masks`` what it runs compiled. Rounds alternate; the least of each.
On the CPU its time is counted, whoever else computes there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from apt_model.layers.attention import SelfAttention, sdpa
from apt_model.layers.backend import onednn_products
from apt_model.layers.documents import Documents
from tests.bench.device import seconds

BATCH, HEADS, HEAD_DIM = 4, 4, 32


def documents_of(mean: float, length: int, device: torch.device) -> Documents:
    """Draw where documents end."""
    ends = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(0)) < 1 / mean
    return Documents(ends.cumsum(1).to(device))


def step(layer: SelfAttention, x: Tensor, seen: Documents | None, *, masked: bool = False) -> Callable[[], None]:
    """Return a forward and a backward pass; a batch's documents are laid out once for all layers, which is no part of it."""

    def masks(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        assert seen is not None
        return sdpa(query, key, value, window, seen.numbers)

    def work() -> None:
        layer.attend = masks if masked else sdpa
        layer(x, None if masked else seen).sum().backward()

    return work


def cpu_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long the processor is at ``work``."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    table = Table(
        *("seq", "mean document", "padding", "whole", "documents", "masks"), title=f"torch {torch.__version__}"
    )
    for length in (256, 1024):
        layer = SelfAttention(d_model=HEADS * HEAD_DIM, num_heads=HEADS, seq_len=length).to(device, dtype)
        x = torch.randn(BATCH, length, HEADS * HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
        for mean in (length, length // 4, length // 16):
            seen = documents_of(mean, length, device)
            works = [step(layer, x, None), step(layer, x, seen), step(layer, x, seen, masked=True)]
            times: list[list[float]] = [[], [], []]
            for _ in range(arguments.rounds + 1):
                for work, found in zip(works, times, strict=True):
                    found.append(1000 * (seconds if device.type == "cuda" else cpu_seconds)(work, device))
            least = [f"{min(found[1:]):.1f}" for found in times]
            padding = f"{seen.padding:.0%}" if device.type == "cpu" else ""
            table.add_row(str(length), str(mean), padding, *least)
    Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    with onednn_products():  # as runs have it
        main()
