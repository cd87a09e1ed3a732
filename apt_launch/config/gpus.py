"""What a run takes on GPUs of one kind: the memory of each, whether it fits, how many hours; and the table of its sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apt_launch.config.run_config import RunConfig
from apt_launch.config.sizes import FP32, Phase, sizes
from apt_model.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_MFU: Final = 0.4
"""Share of the peak that training reaches; 0.3 to 0.5 is usual for dense models, less for experts over slow links."""

USABLE: Final = 0.9
"""Share of a GPU's memory to plan with; CUDA's context, communication buffers and fragmentation take the rest."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: dense (not sparse) bf16 peak in TFLOP/s with float32 accumulation, memory in GB of 10^9 bytes."""

    bf16_tflops: float
    memory_gb: float
    source: str

    @property
    def usable_bytes(self) -> float:
        """What a run can plan with."""
        return USABLE * self.memory_gb * 1e9


GPUS: Final[dict[str, Gpu]] = {
    "a100": Gpu(312.0, 80, "NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB"),
    "h100": Gpu(989.5, 80, "NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 with sparsity"),
    "h200": Gpu(989.5, 141, "NVIDIA H200 Tensor Core GPU data sheet, SXM: 1,979 with sparsity"),
    "b200": Gpu(2250.0, 180, "NVIDIA Blackwell HGX B200 data sheet: 4,500 with sparsity"),
    "l40s": Gpu(362.05, 48, "NVIDIA L40S data sheet: 733 with sparsity"),
    "rtx4090": Gpu(165.2, 24, "NVIDIA Ada GPU architecture white paper, RTX 4090: 330.3 with sparsity"),
}
"""Kinds that :func:`cost` knows."""

_CALLED: Final = {
    r"A100\b.*": "a100",  # all of one peak
    r"H100( 80GB HBM3)?": "h100",  # not PCIe and NVL, which are slower
    r"H200": "h200",
    r"B200": "b200",
    r"L40S": "l40s",
    r"RTX 4090": "rtx4090",
}
"""How torch names kinds, without the maker's name."""


