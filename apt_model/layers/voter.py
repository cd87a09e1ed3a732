"""Entropy voting: where the prediction is uncertain, several stochastic votes are combined."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.layers.backend import eager_on_cpu
from apt_model.layers.counted import Counted, mean_over
from apt_model.schedule.targets import NOT_NEGATIVE, Domain


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of the distribution over the last dimension of ``logits``."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1)


class EntropyVoter(nn.Module):
    """Replaces uncertain predictions by the mean of ``num_votes`` predictions under dropout of the hidden state.

    A position is uncertain when the entropy of its prediction, in nats, exceeds ``threshold`` (0-dim). Other positions
    keep their logits to the bit. Sources: Monte Carlo dropout arXiv:1506.02142, multi-sample dropout arXiv:1905.09788,
    votes by sampling arXiv:2203.11171.
    """

    scheduled: ClassVar[dict[str, Domain]] = {"threshold": NOT_NEGATIVE}
    threshold: Tensor

    def __init__(self, *, threshold: float = 2.2, num_votes: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_votes = num_votes
        self.dropout = dropout
        self.enabled = False
        self.watched = False  # whether the entropy is asked for also while the voter is disabled
        self.register_buffer("threshold", torch.tensor(float(threshold)), persistent=False)

    def enable(self, on: bool) -> None:
        """Enable or disable voting."""
        self.enabled = on

    def forward(
        self,
        hidden: Tensor,
        logits: Tensor,
        head: Callable[[Tensor], Tensor],
        counted: Counted | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits with uncertain positions voted on, and metrics (detached, 0-dim).

        Args:
            hidden: (batch, seq, d_model), what ``head`` turns into logits.
            logits: (batch, seq, vocab_size) = head(hidden).
            counted: positions (batch, seq) that metrics are of; None: all.
        """
        if not (self.enabled or self.watched):
            return logits, {}
        with torch.no_grad():
            uncertainty = entropy(logits)
            uncertain = uncertainty > self.threshold
            metrics = {"voter/entropy": mean_over(counted, uncertainty)}
        if not self.enabled:
            return logits, metrics
        metrics["voter/voted_fraction"] = mean_over(counted, uncertain.float())
        if not eager_on_cpu(hidden):
            # shapes that depend on the data would have the host wait for the device, or break the graph: all positions vote
            return torch.where(uncertain.unsqueeze(-1), self._votes(hidden, head), logits.float()), metrics
        votes = self._votes(hidden[uncertain], head)
        return logits.float().masked_scatter(uncertain.unsqueeze(-1), votes), metrics

    def _votes(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the log of the votes' mean probability, (..., vocab_size) for hidden states (..., d_model)."""
        votes = [head(F.dropout(hidden, self.dropout)).float().log_softmax(dim=-1) for _ in range(self.num_votes)]
        return torch.stack(votes).logsumexp(dim=0) - math.log(self.num_votes)
