"""What checkpoints cost at the default interval: one an epoch, written in the background while training goes on.

Epochs of the default run, with every module on, are trained in turn without a checkpoint, with one in the background, and with
one that training waits for. Run: ``python -m tests.bench.bench_checkpoint [ROUNDS]``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from apt_launch.config.load import composed
from apt_launch.runs.build import build_trainer
from apt_model.training.checkpoint import Checkpoints
from apt_model.training.trainer import Trainer

KINDS = ("none", "in the background", "waited for")
ON = ("schedule.enable_moe_at_epoch=0", "schedule.enable_align_at_epoch=0", "schedule.enable_voter_at_epoch=0")


def epoch(trainer: Trainer, checkpoints: Checkpoints, kind: str, number: int) -> tuple[float, float]:
    """Train an epoch after a checkpoint of ``kind``; return the seconds of all, and those that ``save`` took."""
    began = time.perf_counter()
    if kind != "none":
        checkpoints.save(trainer.state_dict(), step=number, wait=kind == "waited for")
    saved = time.perf_counter() - began
    trainer.batches_done = 0
    for batches in trainer._updates(0):
        trainer.begin_update()
        trainer.step(batches)
        trainer.end_update()
    took = time.perf_counter() - began
    checkpoints.wait()
    return took, saved


def main(rounds: int) -> None:
    """Print the table."""
    config = composed([*ON, "trainer.max_epochs=1000", "trainer.checkpoint_every_minutes=null"])
    trainer = build_trainer(config, log=lambda row: None)
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        epoch(trainer, checkpoints, "waited for", 0)  # warm-up
        for number in range(1, rounds + 1):
            for kind in KINDS:
                times[kind].append(epoch(trainer, checkpoints, kind, number))
        size = sum(path.stat().st_size for path in checkpoints.all()[-1].iterdir()) / 1e6
    print(f"{sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M parameters, {size:.0f} MB a checkpoint")
    base = statistics.median(took for took, _ in times["none"])
    for kind in KINDS:
        took = statistics.median(took for took, _ in times[kind])
        saved = statistics.median(saved for _, saved in times[kind])
        ratios = [took / none - 1 for (took, _), (none, _) in zip(times[kind], times["none"], strict=True)]
        print(
            f"{kind:18} {took:7.2f} s an epoch, save() {saved:6.3f} s = {saved / base:6.2%}, "
            f"all told {statistics.median(ratios):+.2%} (rounds: {', '.join(f'{ratio:+.1%}' for ratio in ratios)})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
