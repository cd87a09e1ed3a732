"""Entropy voting: where the prediction is uncertain, several stochastic votes are combined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import ClassVar, Literal

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

    ``draws`` says how votes differ. ``opposite``: they come in pairs, in which dropout moves the hidden state by as much to
    either side, and one of an odd number is the prediction itself: what dropout does on the average is out of their mean
    (antithetic variates, Hammersley and Morton 1956). ``independent``: each has its own dropout.
    """

    scheduled: ClassVar[dict[str, Domain]] = {"threshold": NOT_NEGATIVE}
    threshold: Tensor

    def __init__(
        self,
        *,
        threshold: float = 2.2,
        num_votes: int = 3,
        dropout: float = 0.1,
        draws: Literal["opposite", "independent"] = "independent",  # what runs of earlier versions had
    ) -> None:
        super().__init__()
        self.num_votes = num_votes
        self.dropout = dropout
        self.draws = draws
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
            return torch.where(uncertain.unsqueeze(-1), self._votes(hidden, logits, head), logits.float()), metrics
        votes = self._votes(hidden[uncertain], logits[uncertain], head)
        return logits.float().masked_scatter(uncertain.unsqueeze(-1), votes), metrics

    @property
    def head_passes(self) -> int:
        """How often the head maps hidden states for the votes; a vote that is the prediction takes none."""
        return self.num_votes - (self.num_votes % 2 if self.draws == "opposite" else 0)

    def _votes(self, hidden: Tensor, logits: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the log of the votes' mean probability, (..., vocab_size) for hidden states (..., d_model)."""
        own = [logits] if self.head_passes < self.num_votes else []
        votes = [vote.float().log_softmax(dim=-1) for vote in chain(own, map(head, self._drawn(hidden)))]
        return torch.stack(votes).logsumexp(dim=0) - math.log(self.num_votes)

    def _drawn(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield ``head_passes`` hidden states under dropout."""
        if self.draws == "independent":
            yield from (F.dropout(hidden, self.dropout) for _ in range(self.num_votes))
            return
        for _ in range(self.num_votes // 2):
            dropped = F.dropout(hidden, self.dropout)
            yield from (dropped, 2 * hidden - dropped)