def kind_of(name: str) -> str | None:
    """Return the kind in :data:`GPUS` of a device that torch calls ``name``; None: its peak is not known."""
    short = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return next((kind for pattern, kind in _CALLED.items() if re.fullmatch(pattern, short)), None)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A run on ``num_gpus`` GPUs of one kind, which share the model as ``trainer.parallel`` says."""

    kind: str
    spec: Gpu
    num_gpus: int
    mfu: float
    seconds: tuple[float, ...]  # of each phase
    per_device: tuple[int, ...]  # bytes, of each phase, with a device's share of trainer.batch_size
    fixed: tuple[int, ...]  # the part of them that does not grow with the batch
    largest_batch: int  # sequences a device has room for in every phase; 0: not even one

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return sum(self.seconds) / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.hours * self.num_gpus

    @property
    def fits(self) -> bool:
        """Whether every phase leaves a tenth of the memory free."""
        return max(self.per_device) <= self.spec.usable_bytes


def cost(config: RunConfig, phases: Sequence[Phase], *, gpu: str, num_gpus: int = 1, mfu: float = DEFAULT_MFU) -> Cost:
    """Return how long the run takes on ``num_gpus`` GPUs of one kind, and whether it fits.

    The memory of a device: see :func:`device_bytes`.

    Args:
        config: that ``phases`` were counted for, with ``on_gpu=True``.
        phases: what :func:`sizes` gave.
        gpu: the kind, a name of :data:`GPUS`.
        num_gpus: how many.
        mfu: model FLOPs utilisation: the share of the peak that the model's own arithmetic reaches.

    Raises:
        ConfigError: an unknown kind, no GPU, a share outside (0, 1], or fp32, whose peak is another.
    """
    problems = _sharing_problems(config, num_gpus)
    if gpu not in GPUS:
        problems.append(f"--gpu: {gpu!r} is not a kind that is known. {nearest(gpu, GPUS)}")
    if not 0.0 < mfu <= 1.0:
        problems.append(f"--mfu: {mfu:g} is not a share of the peak. Give more than 0 and at most 1.")
    if any(phase.compute_bytes == FP32 for phase in phases):
        problems.append(
            f"trainer.precision = {config.trainer.precision}: time is reckoned from the bf16 peak, and this run computes in "
            "fp32. Set trainer.precision=bf16."
        )
    if problems:
        raise ConfigError(*problems)
    spec = GPUS[gpu]
    fixed = [device_bytes(phase, config, num_gpus) for phase in phases]
    share = sequences(config, num_gpus)
    growing = [batch_bytes(phase, config, share) for phase in phases]
    room = min(_room(config, phase, spec.usable_bytes - kept) for phase, kept in zip(phases, fixed, strict=True))
    return Cost(
        kind=gpu,
        spec=spec,
        num_gpus=num_gpus,
        mfu=mfu,
        seconds=tuple(
            phase.tokens * phase.training_flops / (num_gpus * mfu * spec.bf16_tflops * 1e12) for phase in phases
        ),
        per_device=tuple(kept + grows for kept, grows in zip(fixed, growing, strict=True)),
        fixed=tuple(fixed),
        largest_batch=max(0, math.floor(room)),
    )


def _sharing_problems(config: RunConfig, num_gpus: int) -> list[str]:
    if num_gpus < 1:
        return [f"--gpus: {num_gpus} is not a number of GPUs. Give 1 or more."]
    experts = config.trainer.expert_parallel
    if num_gpus % experts:
        return [
            f"--gpus: trainer.expert_parallel = {experts} does not divide {num_gpus}. Give a multiple of {experts}."
        ]
    return []


def sequences(config: RunConfig, num_gpus: int) -> int:
    """Return the share of ``trainer.batch_size`` that one of ``num_gpus`` devices gets."""
    return math.ceil(config.trainer.batch_size / num_gpus)


def device_bytes(phase: Phase, config: RunConfig, num_gpus: int) -> int:
    """Return the bytes of one of ``num_gpus`` devices that do not grow with the batch.

    With ``trainer.parallel=fsdp`` that is its share of weights, gradients and optimizer state, two gathered blocks (one at
    work, one on its way), one block's whole gradient and the float32 copy that is reduced; of a block's experts only those
    that ``trainer.expert_parallel`` leaves on a device are gathered. With ``ddp``, or alone, it is all of the state.
    """
    state = phase.weights + phase.gradients + phase.optimizer
    if num_gpus == 1 or config.trainer.parallel == "ddp":
        return state + phase.casts
    block = phase.largest_block - phase.experts + math.ceil(phase.experts / config.trainer.expert_parallel)
    return math.ceil(state / num_gpus) + (3 * phase.compute_bytes + FP32) * block


def _loss_chunk(config: RunConfig) -> int | None:
    chunk: int | None = getattr(config.model, "loss_chunk", None)
    return chunk


def batch_bytes(phase: Phase, config: RunConfig, share: int) -> int:
    """Return the bytes of activations and workspace for ``share`` sequences."""
    activations, recomputed, workspace = _growth(phase, config)
    at_once = min(share * config.model.seq_len, _loss_chunk(config) or math.inf)
    return math.ceil(share * activations + max(share * recomputed, at_once * workspace))


def _growth(phase: Phase, config: RunConfig) -> tuple[float, float, float]:
    """Return the bytes of activations and of what is recomputed for a sequence, and of workspace for a token."""
    at_once = min(phase.batch_size * config.model.seq_len, _loss_chunk(config) or math.inf)
    return phase.activations / phase.batch_size, phase.recomputed / phase.batch_size, phase.workspace / at_once


def _room(config: RunConfig, phase: Phase, free: float) -> float:
    """Return how many sequences' activations and workspace take ``free`` bytes; the workspace ends to grow with a chunk."""
    length, chunk = config.model.seq_len, _loss_chunk(config)
    activations, recomputed, workspace = _growth(phase, config)
    sequences = free / (activations + workspace * length)
    if chunk is not None and sequences * length > chunk:
        sequences = (free - workspace * chunk) / activations
    return min(sequences, free / (activations + recomputed))


