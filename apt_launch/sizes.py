"""What a run needs, phase by phase: parameters, memory, arithmetic, and the time it takes on a kind of GPU.

The model is built on torch's meta device, by the functions that training builds it with, so that a model of any size
is counted in seconds and in no memory.

Memory of one device, in bytes:

- weights: 4 a parameter. Weights are float32 and autocast computes in 16 bits, so no master copies come on top.
- gradients: 4 a parameter that is not frozen.
- optimizer: 8 a parameter that was ever trained: AdamW's two moments (arXiv:1711.05101), float32.
- casts: 2 an entry of each matrix that autocast multiplies with; it keeps those copies until the backward pass. None in fp32.
- activations: what autograd saves for the backward pass, for one batch (:class:`Saved` has the formula).
- workspace: the logits and their gradient, when the backward pass begins; with model.loss_chunk those of a chunk, and what is
  saved for its backward pass.

FLOPs are those of matrix products, 2 a multiply-add. The backward pass takes twice the forward pass (arXiv:2001.08361);
attention scores are counted without their causal half, and what is computed again in the backward pass (model.loss_chunk)
is not counted, as is usual where MFU is told (PaLM, arXiv:2204.02311).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apt_launch.config import RunConfig
from apt_model.errors import ConfigError, nearest
from apt_model.schedule import MODULES, Clock, Program
from apt_model.schedule.program import LatchState, Subject
from apt_model.schedule.targets import matching

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from apt_model.gpt import GPT
    from apt_model.layers.attention import SelfAttention
    from apt_model.layers.feed_forward import FeedForward
    from apt_model.layers.moe import MoE

FP32: Final = 4
"""Bytes of a float32."""

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


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run during which no module switches. Bytes are those of one device that holds everything."""

    step: int  # its first update
    updates: int
    tokens: int  # that it trains on
    batch_size: int  # sequences of the batch that activations and workspace are for
    modules: tuple[str, ...]  # that are on
    frozen: tuple[str, ...]  # patterns of frozen parameters
    parameters: int
    active: int  # parameters that one token meets: top_k of the experts, and all that is shared
    largest_block: int  # parameters of the largest block
    experts: int  # those of them that are its experts
    compute_bytes: int  # of a number in matrix products: 4, or 2 under autocast
    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    workspace: int
    forward_flops: int  # a token

    @property
    def training_flops(self) -> int:
        """FLOPs a token of forward and backward pass."""
        return 3 * self.forward_flops

    @property
    def total(self) -> int:
        """Bytes on a device that holds everything."""
        return self.weights + self.gradients + self.optimizer + self.casts + self.activations + self.workspace


@dataclass(frozen=True)
class Saved:
    """What one token costs in a part of the model: FLOPs forward, and bytes that autograd saves for the backward pass.

    With c bytes a number in matrix products, d = d_model, f = d_ff, h heads, E experts, k of them a token, v the
    vocabulary, B sequences of S tokens:

    - a norm: 4 d + 4 (its input over the root mean square, and the latter)
    - attention: 8 c d + 4 h (input, query-key-value, rotated query and key, output twice, and the normaliser);
      written out (``eager``) 5 c d + h S c, and 4 h S more under autocast on a GPU, whose softmax works in float32
    - a dense feed-forward layer: c d (twice under autocast with swiglu) + 4 c f; 2 c f with gelu and relu2
    - experts: 4 d + 8 E + k (c d + 4 c f / g + 8 d + 40) with a granularity of g; a shared expert 4 c f (+ 2 c d under
      autocast) more; jitter 4 d more (and c d beside a shared expert in fp32)
    - alignment: 2 c d + 4 B + 40 rank
    - head and loss: c d + 4 v + 16; 4 v more with label smoothing; c d alone where the loss is computed in chunks
    - the voter: votes (8 v + 4 d + c d) + 4 v, if every position votes: the most that can happen
    - dropout: d for each layer that has it

    On the CPU, in 16 bits, groups of experts are filled up to round sizes: E s / 2 slots more on the mean, s as in
    :func:`apt_model.layers.feed_forward.size_step`, and c d + 16 bytes a slot.

    Measured on the CPU. CUDA's fused kernels save d numbers less an attention layer.
    """

    flops: float
    saved: float

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.flops + other.flops, self.saved + other.saved)


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


