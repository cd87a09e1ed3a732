"""Bi-state alignment: a stable and a fluid state of the hidden representation, kept in agreement."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.ignored import IGNORED
from apt_model.layers.counted import Counted
from apt_model.layers.documents import Documents, sums_within
from apt_model.schedule.targets import NOT_NEGATIVE, Domain


class AlignReport(NamedTuple):
    """The alignment loss, weighted, and metrics (detached, 0-dim)."""

    loss: Tensor
    metrics: dict[str, Tensor]


class StableSum:
    """The sum of the hidden states that there were, (batch, 1, d_model) float32, and their number."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.length = 0


class BiStateAlignment(nn.Module):
    """Mixes a slow state of the text so far into the hidden state, and rewards agreement of the two.

    The fluid state of a position is its hidden state; the stable state is the mean of the hidden states up to it, so
    nothing comes from the future. Both go to a subspace of ``rank``. ``alpha`` mixes there (1: only the stable state);
    ``beta`` is the share of the mixture, brought back to d_model, that is added to the hidden state. The way back begins
    at zero, so that switching on leaves the function as it was.

    The loss asks each position's fluid state to find its own stable state among those of the batch's other sequences at
    the same position: cross-entropy of cosine similarities over ``tau`` (InfoNCE, arXiv:1807.03748), 0 for a batch of
    one. The stable side gets no gradient (SimSiam, arXiv:2011.10566). ``trains`` says what the loss trains: ``projection``,
    the way into the subspace, which learns where the two states agree and leaves the hidden state to the other losses; or
    ``all``, the layers below as well, which make the hidden state agree and predict worse for it (docs/study.md).

    Off, there are no parameters. ``weight``, 0-dim, is the loss's weight.
    """

    scheduled: ClassVar[dict[str, Domain]] = {"weight": NOT_NEGATIVE}
    weight: Tensor

    def __init__(
        self,
        *,
        d_model: int,
        rank: int = 16,
        alpha: float = 0.35,
        beta: float = 0.2,
        tau: float = 0.15,
        weight: float = 0.1,
        trains: Literal["projection", "all"] = "all",  # what runs of earlier versions had
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.rank = rank
        self.alpha = alpha
        self.beta = beta
        self.tau = tau
        self.trains = trains
        self.down: nn.Linear | None = None
        self.back: nn.Linear | None = None
        self.register_buffer("weight", torch.tensor(float(weight)), persistent=False)

    @property
    def enabled(self) -> bool:
        """Whether the module takes part."""
        return self.down is not None

    def enable(self, on: bool) -> None:
        """Enable, with new projections, or disable, without any."""
        if on == self.enabled:
            return
        self.down = nn.Linear(self.d_model, self.rank, bias=False).to(self.weight.device) if on else None
        self.back = nn.Linear(self.rank, self.d_model, bias=False).to(self.weight.device) if on else None
        if self.back is not None:
            nn.init.zeros_(self.back.weight)

    def forward(
        self, hidden: Tensor, seen: StableSum | Documents | None = None, counted: Counted | None = None
    ) -> tuple[Tensor, AlignReport | None]:
        """Map ``hidden`` (batch, seq, d_model) to the same shape; a report when enabled.

        Args:
            seen: of the positions before those of ``hidden``, which are added; or documents, whose stable states are each its
                own; None: there is neither.
            counted: positions (batch, seq) that the loss asks, and compares with; None: all.
        """
        if self.down is None or self.back is None:
            return hidden, None
        positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).unsqueeze(1)
        if isinstance(seen, Documents):
            total, positions = sums_within(seen, hidden), (seen.positions + 1).unsqueeze(2)
        else:
            total = hidden.float().cumsum(dim=1)
        if isinstance(seen, StableSum):
            total, positions = total + seen.total, positions + seen.length
            seen.total, seen.length = total[:, -1:], seen.length + hidden.shape[1]
        stable = self.down((total / positions).to(hidden.dtype))
        fluid = self.down(hidden)
        mixed = self.back(self.alpha * stable + (1.0 - self.alpha) * fluid)
        asked = fluid if self.trains == "all" else self.down(hidden.detach())
        loss, agreement = self.alignment_loss(asked, stable, counted)
        metrics = {"align/loss": loss.detach(), "align/agreement": agreement.detach()}
        return hidden + self.beta * mixed, AlignReport(self.weight * loss, metrics)

    def alignment_loss(self, fluid: Tensor, stable: Tensor, counted: Counted | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss and the mean cosine similarity of matching states; both states: (batch, seq, rank)."""
        fluid = F.normalize(fluid.float(), dim=-1)
        stable = F.normalize(stable.detach().float(), dim=-1)
        similarity = torch.einsum("itr,jtr->tij", fluid, stable)  # (seq, batch, batch)
        own = torch.arange(fluid.shape[0], device=fluid.device).expand(fluid.shape[1], -1)
        scores = similarity / self.tau
        if counted is not None:
            here = counted.mask.t()  # (seq, batch)
            # finite: where no sequence counts there are no others
            scores = scores.masked_fill(~here.unsqueeze(1), -1e9)
            own = own.masked_fill(~here, IGNORED)
            similarity = similarity.masked_fill(~here.unsqueeze(1), 0.0)
        loss = F.cross_entropy(scores.flatten(0, 1), own.flatten(), ignore_index=IGNORED)
        agreement = similarity.diagonal(dim1=1, dim2=2).mean()
        if counted is not None:
            loss, agreement = loss.where(here.any(), 0.0), agreement * counted.scale
        return loss, agreement
