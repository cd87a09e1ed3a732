"""What a run needs, phase by phase: parameters, memory and arithmetic. What that is on GPUs: :mod:`apt_launch.config.gpus`.

The model is built on torch's meta device, by the functions that training builds it with, so that a model of any size
is counted in seconds and in no memory.

Memory of one device, in bytes:

- weights: 4 a parameter. Weights are float32 and autocast computes in 16 bits, so no master copies come on top.
- gradients: 4 a parameter that is not frozen.
- optimizer: 8 a parameter that was ever trained: AdamW's two moments (arXiv:1711.05101), float32.
- casts: 2 an entry of each matrix that autocast multiplies with; it keeps those copies until the backward pass. None in fp32,
  none of experts on the CPU, and of one layer's experts at a time where blocks are computed again.
- activations: what autograd saves for the backward pass, for one batch (:class:`Saved` has the formula).
- recomputed: with trainer.activation_checkpointing, what one block saves while the backward pass computes it again; activations
  are then the inputs of blocks and what is saved outside of them.
- workspace: the logits and their gradient, when the backward pass begins; with model.loss_chunk those of a chunk, and what is
  saved for its backward pass.

FLOPs are those of matrix products, 2 a multiply-add. The backward pass takes twice the forward pass (arXiv:2001.08361);
attention scores are counted without their causal half, and what is computed again in the backward pass (model.loss_chunk,
trainer.activation_checkpointing) is not counted, as is usual where MFU is stated (PaLM, arXiv:2204.02311).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apt_launch.config.run_config import RunConfig
from apt_launch.config.schema import GPTConfig
from apt_model.errors import ConfigError
from apt_model.schedule import MODULES, Clock, Program
from apt_model.schedule.program import LatchState, Subject, grown_to
from apt_model.schedule.targets import covers, matching

if TYPE_CHECKING:
    import torch

    from apt_model.gpt import GPT
    from apt_model.layers.attention import SelfAttention
    from apt_model.layers.feed_forward import FeedForward
    from apt_model.layers.moe import MoE

FP32: Final = 4
"""Bytes of a float32."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run during which no module switches. Bytes are those of one device that holds everything."""

    step: int  # its first update
    updates: int
    tokens: int  # that it trains on
    batch_size: int  # sequences of the batch that activations and workspace are for
    modules: tuple[str, ...]  # that are enabled
    grown_to: int | None  # experts of a layer, once there are more than it began with
    frozen: tuple[str, ...]  # patterns of frozen parameters, and "(not PATTERN)" for parts of them that train
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
    recomputed: int
    workspace: int
    forward_flops: int  # a token

    @property
    def training_flops(self) -> int:
        """FLOPs a token of forward and backward pass."""
        return 3 * self.forward_flops

    @property
    def total(self) -> int:
        """Bytes on a device that holds everything."""
        kept = self.weights + self.gradients + self.optimizer + self.casts + self.activations
        return kept + max(self.workspace, self.recomputed)


@dataclass(frozen=True)
class Saved:
    """What one token costs in a part of the model: FLOPs forward, and bytes that autograd saves for the backward pass.

    With c bytes a number in matrix products, d = d_model, f = d_ff, h heads, E experts, k of them a token, v the
    vocabulary, B sequences of S tokens:

    - a block that is computed again: 4 d (its input)
    - a norm: 4 d + 4 (its input over the root mean square, and the latter)
    - attention, with a channels of all heads and b of those of keys: c (d + 3 a + 3 b) + 4 h (input, query-key-value, rotated
      query and key, output, and the normaliser), that is 7 c d + 4 h where a = b = d; written out (``eager``) c (d + 4 a) +
      h S c, and 4 h S more under autocast on a GPU, whose softmax works in float32; normalised queries and keys 4 more for each
      vector, and 4 (a + b) under autocast; a window that is shorter than S: its mask
    - a dense feed-forward layer: c d (twice under autocast with swiglu) + 4 c f; 2 c f with gelu and relu2
    - experts: 4 d + 8 E + k (c d + 4 c f / g + 8 d + 40) with a granularity of g; on the CPU k (2 c d + 4 c f / g + 48); a
      shared expert 4 c f (+ 2 c d under autocast) more; jitter 4 d more (and c d beside a shared expert in fp32)
    - alignment: 2 c d + 4 B + 40 rank
    - head and loss: c d + 4 v + 16; 4 v more with label smoothing, and with a z-loss under autocast; c d alone where
      the loss is computed in chunks
    - the voter: votes (8 v + 4 d + c d) + 4 v, if every position votes: the most that can happen
    - dropout: d for each layer that has it

    On the CPU there is room for a few rows more: see :mod:`apt_model.layers.cpu_experts`.

    Measured on the CPU. CUDA's fused kernels save d numbers less an attention layer.
    """

    flops: float
    saved: float

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.flops + other.flops, self.saved + other.saved)


