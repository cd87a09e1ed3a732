"""What a mixture of experts costs over a dense layer of equal active FLOPs: ours and others', side by side in one run.

    python -m tests.bench.bench_moe [--rounds 15] [--configs A B C] [--dtypes fp32 bf16] [--threads 1] [--onednn]

A report, no test: times depend on the machine, so only ratios of one run mean something. All contenders take turns within
each round, forward and backward; a ratio is the median over rounds of its time over that of the dense layer in the same
round. bf16 is autocast over float32 weights, as training has it. transformers takes part where it is installed, torchtitan
where it can be imported, for instance from a folder of its own:

    pip install --no-deps --target /tmp/contenders torchtitan spmd_types tyro docstring_parser triton
    PYTHONPATH=/tmp/contenders python -m tests.bench.bench_moe
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from apt_model.layers.backend import onednn_products
from apt_model.layers.feed_forward import FeedForward
from apt_model.layers.moe import MoE
from apt_model.training.memory import keep_freed_memory


class Sizes(NamedTuple):
    """Of a layer; ``d_ff`` is an expert's."""

    tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int = 2


CONFIGS = {"A": Sizes(2048, 256, 1024, 8), "B": Sizes(4096, 256, 512, 16), "C": Sizes(2048, 768, 768, 64)}
TARGETS = {"fp32": {"A": 1.05, "B": 1.06, "C": 1.25}, "bf16": {"A": 1.10, "B": 1.18, "C": 1.65}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Layer = Callable[[Tensor], Any]
"""Gives its output, or that with a report, whose loss is part of the work."""


def dense(sizes: Sizes) -> Layer:
    """One dense SwiGLU whose d_ff is that of a token's experts together: the floor."""
    return FeedForward(d_model=sizes.d_model, d_ff=sizes.top_k * sizes.d_ff)


def ours(sizes: Sizes, capacity_factor: float | None = None) -> Layer:
    """Our layer with its losses, switched on and apart: experts that differ, tokens that spread."""
    layer = MoE(
        FeedForward(d_model=sizes.d_model, d_ff=sizes.d_ff),
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        capacity_factor=capacity_factor,
    )
    layer.enable(True)

    return lambda x: layer(x.unsqueeze(0), telling=False)  # as in updates without a row


def of_transformers(sizes: Sizes, implementation: str) -> Layer:
    """Mixtral's block."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_ff,
        num_local_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
    )
    config._experts_implementation = implementation
    layer = MixtralSparseMoeBlock(config)
    _initialise(layer)
    return lambda x: layer(x.unsqueeze(0))


def of_torchtitan(sizes: Sizes) -> Layer:
    """Its MoE with a softmax router; its experts compute in bf16 whatever is asked."""
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    experts, k = sizes.num_experts, sizes.top_k
    layer = MoE.Config(
        num_experts=experts,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=sizes.d_model, hidden_dim=sizes.d_ff, num_experts=experts),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=experts, top_k=k),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=experts,
            gate=Linear.Config(in_features=sizes.d_model, out_features=experts, bias=False),
            top_k=k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    ).build()
    _initialise(layer)
    return lambda x: layer(x.unsqueeze(0))


@torch.no_grad()
def _initialise(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)


def contenders(dtype: str) -> Iterator[tuple[str, Callable[[Sizes], Layer]]]:
    """Yield those that can take part."""
    yield "ours, dropless", ours
    yield "ours, capacity 1.25", functools.partial(ours, capacity_factor=1.25)
    if importlib.util.find_spec("transformers"):
        from transformers import __version__

        for implementation in ("grouped_mm", "eager"):
            name = f"transformers {__version__} {implementation}"
            yield name, functools.partial(of_transformers, implementation=implementation)
    if dtype == "bf16" and importlib.util.find_spec("torchtitan"):
        yield "torchtitan", of_torchtitan


def seconds(layer: Layer, x: Tensor, dtype: torch.dtype) -> float:
    """Return how long forward and backward take."""
    under = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
    began = time.perf_counter()
    with under:
        made = layer(x)
    out, report = made if isinstance(made, tuple) else (made, None)
    loss = out.float().square().mean()
    (loss if report is None else loss + report.loss).backward()
    took = time.perf_counter() - began
    x.grad = None
    for parameter in _parameters(layer):
        parameter.grad = None
    return took


def _parameters(layer: Any) -> list[nn.Parameter]:
    if isinstance(layer, nn.Module):
        return list(layer.parameters())
    return [p for cell in layer.__closure__ for p in _parameters(cell.cell_contents)]


def ratios(sizes: Sizes, dtype: str, rounds: int) -> dict[str, list[float]]:
    """Return for each contender its time over the dense layer's, in each round; the dense layer itself in milliseconds."""
    torch.manual_seed(0)
    x = torch.randn(sizes.tokens, sizes.d_model, requires_grad=True)
    floor = dense(sizes)
    layers = {name: make(sizes) for name, make in contenders(dtype)}
    for layer in (floor, *layers.values()):
        seconds(layer, x, DTYPES[dtype])
    found: dict[str, list[float]] = {"dense": [], **{name: [] for name in layers}}
    for _ in range(rounds):
        base = seconds(floor, x, DTYPES[dtype])
        found["dense"].append(1000 * base)
        for name, layer in layers.items():
            if "eager" in name and len(found[name]) >= 2:
                continue  # slow, and a bystander
            found[name].append(seconds(layer, x, DTYPES[dtype]) / base)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--onednn", action="store_true", help="float32 products of all by oneDNN, as in training on AMD"
    )
    parser.add_argument("--no-memory-settings", action="store_true", help="leave malloc as the system has it")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    kept = not asked.no_memory_settings and keep_freed_memory()
    console = Console()
    console.print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {asked.threads} thread(s), freed memory "
        f"{'kept' if kept else 'given back'}"
    )
    table = Table("", *(f"{config} {dtype}" for dtype in asked.dtypes for config in asked.configs))
    rows: dict[str, dict[str, str]] = {}
    for dtype in asked.dtypes:
        for config in asked.configs:
            column = f"{config} {dtype}"
            with onednn_products() if asked.onednn else contextlib.nullcontext():
                found = ratios(CONFIGS[config], dtype, asked.rounds)
            for name, values in found.items():
                unit = " ms" if name == "dense" else ""
                rows.setdefault(name, {})[column] = f"{statistics.median(values):.{1 if unit else 2}f}{unit}"
            rows.setdefault("target", {})[column] = f"{TARGETS[dtype][config]:.2f}"
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(str(column.header), "") for column in table.columns[1:]))
    console.print(table)


if __name__ == "__main__":
    main()
