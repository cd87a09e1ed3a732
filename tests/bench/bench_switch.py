"""What happens to the loss where experts go on: the same run with and without the switch, on the same batches, in one go.

    python -m tests.bench.bench_switch [--seeds 0 1 2] [--switch 150] [--after 100] [overrides ...]

A report, no test. Each line is one seed: the validation loss right before and right after the switch with nothing between,
and the mean training loss of the updates that follow it, less that of the run that stays dense on the very same batches.
The spread of that difference from update to update is its noise.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics

from hydra.core.global_hydra import GlobalHydra
from rich.console import Console
from rich.table import Table

from apt_launch.config.load import composed
from apt_launch.runs.build import build_trainer
from apt_model.errors import Interrupted
from apt_model.schedule import Change
from apt_model.training.base import BaseTrainer, Row
from apt_model.training.callbacks import Callback
from apt_model.training.memory import keep_freed_memory

CONFIG = (
    "schedule=none",
    "model.seq_len=128",
    "trainer.batch_size=8",
    "trainer.log_every=1",
    "trainer.validation_batches=16",
    "trainer.device=cpu",
    "logger.mode=disabled",
)


class AroundSwitch(Callback):
    """Validates once experts are on, before their first update."""

    loss = float("nan")

    def on_schedule(self, trainer: BaseTrainer, changes: list[Change]) -> None:
        """Validate."""
        if any(change.name == "moe_enabled" and change.value for change in changes):
            self.loss = trainer.validate()


def train(seed: int, switch: int | None, updates: tuple[int, int], overrides: list[str]) -> tuple[list[Row], float]:
    """Return the rows of a run, and the validation loss right after its switch."""
    rows: list[Row] = []
    around = AroundSwitch()
    before, after = updates
    epochs = -(-(before + after) // before)
    at = [] if switch is None else [f"schedule.enable_moe_at_step={switch}"]
    given = [f"seed={seed}", f"trainer.max_epochs={epochs}", f"trainer.max_batches_per_epoch={before}"]
    config = composed([*CONFIG, *given, *at, *overrides])
    GlobalHydra.instance().clear()
    stop = before + after
    trainer = build_trainer(
        config, log=rows.append, callbacks=[around], stop_requested=lambda: trainer.clock.step >= stop
    )
    with contextlib.suppress(Interrupted):
        trainer.fit()
    return rows, around.loss


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--switch", type=int, default=150, help="the update before which experts go on")
    parser.add_argument("--after", type=int, default=100, help="updates to compare")
    parser.add_argument("overrides", nargs="*", help="of both runs, such as moe.num_experts=16")
    asked = parser.parse_args()
    keep_freed_memory()
    table = Table(
        "seed",
        "val/loss before",
        "after",
        "difference",
        "20 updates",
        f"{asked.after} updates",
        "noise of one",
        "later",
    )
    for seed in asked.seeds:
        updates = asked.switch, asked.after
        dense, _ = train(seed, None, updates, asked.overrides)
        experts, after = train(seed, asked.switch, updates, asked.overrides)
        loss = [{row["step"]: row["train/loss"] for row in rows if "train/loss" in row} for rows in (dense, experts)]
        more = [loss[1][step] - loss[0][step] for step in sorted(loss[0]) if step >= asked.switch]
        before = next(row["val/loss"] for row in experts if "val/loss" in row and row["step"] == asked.switch - 1)
        table.add_row(
            str(seed),
            f"{before:.4f}",
            f"{after:.4f}",
            f"{after - before:+.1e}",
            f"{statistics.mean(more[:20]):+.4f}",
            f"{statistics.mean(more):+.4f}",
            f"{statistics.stdev(more):.4f}",
            f"{statistics.mean(more[-20:]):+.4f}",
        )
    console = Console(width=120)
    console.print("training loss with experts less that without, after the switch; later: the last 20 updates")
    console.print(table)


if __name__ == "__main__":
    main()
