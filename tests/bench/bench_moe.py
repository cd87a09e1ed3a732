"""What a mixture of experts costs over a dense layer of equal active FLOPs: ours and others', side by side in one run.

    python -m tests.bench.bench_moe [--rounds 15] [--configs A B C] [--dtypes fp32 bf16] [--threads 1] [--onednn]
    python -m tests.bench.bench_moe --device cuda [--rounds 15] [--configs D E F] [--dtypes bf16]

A report, no test: times depend on the machine, so only ratios of one run mean something. All contenders take turns within
each round, forward and backward; a ratio is the median over rounds of its time over that of the dense layer in the same
round. bf16 is autocast over float32 weights, as training has it. On a GPU, whose sizes are larger, peaks of memory are told,
too, and some contenders have weights and input in bf16 to begin with ("all bf16"): transformers' grouped_mm computes in the
dtype of its weights, whatever autocast says. transformers takes part where it is installed, torchtitan where it can be
imported, for instance from a folder of its own (triton comes with torch for GPUs: leave it out there):

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
from tests.bench.device import peak_bytes, seconds


class Sizes(NamedTuple):
    """Of a layer; ``d_ff`` is an expert's."""

    tokens: int
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int = 2


CONFIGS = {
    "A": Sizes(2048, 256, 1024, 8),
    "B": Sizes(4096, 256, 512, 16),
    "C": Sizes(2048, 768, 768, 64),
    "D": Sizes(16384, 1024, 3584, 8),  # a quarter of Mixtral-8x7B
    "E": Sizes(16384, 2048, 768, 128, 8),  # Qwen3-30B-A3B
    "F": Sizes(32768, 768, 3072, 64),  # profile=gpt5_moe_reasoning
}
DEFAULTS = {"cpu": (["A", "B", "C"], ["fp32", "bf16"]), "cuda": (["D", "E", "F"], ["bf16"])}
TARGETS = {"fp32": {"A": 1.05, "B": 1.06, "C": 1.25}, "bf16": {"A": 1.10, "B": 1.18, "C": 1.65}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Layer = Callable[[Tensor], Any]
"""Gives its output, or that with a report, whose loss is part of the work."""

Rows = dict[str, dict[str, str]]
"""Of a table: cells by name and column."""


def dense(sizes: Sizes) -> Layer:
    """One dense SwiGLU whose d_ff is that of a token's experts together: the floor."""
    return FeedForward(d_model=sizes.d_model, d_ff=sizes.top_k * sizes.d_ff)


def ours(sizes: Sizes, capacity_factor: float | None = None, compiled: bool = False) -> Layer:
    """Our layer with its losses, switched on and apart: experts that differ, tokens that spread."""
    layer = MoE(
        FeedForward(d_model=sizes.d_model, d_ff=sizes.d_ff),
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        capacity_factor=capacity_factor,
    )
    layer.enable(True)
    called = torch.compile(layer, dynamic=False) if compiled else layer
    return lambda x: called(x.unsqueeze(0), with_metrics=False)  # as in updates without a row


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


def all_bf16(sizes: Sizes, make: Callable[[Sizes], Layer]) -> Layer:
    """Have weights and input in bf16, so that nobody casts them."""
    layer = make(sizes)
    for parameter in _parameters(layer):
        parameter.data = parameter.data.bfloat16()
    return lambda x: layer(x.bfloat16())


@torch.no_grad()
def _initialise(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)


def contenders(dtype: str, device: str) -> Iterator[tuple[str, Callable[[Sizes], Layer]]]:
    """Yield those that can take part."""
    bf16_on_gpu = device == "cuda" and dtype == "bf16"
    yield "ours, dropless", ours
    yield "ours, capacity 1.25", functools.partial(ours, capacity_factor=1.25)
    if bf16_on_gpu:
        yield "ours, dropless, compiled", functools.partial(ours, compiled=True)
        yield "ours, dropless, all bf16", functools.partial(all_bf16, make=ours)
    if importlib.util.find_spec("transformers"):
        from transformers import __version__

        grouped = functools.partial(of_transformers, implementation="grouped_mm")
        if bf16_on_gpu:
            yield f"transformers {__version__} grouped_mm, all bf16", functools.partial(all_bf16, make=grouped)
        else:
            yield f"transformers {__version__} grouped_mm", grouped
        if device == "cpu":
            yield f"transformers {__version__} eager", functools.partial(of_transformers, implementation="eager")
    if dtype == "bf16" and importlib.util.find_spec("torchtitan"):
        yield "torchtitan", of_torchtitan


def step(layer: Layer, x: Tensor, dtype: torch.dtype) -> None:
    """Go forward and backward."""
    under = torch.autocast(x.device.type, dtype=dtype) if dtype != torch.float32 else contextlib.nullcontext()
    with under:
        made = layer(x)
    out, report = made if isinstance(made, tuple) else (made, None)
    loss = out.float().square().mean()
    (loss if report is None else loss + report.loss).backward()


def _parameters(layer: Any) -> list[nn.Parameter]:
    if isinstance(layer, nn.Module):
        return list(layer.parameters())
    return [p for cell in layer.__closure__ for p in _parameters(cell.cell_contents)]


class Found(NamedTuple):
    """Of one contender."""

    ratios: list[float]  # of its time to the dense layer's, in each round; of the dense layer itself: milliseconds
    peak_gb: float  # of a GPU's memory, without weights and input


def measured(sizes: Sizes, dtype: str, rounds: int, device: torch.device) -> dict[str, Found]:
    """Return what was found of each contender."""
    torch.manual_seed(0)
    with device:
        x = torch.randn(sizes.tokens, sizes.d_model, requires_grad=True)
        layers = {"dense": dense(sizes), **{name: make(sizes) for name, make in contenders(dtype, device.type)}}

    def timed(layer: Layer) -> float:
        took = seconds(lambda: step(layer, x, DTYPES[dtype]), device)
        _forget(layer, x)
        return took

    found = {name: Found([], _peak_gb(layer, x, timed)) for name, layer in layers.items()}
    for _ in range(rounds):
        base = timed(layers["dense"])
        found["dense"].ratios.append(1000 * base)
        for name, layer in list(layers.items())[1:]:
            if "eager" in name and len(found[name].ratios) >= 2:
                continue  # slow, and a bystander
            found[name].ratios.append(timed(layer) / base)
    return found


def _peak_gb(layer: Layer, x: Tensor, timed: Callable[[Layer], float]) -> float:
    """Warm up, which compiles kernels and takes workspaces, and return the peak of the step after."""
    timed(layer)
    if x.device.type != "cuda":
        return 0.0
    timed(layer)
    before = torch.cuda.memory_allocated()
    return (peak_bytes(lambda: timed(layer)) - before) / 1e9


def _forget(layer: Layer, x: Tensor) -> None:
    for tensor in (x, *_parameters(layer)):
        tensor.grad = None


def drawn(rows: Rows, columns: list[str], title: str | None = None) -> Table:
    """Return a table of ``rows``."""
    table = Table("", *columns, title=title)
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(column, "") for column in columns))
    return table


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(DEFAULTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), help="A B C; D E F on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="both; bf16 on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--onednn", action="store_true", help="float32 products of all by oneDNN, as in training on AMD"
    )
    parser.add_argument("--no-memory-settings", action="store_true", help="leave malloc as the system has it")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    kept = not asked.no_memory_settings and keep_freed_memory()
    console = Console()
    on_gpu = asked.device == "cuda"
    where = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.processor() or platform.machine()}, {asked.threads} thread(s), freed memory "
        f"{'kept' if kept else 'given back'}"
    )
    console.print(f"torch {torch.__version__}, {where}")
    configs, dtypes = DEFAULTS[asked.device]
    configs, dtypes = asked.configs or configs, asked.dtypes or dtypes
    columns = [f"{config} {dtype}" for dtype in dtypes for config in configs]
    times: Rows = {}
    peaks: Rows = {}
    for dtype in dtypes:
        for config in configs:
            column = f"{config} {dtype}"
            with onednn_products() if asked.onednn else contextlib.nullcontext():
                found = measured(CONFIGS[config], dtype, asked.rounds, torch.device(asked.device))
            for name, (values, peak_gb) in found.items():
                unit = " ms" if name == "dense" else ""
                times.setdefault(name, {})[column] = f"{statistics.median(values):.{1 if unit else 2}f}{unit}"
                peaks.setdefault(name, {})[column] = f"{peak_gb:.2f} GB"
            if not on_gpu and config in TARGETS[dtype]:
                times.setdefault("target", {})[column] = f"{TARGETS[dtype][config]:.2f}"
    console.print(drawn(times, columns))
    if on_gpu:
        console.print(drawn(peaks, columns, title="most memory in a step, without weights and input"))


if __name__ == "__main__":
    main()
