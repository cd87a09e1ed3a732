"""Hand-computed numbers, and the estimates against what torch itself counts on small real models."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console, RenderableType
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from apt_launch.config.gpus import GPUS, cost, device_bytes, table
from apt_launch.config.instantiate import build_model
from apt_launch.config.run_config import RunConfig
from apt_launch.config.sizes import sizes
from apt_model.errors import ConfigError
from apt_model.gpt import GPT
from apt_model.layers import scheduled
from apt_model.schedule.targets import matching
from tests.late import Late

fsdp = Late("apt_model.training.fsdp")

Composed = Callable[..., RunConfig]

REAL = (  # large enough for counts that do not grow with the widths to be small beside those that do
    "model.vocab_size=320",
    "model.d_model=64",
    "model.num_heads=4",
    "model.d_ff=192",
    "model.seq_len=64",
    "trainer.batch_size=4",
    "moe.num_experts=8",
    "align.rank=8",
    "voter.threshold=0.0",  # every position votes
)


@pytest.fixture
def full(composed: Composed, tmp_path: Path) -> Callable[..., RunConfig]:
    """Compose the full-size profile on 101 batches of text."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "' + "x" * 2048 * 32 * 101 + '"}\n')
    data = (f"data.train_path={rows}", f"data.val_path={rows}")
    return lambda *overrides: composed("profile=gpt5_moe_reasoning", *data, *overrides)


def at_its_end(config: RunConfig) -> GPT:
    """Build the model for real, with all that its curriculum switches on, as training would."""
    torch.manual_seed(0)
    model = build_model(config.values)
    model.activation_checkpointing = config.trainer.activation_checkpointing
    curriculum = config.program.curriculum
    for name in curriculum.anneals:
        scheduled.expect(model, matching(curriculum.target_of(name), scheduled.targets(model)))
    last = config.program.at(config.horizon.clock_at(config.horizon.steps - 1))
    for name, switch in model.switches().items():
        switch(bool(last[f"{name}_enabled"]))
    return model


def loss_of(model: GPT, config: RunConfig) -> Tensor:
    tokens = torch.randint(0, 256, (config.trainer.batch_size, config.model.seq_len + 1))
    output = model(tokens[:, :-1], tokens[:, 1:], with_metrics=False)  # as most updates are
    assert output.language_loss is not None
    return output.language_loss + output.auxiliary_loss


# --- by hand -----------------------------------------------------------------------------------------------------------


def test_a_small_model_has_the_parameters_and_bytes_worked_out_by_hand(small: Composed) -> None:
    # d 16, ff 32, vocabulary 256, 2 layers: embedding 4096; attention 4 x 16 x 16 = 1024; swiglu 3 x 16 x 32 = 1536;
    # 5 norms of 16. With experts: 4 x 1536 and a router of 4 x 16. Alignment of rank 4: 2 x 4 x 16.
    phases = sizes(small("schedule=gpt5_moe"), on_gpu=False)
    dense = 4096 + 2 * (1024 + 1536) + 5 * 16
    sparse = 4096 + 2 * (1024 + 4 * 1536 + 64) + 5 * 16
    assert [phase.parameters for phase in phases] == [dense, sparse, sparse + 128, sparse + 128]
    active = 4096 + 2 * (1024 + 2 * 1536 + 64) + 5 * 16
    assert [phase.active for phase in phases] == [dense, active, active + 128, active + 128]
    assert [(phase.weights, phase.gradients, phase.optimizer) for phase in phases[:2]] == [
        (4 * dense, 4 * dense, 8 * dense),
        (4 * sparse, 4 * sparse, 8 * sparse),
    ]
    assert {phase.casts for phase in phases} == {0}


def test_phases_begin_where_modules_are_enabled_and_cover_the_run(small: Composed) -> None:
    phases = sizes(small("schedule=gpt5_moe"), on_gpu=False)  # 6 epochs x 4 updates
    assert [(phase.step, phase.updates, phase.modules) for phase in phases] == [
        (0, 8, ()),
        (8, 4, ("moe",)),
        (12, 8, ("moe", "align")),
        (20, 4, ("moe", "align", "voter")),
    ]
    assert [phase.tokens for phase in phases] == [8 * 32, 4 * 32, 8 * 32, 4 * 32]  # 2 sequences of 16 tokens an update