def sizes(config: RunConfig, *, on_gpu: bool | None = None) -> list[Phase]:
    """Count what each phase of the curriculum needs, beginning with the planned begin.

    A module that a latch decides counts as on from the first update at which the latch may act: the most that can happen.

    Args:
        config: a checked config.
        on_gpu: what ``trainer.precision=auto`` means: True bf16, False fp32, None what it would be on this machine.
    """
    if not isinstance(config.model, GPTConfig):
        raise ConfigError("--sizes: they are counted for model=gpt only. Leave --sizes, --gpu and --gpus out.")
    import torch

    from apt_launch.config.instantiate import build_model
    from apt_model.layers import scheduled
    from apt_model.training.subject import resize

    if on_gpu is None:
        on_gpu = config.trainer.device.startswith("cuda") or (
            config.trainer.device == "auto" and torch.cuda.is_available()
        )
    half = config.trainer.precision in ("bf16", "fp16") or (config.trainer.precision == "auto" and on_gpu)
    compute = 2 if half else FP32
    with torch.device("meta"):
        model = build_model(config.values)
    model.activation_checkpointing = config.trainer.activation_checkpointing
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
            grown = grown_to(subject for subject, value in on.items() if value)
            resize(model, at_least=grown)
        for subject, frozen in on.items():
            if subject.state == "frozen":
                model.freeze(subject.name, frozen)
        parameters = list(model.parameters())
        trained |= {parameter for parameter in parameters if parameter.requires_grad}
        total = sum(parameter.numel() for parameter in parameters)
        batch, length = config.trainer.batch_size, config.model.seq_len
        token, predicted_again, block_again = _token(model, batch=batch, length=length, compute=compute, on_gpu=on_gpu)
        vocabulary = model.embedding.num_embeddings
        found.append(
            Phase(
                step=step,
                updates=end - step,
                tokens=_tokens(config, step, end),
                batch_size=batch,
                modules=tuple(name for name in MODULES if on.get(Subject(name, "enabled"))),
                grown_to=grown or None,
                frozen=tuple(_frozen(on)),
                parameters=total,
                active=total - round(_idle(model)),
                largest_block=max(_numel(block) for block in model.blocks),
                experts=max(0 if layer.experts is None else _numel(layer.experts) for layer in model.moe_layers),
                compute_bytes=compute,
                weights=FP32 * total,
                gradients=FP32 * sum(p.numel() for p in parameters if p.requires_grad),
                optimizer=2 * FP32 * sum(p.numel() for p in parameters if p in trained),
                casts=0 if compute == FP32 else compute * _multiplied(model, on_gpu),
                activations=round(batch * length * token.saved),
                recomputed=round(batch * length * block_again.saved),
                workspace=round(
                    _at_once(model, batch * length) * (vocabulary * (compute + 2 * FP32) + predicted_again.saved)
                ),
                forward_flops=round(token.flops),
            )
        )
    return found


def _phases(program: Program) -> Iterator[tuple[int, dict[Subject, bool]]]:
    """Yield the first update of each phase, and what is enabled (or frozen) in it."""
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


def _frozen(on: Mapping[Subject, bool]) -> Iterator[str]:
    frozen = [subject.name for subject, value in on.items() if subject.state == "frozen" and value]
    for subject, value in on.items():  # whole things before their parts
        if subject.state == "frozen" and value:
            yield subject.name
        elif subject.state == "frozen" and any(covers(whole, subject.name) for whole in frozen):
            yield f"(not {subject.name})"


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


