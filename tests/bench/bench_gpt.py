"""Training speed of the whole model beside a plain loop of equal size, and with experts at equal active FLOPs, in one run.

    python -m tests.bench.bench_gpt [--rounds 8] [--updates 4] [--precision fp32 bf16] [--threads 2]

A report, no test. Everybody trains a byte-level GPT (d_model 256, 4 layers, 4 heads, sequence 256, batch 16) with fused AdamW.
The plain loop is what one would write: a decoder with learned positions, LayerNorm, GELU of 4 d_model and tied embeddings in
the manner of nanoGPT, a forward pass, a backward pass, a clipped step. A second one has ours: RMSNorm and rotary positions.
Ours does all that training does: the curriculum, the metrics, the rows, and by default it has oneDNN multiply in float32 on
AMD's processors (trainer.onednn_products), which a plain loop is asked to do in a row of its own. The experts' layers have two
experts a token of half the width, so that a token meets equal FLOPs. All take turns; a ratio is the median over rounds of the
speed over that of the plain loop in the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from apt_launch.build import build_trainer
from apt_launch.config import composed
from apt_model.layers.backend import onednn_products
from apt_model.training.memory import keep_freed_memory
from apt_model.training.trainer import Trainer

D, LAYERS, HEADS, LENGTH, BATCH, VOCABULARY = 256, 4, 4, 256, 16, 256
CONFIG = (
    f"model.d_model={D}",
    f"model.num_layers={LAYERS}",
    f"model.num_heads={HEADS}",
    f"model.seq_len={LENGTH}",
    "model.ffn=gelu",
    f"trainer.batch_size={BATCH}",
    "trainer.max_batches_per_epoch=null",
    "trainer.device=cpu",
    "logger.mode=disabled",
)


def rotary(x: Tensor) -> Tensor:
    """Turn pairs of channels of (batch, heads, seq, head_dim) by their positions, as one would write it."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), 10_000.0 ** (-torch.arange(half) / half))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainBlock(nn.Module):
    """Attention and a GELU layer, each after a norm."""

    def __init__(self, as_ours: bool) -> None:
        super().__init__()
        self.as_ours = as_ours
        self.norms = nn.ModuleList([norm(as_ours) for _ in range(2)])
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            part.view(batch, length, HEADS, -1).transpose(1, 2) for part in self.qkv(self.norms[0](x)).split(D, dim=2)
        )
        if self.as_ours:
            query, key = rotary(query), rotary(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, D))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def norm(as_ours: bool) -> nn.Module:
    """Return the layer between others."""
    return nn.RMSNorm(D) if as_ours else nn.LayerNorm(D, bias=False)


class PlainGPT(nn.Module):
    """A decoder without anything to switch."""

    def __init__(self, as_ours: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, D)
        self.positions = None if as_ours else nn.Embedding(LENGTH, D)
        self.blocks = nn.Sequential(*(PlainBlock(as_ours) for _ in range(LAYERS)))
        self.norm = norm(as_ours)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))


def plain(corpus: Tensor, dtype: torch.dtype, *, as_ours: bool = False, by_onednn: bool = False) -> Iterator[None]:
    """Make one update after another."""
    torch.manual_seed(0)
    model = PlainGPT(as_ours)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    while True:
        begins = torch.randint(len(corpus) - LENGTH - 1, (BATCH,))
        window = torch.stack([corpus[begin : begin + LENGTH + 1] for begin in begins]).long()
        with onednn_products() if by_onednn else contextlib.nullcontext():
            with torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext():
                loss = model(window[:, :-1], window[:, 1:])
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        yield


def ours(*overrides: str) -> Iterator[None]:
    """Make one update after another, as :meth:`Trainer.fit` does."""
    rows: list[dict[str, float]] = []
    trainer: Trainer = build_trainer(composed([*CONFIG, *overrides]), log=rows.append)
    GlobalHydra.instance().clear()
    for batches in trainer._updates(0):
        with onednn_products():
            trainer.begin_update()
            trainer.step(batches)
            trainer.end_update()
        yield


def contenders(precision: str) -> dict[str, Callable[[], Iterator[None]]]:
    """Return what takes part, by name; the plain loop is first."""
    from apt_model.data import StdlibCorpus

    corpus = torch.from_numpy(StdlibCorpus().read("train").array().copy())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    given = f"trainer.precision={precision}"
    experts = ("schedule=none", "schedule.enable_moe_at_epoch=0", f"model.d_ff={2 * D}", "moe.top_k=2")
    return {
        "plain loop": lambda: plain(corpus, dtype),
        "plain loop, oneDNN": lambda: plain(corpus, dtype, by_onednn=True),
        "plain loop, our layers": lambda: plain(corpus, dtype, as_ours=True),
        "ours, dense": lambda: ours(given, "schedule=none", f"model.d_ff={4 * D}"),
        "ours, 8 experts, dropless": lambda: ours(given, *experts, "moe.capacity_factor=null"),
        "ours, 8 experts, capacity 1.25": lambda: ours(given, *experts),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--updates", type=int, default=4, help="a round")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    table = Table("", "precision", "tokens/s", "of the plain loop", "of ours, dense")
    for precision in asked.precision:
        running = {name: start() for name, start in contenders(precision).items()}
        for steps in running.values():
            next(steps)
        took: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(asked.rounds):
            for name, steps in running.items():
                began = time.perf_counter()
                for _ in range(asked.updates):
                    next(steps)
                took[name].append(time.perf_counter() - began)
        bases = took["plain loop"], took["ours, dense"]
        for name, seconds in took.items():
            speed = asked.updates * BATCH * LENGTH / statistics.median(seconds)
            ratios = [
                statistics.median(base / own for base, own in zip(bases_of, seconds, strict=True)) for bases_of in bases
            ]
            table.add_row(name, precision, f"{speed:,.0f}", *(f"{ratio:.2f}" for ratio in ratios))
    console = Console()
    console.print(f"torch {torch.__version__}, {asked.threads} threads")
    console.print(table)


if __name__ == "__main__":
    main()