def test_a_run_without_a_curriculum_is_one_dense_phase(small: Composed) -> None:
    (phase,) = sizes(small("schedule=none"), on_gpu=False)
    assert (phase.step, phase.updates, phase.modules, phase.parameters) == (0, 24, (), phase.active)


def test_a_module_that_goes_off_again_leaves_what_was_there_before(small: Composed) -> None:
    phases = sizes(
        small(
            "schedule=none", "+schedule.events.a={enable: moe, at: 1ep}", "+schedule.events.b={disable: moe, at: 2ep}"
        )
    )
    assert [phase.modules for phase in phases] == [(), ("moe",), ()]
    assert phases[0].parameters == phases[2].parameters < phases[1].parameters


def test_experts_that_grow_are_more_parameters_and_as_many_a_token(small: Composed) -> None:
    grown = "+schedule.events.more={grow: moe, to: 8, at: 2ep}"
    before, after = sizes(small("schedule=none", "schedule.enable_moe_at_epoch=1", grown))[1:]
    assert (before.grown_to, after.grown_to) == (None, 8)
    assert after.experts == 2 * before.experts
    routers = 2 * 4 * 16  # layers, experts more, d_model
    assert after.active - before.active == routers
    assert after.forward_flops - before.forward_flops == 2 * routers


def test_a_module_under_a_latch_counts_from_when_the_latch_may_act(small: Composed) -> None:
    event = "{enable: voter, when: {metric: val/loss, below: 2.0, not_before: 3ep}}"
    phases = sizes(small("schedule=none", f"+schedule.events.a={event}"))
    assert [(phase.step, phase.modules) for phase in phases] == [(0, ()), (12, ("voter",))]


def test_frozen_parameters_have_no_gradients_and_keep_their_moments(small: Composed) -> None:
    # the embedding, 256 x 16, is trained for an epoch, then frozen
    phases = sizes(small("schedule=none", "+schedule.events.a={freeze: embedding, at: 1ep}"))
    assert [phase.frozen for phase in phases] == [(), ("embedding",)]
    assert phases[0].gradients - phases[1].gradients == 4 * 4096
    assert phases[0].optimizer == phases[1].optimizer


def test_a_part_that_trains_again_has_gradients_while_the_rest_of_the_whole_has_none(small: Composed) -> None:
    phases = sizes(
        small(
            "schedule=none",
            "+schedule.events.a={freeze: blocks, at: 1ep}",
            "+schedule.events.b={unfreeze: blocks.1, at: 2ep}",
        )
    )
    assert [phase.frozen for phase in phases] == [(), ("blocks", "blocks.1"), ("blocks", "(not blocks.1)")]
    block = phases[0].largest_block
    assert [phases[0].gradients - phase.gradients for phase in phases] == [0, 4 * 2 * block, 4 * block]