def _multiplied(model: GPT, on_gpu: bool) -> int:
    """Return the entries of all matrices of which copies are kept; the router computes in float32."""
    others = (".router.", ".experts.")
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and not any(part in name for part in others)
    )
    if on_gpu:
        experts = [_numel(layer.experts) for layer in model.moe_layers if layer.experts is not None]
        matrices += max(experts, default=0) if model.activation_checkpointing else sum(experts)
    if model.unembedding is not None:
        matrices -= model.embedding.weight.numel()  # rows of it are read
    return matrices - (model.output_weight.numel() if model.loss_chunk else 0)  # the head's is made anew a chunk


def _at_once(model: GPT, tokens: int) -> int:
    """Return the tokens whose logits are held at once."""
    return min(tokens, model.loss_chunk or tokens)


def _token(model: GPT, *, batch: int, length: int, compute: int, on_gpu: bool) -> tuple[Saved, Saved, Saved]:
    """Return what a token costs in the whole model.

    Also what is saved once its loss, and once a block, is computed again in the backward pass: nothing, if it is not.
    """
    d, vocabulary = model.embedding.embedding_dim, model.embedding.num_embeddings
    norm = Saved(0, 4 * d + 4)
    total, block_again = norm, Saved(0, 0)
    for block in model.blocks:
        whole = norm + norm
        whole += _attention(block.attention, batch, length, compute, on_gpu)  # type: ignore[arg-type]
        whole += _feed_forward(block.ffn, d, compute, 0 if on_gpu else batch * length)  # type: ignore[arg-type]
        if model.activation_checkpointing:
            block_again = max(block_again, whole, key=lambda saved: saved.saved)
            whole = Saved(whole.flops, FP32 * d)
        total += whole
    if model.align.enabled:
        rank = model.align.rank
        total += Saved(6 * d * rank + 2 * batch * rank, 2 * compute * d + 4 * batch + 40 * rank)
    predicted = Saved(2 * d * vocabulary, 4 * vocabulary + 16)
    if "label_smoothing" in model.expected:
        predicted += Saved(0, 4 * vocabulary)
    if "z_loss_weight" in model.expected:
        predicted += Saved(0, (4 * vocabulary if compute < FP32 else 0) + 8)
    if model.voter.enabled:
        voter = model.voter
        saved = voter.num_votes * 8 * vocabulary + voter.head_passes * (4 * d + compute * d) + 4 * vocabulary
        predicted += Saved(2 * d * vocabulary * voter.head_passes, saved)
    total += Saved(predicted.flops, compute * d)
    if model.loss_chunk is None:
        return total + Saved(0, predicted.saved), Saved(0, 0), block_again
    return total, predicted, block_again


def _attention(layer: SelfAttention, batch: int, length: int, compute: int, on_gpu: bool) -> Saved:
    from apt_model.layers.attention import eager

    d, heads, shared = layer.out.out_features, layer.num_heads, layer.num_kv_heads
    a, b = heads * layer.head_dim, shared * layer.head_dim
    windowed = layer.window is not None and layer.window < length
    if layer.attend is eager:
        softmax = FP32 if on_gpu and compute < FP32 else 0
        saved: float = compute * (d + 4 * a) + heads * length * (compute + softmax)
    else:
        saved = compute * (d + 3 * a + 3 * b) + 4 * heads
        if windowed:
            saved += compute * (2 * (a - b) + length / batch)
    if layer.qk_norm is not None:
        saved += 4 * (heads + shared if layer.qk_norm == "head" else 2) + (4 * (a + b) if compute < FP32 else 0)
    if "dropout" in layer.expected:
        saved += d
    return Saved(2 * d * (2 * a + 2 * b) + 4 * length * a, saved)


def _feed_forward(layer: MoE, d: int, compute: int, tokens: int) -> Saved:
    """``tokens``: of a batch on the CPU; else 0."""
    import torch

    from apt_model.layers.cpu_experts import STEP, num_places

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
    saved: float = compute * (d + inner * width) + 8 * d
    if tokens:
        slots, dtype = tokens * layer.top_k, torch.float32 if compute == FP32 else torch.bfloat16
        place = compute * (2 * d + inner * width) + 8
        saved = (place * num_places(slots, layer.num_experts, dtype) + compute * inner * width * STEP) / slots
    slot = Saved(2 * one, saved + 40)
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
