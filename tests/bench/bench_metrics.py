"""What metrics of routing cost: the parts of an update that are there for them, beside the update itself.

    python -m tests.bench.bench_metrics [--rounds 30] [overrides]

A report, no test: everything takes turns, on one model and one batch. An update is a forward pass, a backward pass and the
optimizer's step, in the precision of training. Whole updates that tell and that do not stand side by side, too; their
difference is smaller than what neighbours on the machine make of it, so the verdict is by the parts. Overrides are those of
the command: ``model.d_model=256 moe.num_experts=64``, ``trainer.device=cuda``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from apt_launch.config.instantiate import build_model
from apt_launch.config.load import composed
from apt_launch.record import Record
from apt_model.layers.router import plan_dispatch
from apt_model.layers.tally import layer_metrics, model_metrics, routing_metrics, tally
from apt_model.training.device import choose_device, choose_dtype
from tests.bench.device import seconds

TARGET = 0.02
"""Share of a run's updates that its metrics may cost."""


def main() -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    arguments, overrides = parser.parse_known_args()
    config = composed(overrides)
    device = choose_device(config.trainer.device)
    dtype = choose_dtype(config.trainer.precision, device)
    torch.manual_seed(0)
    model = build_model(config.values).to(device)
    model.enable_moe(True)
    with torch.no_grad():  # as after some training: experts differ, the router has preferences
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = torch.randint(0, 256, (config.trainer.batch_size, config.model.seq_len + 1), device=device)

    def update(telling: bool) -> dict[str, float]:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            output = model(batch[:, :-1], batch[:, 1:], with_metrics=telling)
        (output.language_loss + output.auxiliary_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        return routing_metrics(output.routing, model.expert_cosines()) if telling else {}

    row = update(True)
    sums = model(batch[:, :-1]).routing
    layers, rows = model.moe_layers, torch.randn(batch[:, 1:].numel(), config.model.d_model, device=device)
    routings = [layer.router(rows, layer.temperature) for layer in layers if layer.router is not None]
    dispatches = [plan_dispatch(routing, config.moe.num_experts) for routing in routings]
    one = torch.ones((), device=device)

    def of_routers() -> list[torch.Tensor]:
        return [
            tally(routing, dispatch, num_sequences=len(batch), balance=one, z=one)
            for routing, dispatch in zip(routings, dispatches, strict=True)
        ]

    record = Record(Path(tempfile.mkdtemp()) / "metrics.jsonl")
    parts: dict[str, Callable[[], object]] = {
        "an update that tells nothing": lambda: update(False),
        "an update that tells": lambda: update(True),
        "sums of routers": of_routers,
        "metrics of a batch": lambda: model_metrics(layer_metrics(sums)),
        "numbers of a row": lambda: routing_metrics(sums),
        "cosines of experts, in full rows": model.expert_cosines,
        f"a full row of {len(row)} metrics on disk": lambda: record.log({"step": 0} | row),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(arguments.rounds):
        for name, work in parts.items():
            times[name].append(1e3 * seconds(work, device))
    medians = {name: statistics.median(found) for name, found in times.items()}
    silent, _, *added = medians.values()
    print(f"{config.trainer.batch_size} sequences, {len(layers)} layers, {config.moe.num_experts} experts, {device}")
    for name, median in medians.items():
        print(
            f"{name:40} median {median:9.3f} ms, {median / silent:7.2%} of an update; fastest {min(times[name]):9.3f} ms"
        )
    every = config.trainer.log_every
    telling, full = sum(added[:3]) / silent, sum(added) / silent
    most = telling + (full - telling) / every
    print(f"an update costs {telling:.2%} more where an anneal moved a value, {full:.2%} where its row is full")
    print(f"a run with trainer.log_every={every}: {full / every:.2%}, and {most:.2%} if a value moves at every update")
    print(f"target {TARGET:.0%}: {'met' if most <= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