def sizes(config: RunConfig, *, on_gpu: bool | None = None) -> list[Phase]:
    """Count what each phase of the curriculum needs, beginning with the planned begin.

    A module that a latch decides counts as on from the first update at which the latch may act: the most that can happen.

    Args:
        config: a checked config.
        on_gpu: what ``trainer.precision=auto`` means: True bf16, False fp32, None what it would be on this machine.
    """
    import torch

    from apt_launch.build import build_model
    from apt_model.layers import scheduled

    if on_gpu is None:
        on_gpu = config.trainer.device.startswith("cuda") or (
            config.trainer.device == "auto" and torch.cuda.is_available()
        )
    half = config.trainer.precision in ("bf16", "fp16") or (config.trainer.precision == "auto" and on_gpu)
    compute = 2 if half else FP32
    with torch.device("meta"):
        model = build_model(config.values)
    curriculum = config.program.curriculum
    for name in curriculum.all_anneals:
        scheduled.expect(model, matching(curriculum.target_of(name), scheduled.targets(model)))

    trained: set[torch.nn.Parameter] = set()
    found = []
    phases = list(_phases(config.program))
    for (step, on), end in zip(phases, [step for step, _ in phases[1:]] + [config.horizon.steps], strict=True):
        with torch.device("meta"):
            for name, switch in model.switches().items():
                switch(on.get(Subject(name, "enabled"), False))
        for subject, frozen in on.items():
            if subject.state == "frozen":
                model.freeze(subject.name, frozen)
        parameters = list(model.parameters())
        trained |= {parameter for parameter in parameters if parameter.requires_grad}
        total = sum(parameter.numel() for parameter in parameters)
        batch, length = config.trainer.batch_size, config.model.seq_len
        token, again = _token(model, batch=batch, length=length, compute=compute, on_gpu=on_gpu)
        vocabulary = model.embedding.num_embeddings
        found.append(
            Phase(
                step=step,
                updates=end - step,
                tokens=_tokens(config, step, end),
                batch_size=batch,
                modules=tuple(name for name in MODULES if on.get(Subject(name, "enabled"))),
                frozen=tuple(subject.name for subject, value in on.items() if subject.state == "frozen" and value),
                parameters=total,
                active=total - round(_idle(model)),
                largest_block=max(_numel(block) for block in model.blocks),
                experts=max(0 if layer.experts is None else _numel(layer.experts) for layer in model.moe_layers),
                compute_bytes=compute,
                weights=FP32 * total,
                gradients=FP32 * sum(p.numel() for p in parameters if p.requires_grad),
                optimizer=2 * FP32 * sum(p.numel() for p in parameters if p in trained),
                casts=0 if compute == FP32 else compute * _multiplied(model),
                activations=round(batch * length * token.saved),
                workspace=round(_at_once(model, batch * length) * (vocabulary * (compute + 2 * FP32) + again.saved)),
                forward_flops=round(token.flops),
            )
        )
    return found


def _phases(program: Program) -> Iterator[tuple[int, dict[Subject, bool]]]:
    """Yield the first update of each phase, and what is on (or frozen) in it."""
    horizon = program.horizon
    fired: dict[str, Clock] = dict(program.fired)
    latched: dict[Subject, Clock] = {}
    waiting = dict(program.latches)
    while waiting:  # a latch may wait for another one
        ready = [s for s, when in waiting.items() if when.not_before.step(horizon, fired) is not None] or [*waiting]
        for subject in ready:
            first = waiting.pop(subject).not_before.step(horizon, fired) or 0
            latched[subject] = horizon.clock_at(first)
            fired.setdefault(subject.event(True), latched[subject])
    times = [switch.at.step(horizon, fired) for switches in program.switches.values() for switch in switches]
    steps = {0, *(clock.step for clock in latched.values()), *(step for step in times if step is not None)}
    before: dict[Subject, bool] | None = None
    for step in sorted(step for step in steps if step < horizon.steps):
        memory = {s: LatchState(on=True, first_on=clock) for s, clock in latched.items() if clock.step <= step}
        values = program.at(horizon.clock_at(step), memory)
        state = {subject: bool(values[subject.label]) for subject in program.switches}
        if state != before:
            yield step, state
        before = state


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tokens(config: RunConfig, begin: int, end: int) -> int:
    """Return the tokens of updates ``begin`` to ``end``; all count whole where the horizon knows no samples."""
    horizon = config.horizon
    if horizon.samples_per_epoch and horizon.tokens_per_sample:
        return horizon.clock_at(end).token - horizon.clock_at(begin).token
    return (end - begin) * config.trainer.accumulate * config.trainer.batch_size * config.model.seq_len


