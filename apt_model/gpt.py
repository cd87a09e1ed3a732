"""The decoder: a GPT whose feed-forward layers, alignment and voter can be switched while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.layers.align import BiStateAlignment
from apt_model.layers.attention import SelfAttention
from apt_model.layers.feed_forward import FeedForward
from apt_model.layers.moe import Lineage, MoE, MoEReport
from apt_model.layers.voter import EntropyVoter


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor  # (batch, seq, vocab_size)
    language_loss: Tensor | None  # 0-dim: mean cross-entropy in nats a token; None without targets
    auxiliary_loss: Tensor  # 0-dim: what balances and aligns, weighted
    metrics: dict[str, Tensor]  # detached, 0-dim


class Block(nn.Module):
    """Pre-norm residual block: attention, then a feed-forward layer that may be a mixture of experts."""

    def __init__(self, *, attention: SelfAttention, ffn: MoE, d_model: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(d_model)
        self.ffn = ffn

    def forward(self, x: Tensor) -> tuple[Tensor, MoEReport | None]:
        """Map (batch, seq, d_model) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        y, report = self.ffn(self.ffn_norm(x))
        return x + y, report


class GPT(nn.Module):
    """Decoder-only transformer: RMSNorm, rotary positions, no biases, tied embeddings.

    Args:
        vocab_size, d_model, num_heads, num_layers, d_ff: the usual sizes; d_model / num_heads is even.
        seq_len: the longest sequence in tokens.
        attention: a name of :data:`apt_model.layers.attention.ATTENTION`.
        ffn: a name of :data:`apt_model.layers.feed_forward.FFN`.
        moe: wraps a dense layer; called once a layer.
        align: builds the alignment for a d_model.
        voter: builds the voter.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        num_heads: int,
        num_layers: int,
        d_ff: int,
        seq_len: int,
        attention: str = "sdpa",
        ffn: str = "swiglu",
        moe: Callable[[FeedForward], MoE],
        align: Callable[..., BiStateAlignment] = BiStateAlignment,
        voter: Callable[[], EntropyVoter] = EntropyVoter,
    ) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(
                attention=SelfAttention(d_model=d_model, num_heads=num_heads, seq_len=seq_len, attention=attention),
                ffn=moe(FeedForward(d_model=d_model, d_ff=d_ff, ffn=ffn)),
                d_model=d_model,
            )
            for _ in range(num_layers)
        )
        self.align = align(d_model=d_model)
        self.norm = nn.RMSNorm(d_model)
        self.voter = voter()
        self._initialise(num_layers)

    @torch.no_grad()
    def _initialise(self, num_layers: int) -> None:
        """Normal with deviation 0.02; what writes into the residual stream is scaled by 1/sqrt(2 x layers) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("attention.out.weight", "ffn.dense.down"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers) if residual else 0.02)

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits (..., vocab_size) for hidden states (..., d_model)."""
        return F.linear(hidden, self.embedding.weight)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Output:
        """Predict the next token at every position.

        Args:
            tokens: (batch, seq) int64, seq <= seq_len.
            targets: the same shape: the token that follows each.
        """
        hidden = self.embedding(tokens)
        reports = []
        for block in self.blocks:
            hidden, report = block(hidden)
            if report is not None:
                reports.append(report)
        hidden, alignment = self.align(hidden)
        hidden = self.norm(hidden)
        logits, votes = self.voter(hidden, self.head(hidden), self.head)

        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        auxiliary = torch.zeros((), device=hidden.device)
        metrics = dict(votes)
        if reports:
            auxiliary = auxiliary + torch.stack([report.loss for report in reports]).mean()
            metrics |= {
                name: torch.stack([report.metrics[name] for report in reports]).mean() for name in reports[0].metrics
            }
        if alignment is not None:
            auxiliary = auxiliary + alignment.loss
            metrics |= alignment.metrics
        return Output(logits, loss, auxiliary, metrics)

    @property
    def moe_layers(self) -> list[MoE]:
        """The feed-forward layers of all blocks."""
        return [block.ffn for block in self.blocks]  # type: ignore[misc]

    def values(self) -> Mapping[str, Callable[[float], None]]:
        """Return the setters of everything that may be annealed, by target name; one call serves all layers."""
        return {
            "router.temperature": _fill([layer.temperature for layer in self.moe_layers]),
            "moe.capacity_factor": _fill([layer.capacity_factor for layer in self.moe_layers]),
            "align.weight": _fill([self.align.weight]),
            "voter.threshold": _fill([self.voter.threshold]),
        }

    def switches(self) -> Mapping[str, Callable[[bool], None]]:
        """Return what enables and disables each module; one call serves all layers."""
        return {"moe": self.enable_moe, "align": self.align.enable, "voter": self.voter.enable}

    def enable_moe(self, on: bool) -> None:
        """Make every feed-forward layer a mixture of experts, or dense again."""
        for layer in self.moe_layers:
            layer.enable(on)

    def take_lineage(self) -> list[Lineage]:
        """Return, once, whose optimizer state the parameters that appeared since the last call should take over."""
        lineage = [link for layer in self.moe_layers for link in layer.lineage]
        for layer in self.moe_layers:
            layer.lineage = []
        return lineage


def _fill(buffers: list[Tensor]) -> Callable[[float], None]:
    """Return a setter that writes 0-dim buffers in place, which torch.compile and CUDA graphs see without recompiling."""

    def set_value(value: float) -> None:
        for buffer in buffers:
            buffer.fill_(value)

    return set_value
