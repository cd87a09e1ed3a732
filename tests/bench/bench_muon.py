"""Muon against AdamW at equal tokens: validation losses of the default text, both tuned over the same learning rates.

    python -m tests.bench.bench_muon [--device cuda] [--out muon.json] [KEY=VALUE ...]

A report, no test. Each optimizer is tuned on a seed of its own, then run with three others at its best learning rate; all
runs are those of the default profile with ``schedule=experts``, 16 halves of the dense layer and two a token, unless
overrides say otherwise, one after the other in one process. 14 runs of 1.05 million tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from apt_launch.config.load import composed
from apt_launch.runs.build import build_trainer

OPTIMIZERS = ("adamw", "muon")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
TUNED_ON = 3
SEEDS = (0, 1, 2)
SETTING = ("schedule=experts", "moe.num_experts=16", "moe.granularity=2", "moe.top_k=2", "data.seed=0", "logger=none")


def losses(optimizer: str, rate: float, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train once; return validation losses with their tokens, and milliseconds an update."""
    rows: list[dict[str, float]] = []
    given = [f"optimizer={optimizer}", f"optimizer.lr={rate}", f"seed={seed}"]
    trainer = build_trainer(composed([*SETTING, *given, *overrides]), log=rows.append)
    began = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - began
    curve = [(row["tokens"], row["val/loss"]) for row in rows if "val/loss" in row]
    return {
        **{"optimizer": optimizer, "lr": rate, "seed": seed, "curve": curve, "loss": curve[-1][1]},
        **{"seconds": seconds, "milliseconds": 1000 * seconds / trainer.clock.step},
    }


def reached(curve: list[tuple[float, float]], loss: float) -> float | None:
    """Return after how many tokens a curve is at or below ``loss``, linear between its points; None: never."""
    before: tuple[float, float] | None = None
    for tokens, value in curve:
        if value <= loss:
            if before is None:
                return tokens
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    return None


def half_interval(values: list[float]) -> float:
    """Return half of the 95 % interval of the mean, Student's t."""
    if len(values) < 2:
        return math.nan
    wide: float = student.ppf(0.975, len(values) - 1)
    return wide * statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    """Measure, and print three tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="all curves, as JSON")
    asked, overrides = parser.parse_known_args()
    overrides = [f"trainer.device={asked.device}", *overrides]
    console, began = Console(), time.perf_counter()
    where = torch.cuda.get_device_name() if asked.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    console.print(f"torch {torch.__version__}, {where}; {' '.join([*SETTING, *overrides])}", highlight=False)
    runs: list[dict[str, Any]] = []

    def run(optimizer: str, rate: float, seed: int) -> dict[str, Any]:
        runs.append(losses(optimizer, rate, seed, overrides))
        last, spent = runs[-1], time.perf_counter() - began
        said = (
            f"{optimizer} lr {rate:g} seed {seed}: {last['loss']:.4f} in {last['seconds']:.1f} s ({spent:.0f} s in all)"
        )
        console.print(said, highlight=False)
        if asked.out is not None:
            asked.out.write_text(json.dumps(runs), encoding="utf-8")
        return last

    best: dict[str, float] = {}
    tuned = Table(title=f"val/loss by learning rate, seed {TUNED_ON}", title_justify="left")
    tuned.add_column("optimizer")
    for rate in RATES:
        tuned.add_column(f"{rate:g}", justify="right")
    for optimizer in OPTIMIZERS:
        found = {rate: run(optimizer, rate, TUNED_ON)["loss"] for rate in RATES}
        best[optimizer] = min(RATES, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)
        edge = " (at the edge)" if best[optimizer] in (RATES[0], RATES[-1]) else ""
        tuned.add_row(f"{optimizer}{edge}", *(f"{found[rate]:.4f}" for rate in RATES))
    ends: dict[str, list[dict[str, Any]]] = {}
    for optimizer in OPTIMIZERS:
        ends[optimizer] = [run(optimizer, best[optimizer], seed) for seed in SEEDS]
    console.print(tuned)
    table = Table(title="val/loss at equal tokens", title_justify="left")
    for name in ("optimizer", "lr", *(f"seed {seed}" for seed in SEEDS), "mean", "ms an update"):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for optimizer, found_runs in ends.items():
        values = [one["loss"] for one in found_runs]
        mean = f"{statistics.mean(values):.4f} ± {half_interval(values):.4f}"
        speed = statistics.median(one["milliseconds"] for one in found_runs)
        table.add_row(optimizer, f"{best[optimizer]:g}", *(f"{value:.4f}" for value in values), mean, f"{speed:.1f}")
    apart = [muon["loss"] - adamw["loss"] for adamw, muon in zip(ends["adamw"], ends["muon"], strict=True)]
    mean = f"{statistics.mean(apart):+.4f} ± {half_interval(apart):.4f}"
    table.add_row("muon - adamw", "", *(f"{one:+.4f}" for one in apart), mean, "")
    shares = []
    for adamw, muon in zip(ends["adamw"], ends["muon"], strict=True):
        tokens = reached(muon["curve"], adamw["loss"])
        shares.append("never" if tokens is None else f"{tokens / adamw['curve'][-1][0]:.0%}")
    table.add_row("muon is there after", "", *shares, "", "")
    console.print(table)
    console.print(
        "± is half of the 95 % interval (Student's t). The last row: of the tokens that AdamW's final loss took it."
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