def _idle(model: GPT) -> float:
    """Return the parameters that a token does not meet."""
    return sum(
        (1.0 - layer.top_k / layer.num_experts) * sum(p.numel() for p in layer.experts.parameters())
        for layer in model.moe_layers
        if layer.experts is not None
    )


def _multiplied(model: GPT) -> int:
    """Return the entries of all matrices of which autocast keeps copies; the router computes in float32."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and ".router." not in name)
    return matrices - (model.embedding.weight.numel() if model.loss_chunk else 0)  # the head's is made anew a chunk


def _at_once(model: GPT, tokens: int) -> int:
    """Return the tokens whose logits are held at once."""
    return min(tokens, model.loss_chunk or tokens)


def _token(model: GPT, *, batch: int, length: int, compute: int, on_gpu: bool) -> tuple[Saved, Saved]:
    """Return what a token costs in the whole model, and what is saved once it is computed again in the backward pass."""
    d, vocabulary = model.embedding.embedding_dim, model.embedding.num_embeddings
    norm = Saved(0, 4 * d + 4)
    total = norm
    for block in model.blocks:
        total += norm + norm
        total += _attention(block.attention, length, compute, on_gpu)  # type: ignore[arg-type]
        total += _feed_forward(block.ffn, d, compute, 0 if on_gpu else batch * length)  # type: ignore[arg-type]
    if model.align.enabled:
        rank = model.align.rank
        total += Saved(6 * d * rank + 2 * batch * rank, 2 * compute * d + 4 * batch + 40 * rank)
    predicted = Saved(2 * d * vocabulary, 4 * vocabulary + 16)
    if "label_smoothing" in model.expected:
        predicted += Saved(0, 4 * vocabulary)
    if model.voter.enabled:
        votes = model.voter.num_votes
        saved = votes * (8 * vocabulary + 4 * d + compute * d) + 4 * vocabulary
        predicted += Saved(2 * d * vocabulary * votes, saved)
    total += Saved(predicted.flops, compute * d)
    if model.loss_chunk is None:
        return total + Saved(0, predicted.saved), Saved(0, 0)
    return total, predicted


def _attention(layer: SelfAttention, length: int, compute: int, on_gpu: bool) -> Saved:
    from apt_model.layers.attention import eager

    d, heads = layer.out.out_features, layer.num_heads
    if layer.attend is eager:
        softmax = FP32 if on_gpu and compute < FP32 else 0
        saved = 5 * compute * d + heads * length * (compute + softmax)
    else:
        saved = 8 * compute * d + 4 * heads
    if "dropout" in layer.expected:
        saved += d
    return Saved(2 * 4 * d * d + 4 * length * d, saved)


def _feed_forward(layer: MoE, d: int, compute: int, tokens: int) -> Saved:
    """``tokens``: of a batch on the CPU, where 16 bits fill sizes up; else 0."""
    from apt_model.layers.feed_forward import size_step

    dropout = Saved(0, d if "dropout" in layer.expected else 0)
    dense = _dense(layer.dense, compute) if layer.dense is not None else Saved(0, 0)
    if layer.experts is None:
        return dense + dropout
    jitter = "jitter" in layer.expected
    if compute == FP32 and layer.dense is not None and not jitter:
        dense = Saved(dense.flops, dense.saved - FP32 * d)  # its input is the router's
    weights = dict(layer.experts.named_parameters())
    one = sum(p.numel() for p in weights.values()) / layer.num_experts
    inner, width = _inner(layer.experts.ffn), weights["up"].shape[1]
    products = compute * (d + inner * width)
    slot = Saved(2 * one, products + 8 * d + 40)
    if tokens and compute < FP32:
        filled = layer.num_experts * size_step(tokens * layer.top_k, layer.num_experts) / 2
        slot += Saved(0, products * filled / (tokens * layer.top_k) + compute * d + 16)
    router = Saved(2 * d * layer.num_experts, FP32 * d * (2 if jitter else 1) + 8 * layer.num_experts)
    return dense + dropout + router + Saved(layer.top_k * slot.flops, layer.top_k * slot.saved)


def _dense(layer: FeedForward, compute: int) -> Saved:
    width, d = layer.up.shape
    inputs = 2 if compute < FP32 and layer.ffn == "swiglu" else 1  # autocast casts once for each product
    flops = 2 * sum(p.numel() for p in layer.parameters())
    return Saved(flops, compute * (inputs * d + _inner(layer.ffn) * width))


def _inner(ffn: str) -> int:
    """Return how many tensors of width d_ff a feed-forward layer saves."""
    return 4 if ffn == "swiglu" else 2


def cost(config: RunConfig, phases: Sequence[Phase], *, gpu: str, num_gpus: int = 1, mfu: float = DEFAULT_MFU) -> Cost:
    """Say how long the run takes on ``num_gpus`` GPUs of one kind, and whether it fits.

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


