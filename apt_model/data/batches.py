"""Batches as tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from apt_model.data.borders import Borders, split_windows
from apt_model.data.sampler import Sampler
from apt_model.data.tokens import Tokens


class Batches:
    """Tokens, in memory or memory-mapped, served by a :class:`Sampler`.

    Args:
        borders: of documents that do not see each other: the first token of one is no target; None: all are.
    """

    masked: bool
    """Whether some targets may be -100, positions that count nowhere: batches then count by how many others they have."""

    def __init__(self, tokens: Tokens, sampler: Sampler, borders: Borders | None = None) -> None:
        self.tokens = tokens
        self.sampler = sampler
        self.borders = borders
        self.masked = borders is not None

    def __len__(self) -> int:
        return self.sampler.num_batches

    def epoch(
        self, epoch: int, *, start: int = 0, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tokens, targets), each (batch_size, seq_len) int64, from batch ``start`` of ``epoch`` on."""
        length = self.sampler.seq_len + 1
        order = self.sampler.windows(epoch)[start:]
        for number, begins in enumerate(order):
            for coming in order[number + 1 : number + 2]:
                self.tokens.expect(coming, length)
            window = torch.from_numpy(self.tokens.windows(begins, length))
            if torch.device(device).type == "cuda":  # from pinned memory, so that nobody waits for the copy
                window = window.pin_memory().to(device, non_blocking=True)
            else:
                window = window.to(device)
            yield split_windows(window, self.borders)
