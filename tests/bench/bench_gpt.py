"""Training speed of the whole model beside a plain loop of equal size, and with experts at equal active FLOPs, in one run.

    python -m tests.bench.bench_gpt [--rounds 8] [--updates 4] [--precision fp32 bf16] [--threads 2]
    python -m tests.bench.bench_gpt --device cuda [--rounds 8] [--updates 10] [--precision bf16] [--peak-tflops 989.5]

A report, no test. Everybody trains a byte-level GPT (d_model 256, 4 layers, 4 heads, sequence 256, batch 16) with fused AdamW.
The plain loop is what one would write: a decoder with learned positions, LayerNorm, GELU of 4 d_model and tied embeddings in
the manner of nanoGPT, a forward pass, a backward pass, a clipped step. A second one has ours: RMSNorm and rotary positions.
Ours does all that training does: the curriculum, the metrics, the rows, and by default it has oneDNN multiply in float32 on
AMD's processors (trainer.onednn_products), which a plain loop is asked to do in a row of its own. The experts' layers have two
experts a token of half the width, so that a token meets equal FLOPs. All take turns; a ratio is the median over rounds of the
speed over that of the plain loop in the same round.

On a GPU the model is as large as GPT-2's smallest (768, 12 layers, 12 heads, sequence 1024, batch 16, a vocabulary of 50304 of
which bytes use 256), and the plain loop and ours take part under torch.compile, too. Told besides are the FLOPs that
apt_launch.config.sizes counts, MFU, their share of the card's dense bf16 peak (of apt_launch.config.gpus, by the name, or
--peak-tflops), the most memory that an update takes beside what the preview reckons, and how often the host waits for the device
in an update without a row.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from apt_launch.config.gpus import GPUS
from apt_launch.config.load import composed
from apt_launch.config.sizes import Phase, sizes
from apt_launch.runs.build import build_trainer
from apt_model.layers.backend import onednn_products
from apt_model.training.memory import keep_freed_memory
from apt_model.training.trainer import Trainer
from tests.bench.device import peak_bytes, seconds, waits


class Shape(NamedTuple):
    """Of the model and its batches."""

    d_model: int
    num_layers: int
    num_heads: int
    seq_len: int
    vocab_size: int
    batch_size: int


SHAPES = {"cpu": Shape(256, 4, 4, 256, 256, 16), "cuda": Shape(768, 12, 12, 1024, 50304, 16)}
PRECISIONS = {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}
UPDATES = {"cpu": 4, "cuda": 10}


def rotary(x: Tensor) -> Tensor:
    """Turn pairs of channels of (batch, heads, seq, head_dim) by their positions, as one would write it."""
    half = x.shape[-1] // 2
    positions, channels = (torch.arange(n, device=x.device) for n in (x.shape[-2], half))
    angles = torch.outer(positions, 10_000.0 ** (-channels / half))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainBlock(nn.Module):
    """Attention and a GELU layer, each after a norm."""

    def __init__(self, shape: Shape, as_ours: bool) -> None:
        super().__init__()
        d = shape.d_model
        self.as_ours, self.num_heads = as_ours, shape.num_heads
        self.norms = nn.ModuleList([norm(d, as_ours) for _ in range(2)])
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, d = x.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).split(d, dim=2)
        )
        if self.as_ours:
            query, key = rotary(query), rotary(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, d))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def norm(d_model: int, as_ours: bool) -> nn.Module:
    """Return the layer between others."""
    return nn.RMSNorm(d_model) if as_ours else nn.LayerNorm(d_model, bias=False)


class PlainGPT(nn.Module):
    """A decoder without anything to switch."""

    def __init__(self, shape: Shape, as_ours: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = None if as_ours else nn.Embedding(shape.seq_len, shape.d_model)
        self.blocks = nn.Sequential(*(PlainBlock(shape, as_ours) for _ in range(shape.num_layers)))
        self.norm = norm(shape.d_model, as_ours)
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight
        logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain(
    corpus: Tensor,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    as_ours: bool = False,
    by_onednn: bool = False,
    compiled: bool = False,
) -> Iterator[None]:
    """Make one update after another."""
    torch.manual_seed(0)
    with device:
        model = PlainGPT(shape, as_ours)
    called = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for update in itertools.count():
        begins = torch.randint(len(corpus) - shape.seq_len - 1, (shape.batch_size,))
        window = torch.stack([corpus[begin : begin + shape.seq_len + 1] for begin in begins]).long()
        if device.type == "cuda":
            window = window.pin_memory().to(device, non_blocking=True)
        with onednn_products() if by_onednn else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext():
                loss = called(window[:, :-1], window[:, 1:])
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if update % 10 == 0:
            loss.item()
        yield


def ours(overrides: list[str]) -> Iterator[None]:
    """Make one update after another, as :meth:`Trainer.fit` does."""
    rows: list[dict[str, float]] = []
    trainer: Trainer = build_trainer(composed(overrides), log=rows.append)
    GlobalHydra.instance().clear()
    for batches in trainer._updates(0):
        with onednn_products():
            trainer.begin_update()
            trainer.step(batches)
            trainer.end_update()
        yield


class Contender(NamedTuple):
    """Who takes part."""

    start: Callable[[], Iterator[None]]
    overrides: list[str]  # of our model, if it is not ours of the one that does the same


def contenders(precision: str, device: torch.device) -> dict[str, Contender]:
    """Return what takes part, by name."""
    from apt_model.data import StdlibCorpus

    corpus = torch.from_numpy(StdlibCorpus().read("train").array().copy())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shape = SHAPES[device.type]
    given = [
        *(f"model.{name}={value}" for name, value in shape._asdict().items() if name != "batch_size"),
        "model.ffn=gelu",
        f"trainer.batch_size={shape.batch_size}",
        "trainer.max_batches_per_epoch=null",
        f"trainer.device={device}",
        f"trainer.precision={precision}",
        "logger.mode=disabled",
        "schedule=none",
    ]
    dense = [*given, f"model.d_ff={4 * shape.d_model}"]
    experts = [*given, "schedule.enable_moe_at_epoch=0", f"model.d_ff={2 * shape.d_model}", "moe.top_k=2"]
    dropless = [*experts, "moe.capacity_factor=null"]
    by = "oneDNN" if device.type == "cpu" else "compiled"
    compiled = {
        f"ours, {name}, compiled": Contender(functools.partial(ours, [*of, "trainer.compile=true"]), of)
        for name, of in (("dense", dense), ("8 experts, dropless", dropless))
        if device.type == "cuda"
    }
    return compiled | {
        "plain loop": Contender(lambda: plain(corpus, shape, dtype, device), dense),
        f"plain loop, {by}": Contender(
            lambda: plain(corpus, shape, dtype, device, by_onednn=by == "oneDNN", compiled=by == "compiled"), dense
        ),
        "plain loop, our layers": Contender(lambda: plain(corpus, shape, dtype, device, as_ours=True), dense),
        "ours, dense": Contender(lambda: ours(dense), dense),
        "ours, 8 experts, dropless": Contender(lambda: ours(dropless), dropless),
        "ours, 8 experts, capacity 1.25": Contender(lambda: ours(experts), experts),
    }


def go_on(steps: Iterator[None], updates: int = 1) -> None:
    """Make the next updates."""
    for _ in range(updates):
        next(steps)


class OnGPU(NamedTuple):
    """What is told of a contender on a GPU."""

    phase: Phase  # what the preview says of it
    peak_bytes: int
    waits: int  # of the host, in an update without a row

    def cells(self, speed: float, peak_tflops: float | None) -> list[str]:
        """Return what the table has of it at ``speed`` tokens/s."""
        tflops = speed * self.phase.training_flops / 1e12
        return [
            f"{tflops:.0f}",
            f"{tflops / peak_tflops:.1%}" if peak_tflops and self.phase.compute_bytes == 2 else "",
            f"{self.peak_bytes / 1e9:.1f}",
            f"{self.phase.total / 1e9:.1f}",
            str(self.waits),
        ]


HEADS = ["", "precision", "tokens/s", "of the plain loop", "of ours, dense"]
HEADS_ON_GPU = ["TFLOP/s", "MFU", "peak GB", "reckoned GB", "waits"]


def on_gpu(steps: Iterator[None], overrides: list[str]) -> OnGPU:
    """Take the first updates, of which the very first has a row."""
    before = torch.cuda.memory_allocated()
    go_on(steps, 2)
    waited = waits(lambda: go_on(steps))
    peak = peak_bytes(lambda: go_on(steps)) - before
    phase = sizes(composed(overrides))[0]
    GlobalHydra.instance().clear()
    return OnGPU(phase, peak, waited)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--updates", type=int, help="a round")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, dense, in bf16")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    shape, updates = SHAPES[asked.device], asked.updates or UPDATES[asked.device]
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    console = Console()
    if device.type == "cuda":
        card = torch.cuda.get_device_name()
        known = {gpu.bf16_tflops: gpu.source for kind, gpu in GPUS.items() if kind in card.lower().replace(" ", "")}
        peak = asked.peak_tflops or next(iter(known), None)
        told_of_peak = (
            f"peak {peak:g} TFLOP/s ({known.get(peak, 'as given')})" if peak else "no MFU without --peak-tflops"
        )
        console.print(f"torch {torch.__version__}, {card}, {told_of_peak}")
    else:
        console.print(f"torch {torch.__version__}, {asked.threads} threads")
    table = Table(*HEADS, *(HEADS_ON_GPU if device.type == "cuda" else []))
    for precision in asked.precision or PRECISIONS[asked.device]:
        running, told = {}, {}
        for name, contender in contenders(precision, device).items():
            running[name] = contender.start()
            if device.type == "cuda":
                told[name] = on_gpu(running[name], contender.overrides)
            else:
                go_on(running[name])
        for steps in running.values():
            go_on(steps)  # who compiles forgets what was compiled before
        took: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(asked.rounds):
            for name, steps in running.items():
                took[name].append(seconds(functools.partial(go_on, steps, updates), device))
        bases = took["plain loop"], took["ours, dense"]
        for name, times in took.items():
            speed = updates * shape.batch_size * shape.seq_len / statistics.median(times)
            ratios = [
                statistics.median(base / own for base, own in zip(bases_of, times, strict=True)) for bases_of in bases
            ]
            more = told[name].cells(speed, peak) if name in told else []
            table.add_row(name, precision, f"{speed:,.0f}", *(f"{ratio:.2f}" for ratio in ratios), *more)
    console.print(table)


if __name__ == "__main__":
    main()