def table(
    phases: Sequence[Phase],
    config: RunConfig,
    *,
    gpu: str | None = None,
    num_gpus: int = 1,
    mfu: float = DEFAULT_MFU,
) -> RenderableType:
    """Draw the phases, a column each; with a number of GPUs what one needs, with a kind also what :func:`cost` says of it.

    On a GPU, ``trainer.precision=auto`` means bf16: where ``phases`` were counted in fp32, they are counted anew.

    Raises:
        ConfigError: see :func:`cost`.
    """
    if gpu is None and num_gpus == 1:
        return _drawn(phases, None)
    if config.trainer.precision == "auto" and phases[0].compute_bytes == FP32:
        phases = sizes(config, on_gpu=True)
    if gpu is not None:
        estimate = cost(config, phases, gpu=gpu, num_gpus=num_gpus, mfu=mfu)
        return _drawn(phases, estimate, estimate.per_device, num_gpus, sequences(config, num_gpus))
    if problems := _sharing_problems(config, num_gpus):
        raise ConfigError(*problems)
    share = sequences(config, num_gpus)
    needs = [device_bytes(phase, config, num_gpus) + batch_bytes(phase, config, share) for phase in phases]
    return _drawn(phases, None, needs, num_gpus, share)


def _drawn(
    phases: Sequence[Phase], cost: Cost | None, per_device: Sequence[int] = (), num_gpus: int = 1, share: int = 1
) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    drawn = Table(title="sizes", title_justify="left")
    drawn.add_column("from step")
    for phase in phases:
        drawn.add_column(str(phase.step), justify="right")
    rows = {
        "modules enabled": [_modules(phase) for phase in phases],
        "updates": [f"{phase.updates:,}" for phase in phases],
        "parameters": [_count(phase.parameters) for phase in phases],
        "active a token": [_count(phase.active) for phase in phases],
        "weights": [_bytes(phase.weights) for phase in phases],
        "gradients": [_bytes(phase.gradients) for phase in phases],
        "optimizer": [_bytes(phase.optimizer) for phase in phases],
        "16-bit copies": [_bytes(phase.casts) for phase in phases],
        f"activations, {phases[0].batch_size} sequences": [_bytes(phase.activations) for phase in phases],
        "a block again": [_bytes(phase.recomputed) for phase in phases],
        "logits and gradient": [_bytes(phase.workspace) for phase in phases],
        "all on one device": [_bytes(phase.total) for phase in phases],
        "forward FLOPs a token": [_count(phase.forward_flops) for phase in phases],
        "training FLOPs a token": [_count(phase.training_flops) for phase in phases],
    }
    if any(phase.frozen for phase in phases):
        rows["frozen"] = [" ".join(phase.frozen) or "none" for phase in phases]
    if phases[0].compute_bytes == FP32:
        del rows["16-bit copies"]
    if not phases[0].recomputed:
        del rows["a block again"]
    if per_device:
        rows[f"a device of {num_gpus}, {_sequences(share)}"] = [_bytes(n) for n in per_device]
    if cost is not None:
        rows["hours"] = [f"{seconds / 3600:,.2f}" for seconds in cost.seconds]
    for name, cells in rows.items():
        drawn.add_row(name, *cells)
    if cost is None:
        return drawn
    verdict = "fits" if cost.fits else "does not fit"
    room = _sequences(cost.largest_batch) if cost.largest_batch else "not even one sequence"
    remedies = ["more GPUs"]
    if max(cost.fixed) < cost.spec.usable_bytes:
        remedies.insert(0, "a smaller trainer.batch_size with a larger trainer.accumulate")
        if not phases[0].recomputed:
            remedies.insert(0, "trainer.activation_checkpointing=true")
    return Group(
        drawn,
        f"{cost.num_gpus} x {cost.kind} at an MFU of {cost.mfu:g}: {cost.hours:,.2f} hours, {cost.gpu_hours:,.2f} GPU-hours",
        f"{_sequences(share)} a device: {verdict} in {USABLE:.0%} of {cost.spec.memory_gb:g} GB; there is room for {room}",
        *([] if cost.fits else [f"less a device: {', '.join(remedies)}"]),
        f"peak {cost.spec.bf16_tflops:g} TFLOP/s in bf16, dense ({cost.spec.source})",
    )


def _modules(phase: Phase) -> str:
    grown = "" if phase.grown_to is None else f" ({phase.grown_to} experts)"
    return " ".join(f"{name}{grown if name == 'moe' else ''}" for name in phase.modules) or "none"


def _sequences(number: int) -> str:
    return f"{number} sequence{'s' if number > 1 else ''}"


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g}"


def _bytes(number: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g} B"