def batch_bytes(phase: Phase, config: RunConfig, share: int) -> int:
    """Return the bytes of activations and workspace for ``share`` sequences."""
    activations, workspace = _growth(phase, config)
    return math.ceil(
        share * activations + min(share * config.model.seq_len, config.model.loss_chunk or math.inf) * workspace
    )


def _growth(phase: Phase, config: RunConfig) -> tuple[float, float]:
    """Return the bytes of activations for a sequence, and of workspace for a token."""
    at_once = min(phase.batch_size * config.model.seq_len, config.model.loss_chunk or math.inf)
    return phase.activations / phase.batch_size, phase.workspace / at_once


def _room(config: RunConfig, phase: Phase, free: float) -> float:
    """Return how many sequences' activations and workspace take ``free`` bytes; the workspace ends to grow with a chunk."""
    length, chunk = config.model.seq_len, config.model.loss_chunk
    activations, workspace = _growth(phase, config)
    sequences = free / (activations + workspace * length)
    if chunk is None or sequences * length <= chunk:
        return sequences
    return (free - workspace * chunk) / activations


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
        told = cost(config, phases, gpu=gpu, num_gpus=num_gpus, mfu=mfu)
        return _drawn(phases, told, told.per_device, num_gpus, sequences(config, num_gpus))
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
        "modules on": [" ".join(phase.modules) or "none" for phase in phases],
        "updates": [f"{phase.updates:,}" for phase in phases],
        "parameters": [_count(phase.parameters) for phase in phases],
        "active a token": [_count(phase.active) for phase in phases],
        "weights": [_bytes(phase.weights) for phase in phases],
        "gradients": [_bytes(phase.gradients) for phase in phases],
        "optimizer": [_bytes(phase.optimizer) for phase in phases],
        "16-bit copies": [_bytes(phase.casts) for phase in phases],
        f"activations, {phases[0].batch_size} sequences": [_bytes(phase.activations) for phase in phases],
        "logits and gradient": [_bytes(phase.workspace) for phase in phases],
        "all on one device": [_bytes(phase.total) for phase in phases],
        "forward FLOPs a token": [_count(phase.forward_flops) for phase in phases],
        "training FLOPs a token": [_count(phase.training_flops) for phase in phases],
    }
    if any(phase.frozen for phase in phases):
        rows["frozen"] = [" ".join(phase.frozen) or "none" for phase in phases]
    if phases[0].compute_bytes == FP32:
        del rows["16-bit copies"]
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
    return Group(
        drawn,
        f"{cost.num_gpus} x {cost.kind} at an MFU of {cost.mfu:g}: {cost.hours:,.2f} hours, {cost.gpu_hours:,.2f} GPU-hours",
        f"{_sequences(share)} a device: {verdict} in {USABLE:.0%} of {cost.spec.memory_gb:g} GB; there is room for {room}",
        f"peak {cost.spec.bf16_tflops:g} TFLOP/s in bf16, dense ({cost.spec.source})",
    )


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
