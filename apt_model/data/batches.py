"""Batches as tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from apt_model.data.sampler import Sampler


class Batches:
    """A corpus in memory, served by a :class:`Sampler`."""

    def __init__(self, tokens: bytearray, sampler: Sampler) -> None:
        self.tokens = torch.frombuffer(tokens, dtype=torch.uint8)
        self.sampler = sampler

    def __len__(self) -> int:
        return self.sampler.num_batches

    def epoch(
        self, epoch: int, *, start: int = 0, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (tokens, targets), each (batch_size, seq_len) int64, from batch ``start`` of ``epoch`` on."""
        span = torch.arange(self.sampler.seq_len + 1)
        for begins in self.sampler.windows(epoch)[start:]:
            window = self.tokens[torch.from_numpy(begins).unsqueeze(1) + span].long().to(device)
            yield window[:, :-1], window[:, 1:]
