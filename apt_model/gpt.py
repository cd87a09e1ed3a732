"""The decoder: a GPT whose feed-forward layers, alignment and voter can be switched while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt_model.ignored import IGNORED
from apt_model.layers.align import AlignReport, BiStateAlignment, StableSum
from apt_model.layers.attention import KeyValues, QKNorm, SelfAttention
from apt_model.layers.balance import complete
from apt_model.layers.counted import Counted, counted_positions, mean_over
from apt_model.layers.documents import Documents
from apt_model.layers.feed_forward import FeedForward
from apt_model.layers.metrics import METRICS
from apt_model.layers.moe import Lineage, MoE, MoEReport
from apt_model.layers.norm import RMSNorm
from apt_model.layers.router import z_loss
from apt_model.layers.tally import layer_metrics, model_metrics
from apt_model.layers.voter import EntropyVoter
from apt_model.schedule.targets import BELOW_ONE, NOT_NEGATIVE, Domain, matching


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: Tensor | None  # (batch, seq, vocab_size); None where the loss was computed in chunks
    language_loss: Tensor | None  # 0-dim: mean cross-entropy in nats a token; None without targets
    auxiliary_loss: Tensor  # 0-dim: what balances and aligns, weighted
    metrics: dict[str, Tensor]  # detached, 0-dim
    routing: Tensor | None = None  # (num_layers, ...): the sums that the metrics of routing are made of
    hidden: Tensor | None = None  # (batch, seq, d_model): what the head turned into logits, where it was asked for


class Cache:
    """What a model remembers of the tokens it has read, so that it reads each once."""

    def __init__(self, num_layers: int) -> None:
        self.blocks = [KeyValues() for _ in range(num_layers)]
        self.align = StableSum()

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.blocks[0].length


class Block(nn.Module):
    """Pre-norm residual block: attention, then a feed-forward layer that may be a mixture of experts."""

    def __init__(self, *, attention: SelfAttention, ffn: MoE, d_model: int, norm_eps: float | None = None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model, norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(d_model, norm_eps)
        self.ffn = ffn

    def forward(
        self,
        x: Tensor,
        seen: KeyValues | Documents | None = None,
        with_metrics: bool = True,
        counted: Counted | None = None,
    ) -> tuple[Tensor, MoEReport | None]:
        """Map (batch, seq, d_model) to the same shape; ``seen``: see :class:`SelfAttention`; the others: see :class:`MoE`."""
        x = x + self.attention(self.attention_norm(x), seen)
        y, report = self.ffn(self.ffn_norm(x), with_metrics, counted)
        return x + y, report


class GPT(nn.Module):
    """Decoder-only transformer: RMSNorm, rotary positions; unless told otherwise no biases, tied embeddings.

    Args:
        vocab_size, d_model, num_heads, num_layers, d_ff: the usual sizes; a head's width is even.
        seq_len: the longest sequence in tokens.
        attention: a name of :data:`apt_model.layers.attention.ATTENTION`.
        ffn: a name of :data:`apt_model.layers.feed_forward.FFN`.
        dropout: share of the channels that attention and feed-forward layers drop in training.
        label_smoothing: share of the target that training spreads over all tokens (arXiv:1512.00567).
        z_loss_weight: weight of the mean squared logsumexp of the logits, in training (z-loss; PaLM, arXiv:2204.02311).
        loss_chunk: tokens whose logits are held at once while the loss is computed; None: all. Costs one more product with
            the embedding, and spares most of what a large vocabulary needs.
        num_kv_heads, head_dim, rope_theta, rope_scaling, qk_norm, qkv_bias, sliding_window: see :class:`SelfAttention`.
        tie_embeddings: whether the matrix that embeds tokens predicts them, too; else there is one more, ``unembedding``.
        norm_eps: of every :class:`RMSNorm`.
        moe: wraps a dense layer; called once a layer.
        align: builds the alignment for a d_model.
        voter: builds the voter.
    """

    scheduled: ClassVar[dict[str, Domain]] = {"label_smoothing": BELOW_ONE, "z_loss_weight": NOT_NEGATIVE}
    label_smoothing: Tensor
    z_loss_weight: Tensor

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
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss_weight: float = 0.0,
        loss_chunk: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        tie_embeddings: bool = True,
        rope_theta: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        norm_eps: float | None = None,
        qk_norm: QKNorm | None = None,
        qkv_bias: bool = False,
        sliding_window: int | None = None,
        moe: Callable[..., MoE],
        align: Callable[..., BiStateAlignment] = BiStateAlignment,
        voter: Callable[[], EntropyVoter] = EntropyVoter,
    ) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.loss_chunk = loss_chunk
        self.activation_checkpointing = False  # whether the backward pass computes blocks again instead of keeping them
        self.register_buffer("label_smoothing", torch.tensor(float(label_smoothing)), persistent=False)
        self.register_buffer("z_loss_weight", torch.tensor(float(z_loss_weight)), persistent=False)
        given = {"label_smoothing": label_smoothing, "z_loss_weight": z_loss_weight}
        self.expected = {name for name, value in given.items() if value}
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(
                attention=SelfAttention(
                    d_model=d_model,
                    num_heads=num_heads,
                    seq_len=seq_len,
                    attention=attention,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    rope_theta=rope_theta,
                    rope_scaling=rope_scaling,
                    norm_eps=norm_eps,
                    qk_norm=qk_norm,
                    qkv_bias=qkv_bias,
                    sliding_window=sliding_window,
                ),
                ffn=moe(FeedForward(d_model=d_model, d_ff=d_ff, ffn=ffn), dropout=dropout),
                d_model=d_model,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.align = align(d_model=d_model)
        self.norm = RMSNorm(d_model, norm_eps)
        self.unembedding = None if tie_embeddings else nn.Linear(d_model, vocab_size, bias=False)
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
        return F.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """The matrix that predicts tokens, (vocab_size, d_model)."""
        return (self.embedding if self.unembedding is None else self.unembedding).weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        with_metrics: bool = True,
        with_hidden: bool = False,
    ) -> Output:
        """Predict the next token at every position.

        Args:
            tokens: (batch, seq) int64, seq <= seq_len.
            targets: the same shape: the token that follows each; positions whose target is
                :data:`~apt_model.ignored.IGNORED` are part of no loss and no metric.
            documents: (batch, seq) integers, equal and side by side where tokens are of one document: others are not seen, and
                each begins at position 0; None: a sequence is one document.
            with_metrics: whether to return metrics of routing, which cost time; compiled, that is a graph more.
            with_hidden: whether to return the hidden states, too.
        """
        if self.training:
            for layer in self.moe_layers:
                if not layer.driven:
                    layer.balance()
        counted = None if targets is None else counted_positions(targets)
        hidden, reports, alignment = self._hidden(
            tokens,
            with_metrics=with_metrics,
            counted=counted,
            documents=None if documents is None else Documents(documents),
        )
        logits = loss = z = None
        if targets is None:
            logits, votes = self.voter(hidden, self.head(hidden), self.head)
        elif self.loss_chunk is None:
            logits, loss, z, votes = self._predict(hidden, targets, counted)
        else:
            loss, z, votes = self._loss_in_chunks(
                hidden.flatten(0, 1), targets.flatten(), self.loss_chunk, None if counted is None else counted.flat()
            )
        auxiliary = torch.zeros((), device=hidden.device)
        metrics = dict(votes)
        routing = None
        if z is not None:
            auxiliary = auxiliary + self.z_loss_weight * z
            metrics["head/z_loss"] = z.detach()
        if reports:
            reports = complete([layer for layer in self.moe_layers if layer.enabled], reports)
            auxiliary = auxiliary + torch.stack([report.loss for report in reports]).mean()
        if reports and with_metrics:
            routing = torch.stack([report.sums for report in reports if report.sums is not None])
            values = model_metrics(layer_metrics(routing))
            metrics |= {f"moe/{name}": value for name, value in zip(METRICS, values.unbind(), strict=True)}
        if alignment is not None:
            auxiliary = auxiliary + alignment.loss
            metrics |= alignment.metrics
        return Output(logits, loss, auxiliary, metrics, routing, hidden if with_hidden else None)

    def _hidden(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        with_metrics: bool = False,
        counted: Counted | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, list[MoEReport], AlignReport | None]:
        """Return what :meth:`head` turns into logits, (batch, seq, d_model), and the reports of layers."""
        hidden = self.embedding(tokens)
        reports = []
        for block, seen in zip(self.blocks, cache.blocks if cache else [documents] * len(self.blocks), strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden, report = checkpoint(block, hidden, seen, with_metrics, counted, use_reentrant=False)
            else:
                hidden, report = block(hidden, seen, with_metrics, counted)
            if report is not None:
                reports.append(report)
        hidden, alignment = self.align(hidden, cache.align if cache else documents, counted)
        return self.norm(hidden), reports, alignment

    def new_cache(self) -> Cache:
        """Return a cache that remembers nothing."""
        return Cache(len(self.blocks))

    def next_logits(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, dict[str, Tensor]]:
        """Read ``tokens`` (batch, seq) after those that ``cache`` remembers, seq_len in all at most.

        Returns:
            (batch, vocab_size) logits of the token that comes next, and the voter's metrics (0-dim).
        """
        hidden = self._hidden(tokens, cache)[0][:, -1:]
        logits, votes = self.voter(hidden, self.head(hidden), self.head)
        return logits[:, 0].float(), votes

    def _predict(
        self, hidden: Tensor, targets: Tensor, counted: Counted | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """Return logits (..., vocab_size), their mean loss and z-loss, and the voter's metrics.

        Args:
            hidden: (..., d_model).
            targets: (...).
        """
        logits, votes = self.voter(hidden, self.head(hidden), self.head, counted)
        flat = logits.float().flatten(0, -2)
        counted = None if counted is None else counted.flat()
        z = z_loss(flat, counted) if self.training and "z_loss_weight" in self.expected else None
        return logits, self._loss(flat, targets.flatten(), counted), z, votes

    def _loss_in_chunks(
        self, hidden: Tensor, targets: Tensor, chunk: int, counted: Counted | None = None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Do what :meth:`_predict` does, a few tokens at a time; the backward pass computes their logits again."""
        losses, zs, votes = [], [], []
        of_chunk: Counted | None
        share: float | Tensor
        for number, (some, wanted) in enumerate(
            zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        ):
            of_chunk, share = None, len(wanted) / len(targets)
            if counted is not None:
                of_chunk = Counted.of(counted.mask[number * chunk : number * chunk + len(wanted)])
                share = of_chunk.mask.sum() / counted.mask.sum().clamp(min=1)
            given = (some, wanted, of_chunk)
            loss, z, metrics = checkpoint(lambda *given: self._predict(*given)[1:], *given, use_reentrant=False)
            losses.append(loss * share)
            zs += [] if z is None else [z * share]
            votes.append({name: value * share for name, value in metrics.items()})
        z = torch.stack(zs).sum() if zs else None
        return torch.stack(losses).sum(), z, {name: torch.stack([v[name] for v in votes]).sum() for name in votes[0]}

    def _loss(self, logits: Tensor, targets: Tensor, counted: Counted | None) -> Tensor:
        """Return the mean cross-entropy of ``logits`` (tokens, vocab_size); smoothed in training where that was asked for."""
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED)
        if counted is not None:
            loss = loss.where(counted.mask.any(), 0.0)
        if not (self.training and "label_smoothing" in self.expected):
            return loss
        spread = -mean_over(counted, logits.log_softmax(dim=-1))
        return (1.0 - self.label_smoothing) * loss + self.label_smoothing * spread

    @property
    def moe_layers(self) -> list[MoE]:
        """The feed-forward layers of all blocks."""
        return [block.ffn for block in self.blocks]  # type: ignore[misc]

    def expert_cosines(self) -> Tensor:
        """Return :meth:`Experts.cosine` of each layer whose experts are enabled, (num_layers,)."""
        return torch.stack([layer.experts.cosine() for layer in self.moe_layers if layer.experts is not None])

    def compile_parts(self, *, whole: bool = True) -> None:
        """Have torch.compile make graphs of the blocks, of the alignment and of the loss, when each is met in a new state.

        Blocks that are in one state share a graph, so that a deep model takes no longer than a flat one.

        Args:
            whole: each is one graph, or an error; False: hooks, which FSDP has within a block, may part it.
        """
        for part in (*self.blocks, self.align):
            part.compile(fullgraph=whole, dynamic=False)
        self._predict = torch.compile(self._predict, fullgraph=whole, dynamic=False)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is compiled: a copy would compute with the original's parts."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_predict", None)
        return state

    def freeze(self, pattern: str, on: bool) -> None:
        """Stop or resume training what ``pattern`` means: modules or parameters by path, ``*`` within one part."""
        parameters = dict(self.named_parameters())
        for name in matching(pattern, [*(path for path, _ in self.named_modules() if path), *parameters]):
            chosen = [parameters[name]] if name in parameters else self.get_submodule(name).parameters()
            for parameter in chosen:
                parameter.requires_grad_(not on)
                parameter.grad = None

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