def test_the_model_for_a_gpu_has_a_hundred_million_parameters_and_a_billion_tokens(
    composed: Composed, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x" * 65_536 * 40)
    config = composed("profile=gpt_100m", "data=text", f"data.path={text}", "schedule=none")
    (phase,) = sizes(config, on_gpu=True)
    d, ff, layers, vocabulary = 768, 2048, 12, 32_768
    assert phase.parameters == vocabulary * d + layers * (4 * d * d + 3 * d * ff + 2 * d) + d == 110_119_680
    trainer = config.trainer
    assert trainer.max_batches_per_epoch is not None
    assert trainer.max_batches_per_epoch % trainer.accumulate == 0
    batches = trainer.max_epochs * trainer.max_batches_per_epoch
    assert batches * trainer.batch_size * config.model.seq_len == 1_000_341_504


def test_the_full_profile_is_counted_by_hand_and_in_seconds(full: Callable[..., RunConfig]) -> None:
    d, ff, layers, experts, vocabulary, length = 768, 3072, 24, 64, 50257, 2048
    one, attention, router = 3 * d * ff, 4 * d * d, experts * d
    outside = vocabulary * d + (2 * layers + 1) * d
    last = sizes(full(), on_gpu=True)[-1]
    align = 2 * 16 * d
    assert last.parameters == outside + layers * (attention + router + experts * one) + align == 10_968_098_304
    assert last.active == outside + layers * (attention + router + 2 * one) + align == 436_200_960
    assert last.casts == 2 * (last.parameters - layers * router - outside)  # the head's is made for each chunk
    products = layers * (attention + router + 2 * one) + (1 + 2) * vocabulary * d  # head, and two of three votes
    alignment = 6 * 16 * d + 2 * 32 * 16
    assert last.forward_flops == 2 * products + layers * 4 * length * d + alignment
    assert last.training_flops == 3 * last.forward_flops


def test_a_granularity_leaves_parameters_and_flops_as_they_are_but_for_the_router(
    full: Callable[..., RunConfig],
) -> None:
    whole, fine = (
        sizes(full(*slices), on_gpu=True)[-1]
        for slices in ((), ("moe.granularity=4", "moe.num_experts=256", "moe.top_k=8"))
    )
    router = 24 * (256 - 64) * 768
    assert fine.parameters - whole.parameters == fine.active - whole.active == router
    assert fine.forward_flops - whole.forward_flops == 2 * router


def test_a_shared_expert_gives_the_full_profile_11_billion_parameters_and_0_61_active(
    full: Callable[..., RunConfig],
) -> None:
    last = sizes(full("moe.shared_expert=true"), on_gpu=True)[-1]
    assert last.parameters == pytest.approx(11.1e9, rel=0.01)
    assert last.active == pytest.approx(0.61e9, rel=0.01)


# --- against torch -------------------------------------------------------------------------------------------------------

MODELS = {
    "dense": ["schedule=none"],
    "experts": ["schedule=none", "schedule.enable_moe_at_epoch=1"],
    "all modules": ["schedule=gpt5_moe", "schedule.vote_threshold=null"],
    "gelu": ["schedule=none", "model.ffn=gelu"],
    "relu2 experts": ["schedule=none", "model.ffn=relu2", "schedule.enable_moe_at_epoch=1"],
    "written out": ["schedule=none", "model.attention=eager"],
    "shared expert": ["schedule=none", "schedule.enable_moe_at_epoch=1", "moe.shared_expert=true"],
    "fine-grained experts": [
        "schedule=none",
        "schedule.enable_moe_at_epoch=1",
        "moe.granularity=3",
        "moe.num_experts=24",
        "moe.top_k=6",
        "moe.shared_expert=true",
    ],
    "jitter": ["schedule=none", "schedule.enable_moe_at_epoch=1", "moe.jitter=0.1", "moe.upcycling=drop"],
    "jitter beside a shared expert": [
        "schedule=none",
        "schedule.enable_moe_at_epoch=1",
        "moe.jitter=0.1",
        "moe.shared_expert=true",
    ],
    "dropless sigmoid": [
        "schedule=none",
        "schedule.enable_moe_at_epoch=1",
        "moe.capacity_factor=null",
        "moe.router=sigmoid",
    ],
    "annealed dropout": [
        "schedule=none",
        "+schedule.anneals.drop={target: blocks.*.ffn.dropout, start: 0.0, end: 0.1}",
    ],
    "loss in chunks": ["schedule=none", "model.loss_chunk=40", "model.label_smoothing=0.1"],
    "blocks computed again": [
        "schedule=gpt5_moe",
        "schedule.vote_threshold=null",
        "trainer.activation_checkpointing=true",
    ],
    "grouped queries, untied": [
        *("schedule=none", "model.num_kv_heads=2", "model.tie_embeddings=false", "model.qkv_bias=true"),
        *("model.head_dim=24", "model.loss_chunk=40"),
    ],
    "normalised heads": ["schedule=none", "model.num_kv_heads=1", "model.qk_norm=head", "model.norm_eps=1e-5"],
    "normalised at once, a window": [
        "schedule=none",
        "model.qk_norm=all",
        "model.sliding_window=16",
        "model.seq_len=40",
    ],
    "grouped queries written out": ["schedule=none", "model.num_kv_heads=2", "model.attention=eager"],
    "a window over groups": ["schedule=none", "model.num_kv_heads=2", "model.sliding_window=16", "model.seq_len=40"],
    "regularised": ["schedule=none", "model.dropout=0.1", "model.label_smoothing=0.1"],
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_activations_are_what_autograd_saves(small: Composed, overrides: list[str], precision: str) -> None:
    config = small(
        *REAL,
        *overrides,
        f"trainer.precision={precision}",
    )
    phase = sizes(config)[-1]
    model = at_its_end(config)
    with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
        activations, casts = saved_bytes(model, config)
    assert phase.activations == pytest.approx(activations, rel=0.05)
    if not model.activation_checkpointing:  # else autocast alone holds them, until the forward pass ends
        assert phase.casts == pytest.approx(casts, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_computed_again_is_one_block(small: Composed, precision: str) -> None:
    given = (*REAL, "schedule=none", "schedule.enable_moe_at_epoch=1", f"trainer.precision={precision}")
    saved = []
    for layers in (2, 3):
        config = small(*given, f"model.num_layers={layers}")
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            saved.append(saved_bytes(at_its_end(config), config)[0])
        assert sizes(config)[-1].recomputed == 0
    again = sizes(small(*given, "trainer.activation_checkpointing=true"))[-1]
    assert again.recomputed == pytest.approx(saved[1] - saved[0], rel=0.05)
    assert again.total - again.activations < sizes(config)[-1].total - saved[0]


def saved_bytes(model: GPT, config: RunConfig) -> tuple[int, int]:
    """Return the bytes that a forward pass saves for the backward pass: activations, and copies of weights."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.T.shape) for p in model.parameters() if p.dim() == 2
    }
    shapes |= {tuple(p.transpose(1, 2).shape) for p in model.parameters() if p.dim() == 3}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, config)
    sizes_of = {at: tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in known}
    casts = sum(
        size for at, size in sizes_of.items() if kept[at].dtype == torch.bfloat16 and tuple(kept[at].shape) in shapes
    )
    loss.backward()
    return sum(sizes_of.values()) - casts, casts


def added_flops(_: Sequence[int], one: Sequence[int], other: Sequence[int], **__: Any) -> int:
    """(rows, in) with (in, out), added to what is there, which torch's counter does not know."""
    return 2 * one[0] * one[1] * other[1]


def grouped_flops(one: Sequence[int], other: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Rows by matrices, (rows, in) with (groups, in, out), or rows by rows, (out, rows) with (rows, in)."""
    return 2 * one[0] * one[1] * other[-1]


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_flops_are_what_torch_counts(small: Composed, overrides: list[str]) -> None:
    config = small(
        *REAL,
        *overrides,
        "model.attention=eager",
    )
    phase = sizes(config)[-1]
    model = at_its_end(config)
    tokens = config.trainer.batch_size * config.model.seq_len
    known = {torch.ops.aten._grouped_mm: grouped_flops, torch.ops.aten.addmm_: added_flops}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        loss = loss_of(model, config)
        forward = counter.get_total_flops()
        loss.backward()
    assert phase.forward_flops * tokens == pytest.approx(forward, rel=0.01)
    again = 2 * tokens * config.model.d_model * config.model.vocab_size if config.model.loss_chunk else 0  # the head
    if model.activation_checkpointing:  # but for each block's last product, which nobody needs for the backward pass
        again = counter.get_total_flops() - 3 * forward
        assert 0.7 * forward < again < forward
    assert phase.training_flops * tokens + again == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_optimizer_holds_what_was_counted(small: Composed) -> None:
    config = small("schedule=gpt5_moe")
    phase = sizes(config)[-1]
    model = at_its_end(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss_of(model, config).backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.untyped_storage().nbytes() for moment in moments) == phase.optimizer
    assert sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None) == phase.gradients


# --- on GPUs -------------------------------------------------------------------------------------------------------------


def test_time_is_training_flops_over_the_share_of_the_peak(full: Callable[..., RunConfig]) -> None:
    config = full()
    phases = sizes(config, on_gpu=True)
    told = cost(config, phases, gpu="h100", num_gpus=8, mfu=0.5)
    assert sum(phase.tokens for phase in phases) == 50 * 101 * 32 * 2048
    flops = sum(phase.tokens * 3 * phase.forward_flops for phase in phases)
    assert told.hours == pytest.approx(flops / (8 * 0.5 * 989.5e12) / 3600)
    assert told.gpu_hours == pytest.approx(8 * told.hours)
    twice = cost(config, phases, gpu="h100", num_gpus=16, mfu=0.5)
    assert twice.hours == pytest.approx(told.hours / 2)


def test_weights_gradients_and_moments_are_shared_among_devices(full: Callable[..., RunConfig]) -> None:
    config = full("trainer.batch_size=1", "trainer.max_batches_per_epoch=101")
    phases = sizes(config, on_gpu=True)
    told = cost(config, phases, gpu="b200", num_gpus=8)
    last, block = phases[-1], 4 * 768 * 768 + 64 * 3 * 768 * 3072 + 64 * 768 + 2 * 768
    assert last.largest_block == block
    grows = last.activations + last.workspace
    assert told.per_device[-1] == 16 * last.parameters / 8 + (3 * 2 + 4) * block + grows
    spread = full("trainer.batch_size=1", "trainer.max_batches_per_epoch=101", "trainer.expert_parallel=8")
    some = block - 64 * 3 * 768 * 3072 * 7 // 8
    assert cost(spread, phases, gpu="b200", num_gpus=8).fixed[-1] == 16 * last.parameters / 8 + (3 * 2 + 4) * some
    replicas = full("trainer.batch_size=1", "trainer.max_batches_per_epoch=101", "trainer.parallel=ddp")
    assert cost(replicas, phases, gpu="b200", num_gpus=8).fixed[-1] == 16 * last.parameters + last.casts
    alone = cost(config, phases, gpu="b200", num_gpus=1)
    assert alone.per_device[-1] == last.total == 16 * last.parameters + last.casts + grows


@pytest.mark.parametrize(
    ("world", "expert_parallel", "rank"), [(4, 1, 0), (4, 4, 3), (64, 1, 0), (64, 1, 63), (64, 8, 5), (64, 64, 0)]
)
def test_a_device_holds_what_torch_shards_to_it(
    full: Callable[..., RunConfig], world: int, expert_parallel: int, rank: int
) -> None:
    """A dry run: torch shards the full profile among ranks of a process group that sends nothing, in no memory."""
    config = full(
        "trainer.batch_size=1", "trainer.max_batches_per_epoch=101", f"trainer.expert_parallel={expert_parallel}"
    )
    phase = sizes(config, on_gpu=True)[-1]
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with torch.device("meta"):
            model = build_model(config.values)
            shards = fsdp.Sharded(model, world, expert_parallel=expert_parallel, device_type="cpu")
            for switch in shards.switches().values():
                switch(True)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())  # type: ignore[attr-defined]
        experts = model.moe_layers[0].experts
        assert experts is not None
        up = experts.up
        gathered = up.shape[0] // expert_parallel
        assert up.to_local().numel() == up.numel() // world
        assert sum(p.numel() for p in model.parameters()) == phase.parameters
    finally:
        dist.destroy_process_group()
    block = phase.largest_block - (64 - gathered) * 3 * 768 * 3072
    assert device_bytes(phase, config, world) == pytest.approx(16 * held + (3 * 2 + 4) * block, rel=1e-3)


def test_what_does_not_fit_is_reported_with_the_batch_that_does(full: Callable[..., RunConfig]) -> None:
    config = full()
    phases = sizes(config, on_gpu=True)
    told = cost(config, phases, gpu="h100", num_gpus=4)
    assert not told.fits
    assert 0 < told.largest_batch < 32 / 4
    at_most, one_more = (
        full(f"trainer.batch_size={4 * batch}", "trainer.max_batches_per_epoch=101")
        for batch in (told.largest_batch, told.largest_batch + 1)
    )
    assert cost(at_most, sizes(at_most, on_gpu=True), gpu="h100", num_gpus=4).fits
    assert not cost(one_more, sizes(one_more, on_gpu=True), gpu="h100", num_gpus=4).fits
    assert cost(config, phases, gpu="rtx4090", num_gpus=1).largest_batch == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "h10", "num_gpus": 4}, r"--gpu: 'h10' is not a kind that is known\. Did you mean 'h100'"),
        ({"gpu": "tpu", "num_gpus": 4}, r"Valid names: a100, b200, h100, h200, l40s, rtx4090\."),
        ({"gpu": "h100", "num_gpus": 0}, r"--gpus: 0 .*1 or more"),
        (
            {"gpu": "h100", "num_gpus": 6},
            r"--gpus: trainer\.expert_parallel = 4 does not divide 6\. Give a multiple of 4",
        ),
        ({"gpu": "h100", "num_gpus": 4, "mfu": 40.0}, r"--mfu: 40 .*at most 1"),
    ],
)
def test_what_is_no_gpu_is_refused(small: Composed, arguments: dict[str, Any], message: str) -> None:
    config = small("schedule=none", "trainer.parallel=fsdp", "trainer.expert_parallel=4")
    with pytest.raises(ConfigError, match=message):
        cost(config, sizes(config, on_gpu=True), **arguments)


def test_fp32_has_no_time_on_a_gpu(small: Composed) -> None:
    config = small("schedule=none", "trainer.precision=fp32")
    with pytest.raises(ConfigError, match=r"trainer\.precision = fp32: .*trainer\.precision=bf16"):
        cost(config, sizes(config, on_gpu=True), gpu="h100")


def test_every_kind_names_where_its_numbers_are_from() -> None:
    assert all("NVIDIA" in gpu.source and gpu.bf16_tflops > 100 and gpu.memory_gb >= 24 for gpu in GPUS.values())


def test_the_table_shows_phases_and_the_verdict(full: Callable[..., RunConfig]) -> None:
    config = full()
    text = drawn(table(sizes(config, on_gpu=False), config, gpu="h100", num_gpus=4))
    for expected in ("10.97 B", "436.2 M", "moe align voter", "16-bit copies", "MFU of 0.4", "does not fit", "989.5"):
        assert expected in text
    assert text == drawn(table(sizes(config, on_gpu=True), config, gpu="h100", num_gpus=4))
    assert "less a device: trainer.activation_checkpointing=true, a smaller trainer.batch_size" in text
    alone = drawn(table(sizes(config, on_gpu=True), config, gpu="h100"))
    assert "less a device: more GPUs\n" in alone, "weights alone are too much"


def test_blocks_that_are_computed_again_make_room(full: Callable[..., RunConfig]) -> None:
    config = full("trainer.activation_checkpointing=true")
    phases = sizes(config, on_gpu=True)
    last = phases[-1]
    # inputs of 24 blocks, and of the embedding's 768 numbers a token what lies outside of them
    assert last.activations > 24 * 4 * 768 * 32 * 2048
    told = cost(config, phases, gpu="h100", num_gpus=8)
    kept, again, at_once = last.activations / 32, last.recomputed / 32, last.workspace
    fits = [n for n in range(1000) if told.fixed[-1] + n * kept + max(n * again, at_once) <= told.spec.usable_bytes]
    assert (
        told.largest_batch
        == fits[-1]
        > 10 * cost(full(), sizes(full(), on_gpu=True), gpu="h100", num_gpus=8).largest_batch
    )
    text = drawn(table(phases, config, gpu="h100", num_gpus=4))
    assert "a block again" in text
    assert "activation_checkpointing" not in text


def test_the_table_has_nothing_of_gpus_without_one(small: Composed) -> None:
    config = small("schedule=gpt5_moe")
    text = drawn(table(sizes(config, on_gpu=False), config))
    assert "moe align voter" in text
    assert "GPU-hours" not in text
    assert "16-bit copies" not in text


def drawn(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
