"""What a scheduled value costs: microseconds until it is where training reads it, ours beside others', in one run.

    python tests/bench/bench_schedule.py [--rounds 15] [--updates 2000]

A report, no test: times depend on the machine, so only numbers of one run compare, and all contenders take turns within
each round. Each row is the median over the rounds. Ours write 0-dim torch buffers, which compiled models read without
recompiling; the others write a Python attribute or an optimizer's parameter group. PyTorch-Ignite takes part where it
can be imported, for instance from a folder of its own, which leaves the environment as it is:

    pip install --no-deps --target /tmp/contenders pytorch-ignite
    PYTHONPATH=/tmp/contenders python tests/bench/bench_schedule.py
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from apt_model.schedule import Clock, Horizon, ScheduleRunner

TARGET_MICROSECONDS = 2.0
"""What one value delivered by us should cost at most."""

ANNEALS: dict[str, tuple[str, dict[str, Any]]] = {
    "route_temp": ("router.temperature", {"start": 1.5, "end": 0.8, "by": "step"}),
    "moe_capacity": ("moe.capacity_factor", {"start": 1.5, "end": 1.1, "by": "step"}),
    "align_weight": ("align.weight", {"start": 0.01, "end": 0.3, "by": "step"}),
    "vote_threshold": ("voter.threshold", {"start": 3.0, "end": 2.0, "by": "step"}),
}


@dataclass
class Contender:
    """One way to schedule: ``prepare(updates)`` gives a function that delivers ``values`` at each of so many updates."""

    name: str
    values: int
    writes: str
    prepare: Callable[[int], Callable[[], None]]


def ours(count: int) -> Contender:
    """Return our runner with ``count`` linear anneals by step."""

    def prepare(updates: int) -> Callable[[], None]:
        chosen = dict(list(ANNEALS.items())[:count])
        horizon = Horizon(epochs=1, updates_per_epoch=updates)
        curriculum: dict[str, Any] = {name: spec for name, (_, spec) in chosen.items()}
        runner = ScheduleRunner(horizon=horizon, **curriculum)
        buffers = {target: torch.zeros(()) for target, _ in chosen.values()}
        runner.bind(values={target: _filler(buffer) for target, buffer in buffers.items()}, switches={})
        clocks = [Clock(step=step) for step in range(updates)]

        def deliver() -> None:
            for clock in clocks:
                runner.apply(clock)
            for target, spec in chosen.values():
                assert buffers[target].item() == torch.tensor(spec["end"]).item()

        return deliver

    return Contender(f"apt_model.schedule, {count} anneal{'s' if count > 1 else ''}", count, "0-dim buffer", prepare)


def _filler(buffer: torch.Tensor) -> Callable[[float], None]:
    def fill(value: float) -> None:
        buffer.fill_(value)

    return fill


def floor() -> Contender:
    """Return the least that can be done: the formula in a loop, and the write."""

    def prepare(updates: int) -> Callable[[], None]:
        buffer = torch.zeros(())

        def deliver() -> None:
            last = updates - 1
            for step in range(updates):
                buffer.fill_(1.5 + (0.8 - 1.5) * (step / last))

        return deliver

    return Contender("formula in a loop", 1, "0-dim buffer", prepare)


def torch_lr(name: str) -> Contender:
    """Return a learning-rate scheduler of torch."""

    def prepare(updates: int) -> Callable[[], None]:
        optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=1.5)
        optimizer.step()
        scheduler: Any
        if name == "LambdaLR":
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - 0.4 * step / updates)
        else:
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.6, total_iters=updates)

        def deliver() -> None:
            for _ in range(updates):
                scheduler.step()

        return deliver

    return Contender(f"torch {name}", 1, "parameter group", prepare)


def ignite() -> list[Contender]:
    """Return the contenders of PyTorch-Ignite.

    Raises:
        ImportError: it is not there.
    """
    from ignite.engine import Engine
    from ignite.handlers.param_scheduler import LinearCyclicalScheduler
    from ignite.handlers.state_param_scheduler import LambdaStateScheduler, PiecewiseLinearStateScheduler

    def on_state(make: Callable[[int], Any], buffer: torch.Tensor | None = None) -> Callable[[int], Callable[[], None]]:
        def prepare(updates: int) -> Callable[[], None]:
            engine = Engine(lambda engine, batch: None)
            scheduler = make(updates)
            scheduler.attach(engine)

            def deliver() -> None:
                for _ in range(updates):
                    scheduler(engine)
                    if buffer is not None:
                        buffer.fill_(engine.state.temperature)

            return deliver

        return prepare

    def on_optimizer(updates: int) -> Callable[[], None]:
        optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=1.5)
        scheduler = LinearCyclicalScheduler(optimizer, "lr", start_value=1.5, end_value=0.8, cycle_size=2 * updates)

        def deliver() -> None:
            for _ in range(updates):
                scheduler(None)

        return deliver

    def by_lambda(updates: int) -> Any:
        return LambdaStateScheduler(lambda step: 1.5 - 0.7 * step / updates, "temperature", create_new=True)

    def piecewise(updates: int) -> Any:
        return PiecewiseLinearStateScheduler([(0, 1.5), (updates, 0.8)], "temperature", create_new=True)

    return [
        Contender("Ignite LambdaStateScheduler", 1, "attribute", on_state(by_lambda)),
        Contender("Ignite PiecewiseLinearStateScheduler", 1, "attribute", on_state(piecewise)),
        Contender("the same, then fill_", 1, "0-dim buffer", on_state(piecewise, torch.zeros(()))),
        Contender("Ignite LinearCyclicalScheduler", 1, "parameter group", on_optimizer),
    ]


def contenders() -> tuple[list[Contender], list[str]]:
    """Return who takes part, and a line for each who cannot."""
    found = [ours(1), ours(4), floor(), torch_lr("LambdaLR"), torch_lr("LinearLR")]
    missing = [
        "mosaicml (Composer): not installed. It asks for torch below 2.7.1 and a torchvision built for that torch, so it cannot "
        "take part in one run with ours."
    ]
    try:
        found += ignite()
    except ImportError as error:
        missing.append(
            f"pytorch-ignite: not installed ({error}). To compare with it: pip install --no-deps --target DIR pytorch-ignite, "
            "then PYTHONPATH=DIR"
        )
    return found, missing


def measure(taking_part: list[Contender], *, rounds: int, updates: int) -> dict[str, list[float]]:
    """Return for each contender its microseconds a value, one number a round; contenders take turns."""
    times: dict[str, list[float]] = {contender.name: [] for contender in taking_part}
    for number in range(rounds + 1):
        shift = number % len(taking_part)
        for contender in taking_part[shift:] + taking_part[:shift]:
            deliver = contender.prepare(updates)
            gc.collect()
            gc.disable()
            began = time.perf_counter_ns()
            deliver()
            took = time.perf_counter_ns() - began
            gc.enable()
            if number:  # the first round warms up
                times[contender.name].append(took / 1e3 / updates / contender.values)
    return times


def main() -> None:
    """Measure, and print the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=2000, help="in each round")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    taking_part, missing = contenders()
    times = measure(taking_part, rounds=arguments.rounds, updates=arguments.updates)

    console = Console(width=120)
    ours_first = statistics.median(times[taking_part[0].name])
    drawn = Table(title=f"microseconds a delivered value, median of {arguments.rounds} rounds", title_justify="left")
    for column in ("", "writes", "median", "fastest", "slowest", "over ours"):
        drawn.add_column(column, justify="left" if column in ("", "writes") else "right")
    for contender in taking_part:
        row = times[contender.name]
        median = statistics.median(row)
        numbers = [f"{number:.2f}" for number in (median, min(row), max(row), median / ours_first)]
        drawn.add_row(contender.name, contender.writes, *numbers)
    console.print(drawn)
    for line in missing:
        console.print(line, highlight=False)
    for contender in taking_part[:2]:
        median = statistics.median(times[contender.name])
        verdict = "met" if median <= TARGET_MICROSECONDS else "missed"
        console.print(f"target {TARGET_MICROSECONDS:g}: {verdict} by {contender.name} ({median:.2f})", highlight=False)
    console.print(f"python {' '.join(sys.argv)}", highlight=False)
    console.print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}", highlight=False
    )


if __name__ == "__main__":
    main()
