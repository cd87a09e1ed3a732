"""Model FLOPs utilisation: the share of the GPUs' peak that the model's own arithmetic reaches (PaLM, arXiv:2204.02311)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from apt_launch.config.gpus import GPUS, kind_of
from apt_launch.config.run_config import RunConfig
from apt_launch.config.schema import GPTConfig
from apt_launch.config.sizes import Phase, sizes
from apt_launch.record import Row
from apt_launch.rows import enabled, phase_of

if TYPE_CHECKING:
    from apt_model.training.trainer import Trainer

Log = Callable[[Row], None]


def with_utilisation(log: Log, config: RunConfig, trainer: Trainer) -> Log:
    """Return ``log``, whose rows of training get ``mfu`` where the peak of the device is known: of bf16 and fp16 on a GPU."""
    import torch

    if (
        trainer.device.type != "cuda"
        or trainer.autocast_dtype == torch.float32
        or not isinstance(config.model, GPTConfig)
    ):
        return log
    kind = kind_of(torch.cuda.get_device_name(trainer.device))
    if kind is None:
        return log
    return logging_utilisation(
        log, sizes(config, on_gpu=True), peak=GPUS[kind].bf16_tflops * 1e12 * trainer.ranks.world
    )


def logging_utilisation(log: Log, phases: Sequence[Phase], *, peak: float) -> Log:
    """Return ``log``, whose rows get ``mfu``; the first row of a phase is also of updates before it, and gets none.

    Args:
        phases: what :func:`sizes` gave.
        peak: FLOP/s of all devices.
    """
    before = ""

    def log_with_utilisation(row: Row) -> None:
        nonlocal before
        if "tokens_per_second" in row:
            phase = _phase(phases, row)
            if phase is not None and phase_of(row) == before:
                row["mfu"] = row["tokens_per_second"] * phase.training_flops / peak
            before = phase_of(row)
        log(row)

    return log_with_utilisation


def _phase(phases: Sequence[Phase], row: Row) -> Phase | None:
    """Return the last of ``phases`` that had begun and in which the row's modules are enabled; a latch may move its begin."""
    alike = [phase for phase in phases if set(phase.modules) == set(enabled(row))]
    begun = [phase for phase in alike if phase.step <= row["step"]]
    return next(reversed(begun or alike), None)
