from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_launch.config.run_config import RunConfig
from apt_launch.runs.build import build_trainer
from apt_model.data.batches import Batches
from apt_model.errors import CallbackError, ConfigError, HorizonError, Interrupted, NonFiniteError
from apt_model.ignored import IGNORED
from apt_model.schedule import Clock
from apt_model.training.callbacks import Callback
from apt_model.training.checkpoint import Checkpoints, newest_intact
from apt_model.training.profiling import Profile
from apt_model.training.trainer import Trainer

Small = Callable[..., RunConfig]


class Run:
    """A trained configuration and what it logged."""

    def __init__(self, config: RunConfig, **options) -> None:
        self.rows: list[dict[str, float]] = []
        self.trainer: Trainer = build_trainer(config, log=self.rows.append, **options)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.trainer.model.state_dict()

    def told(self) -> list[dict[str, float]]:
        """The rows without what differs between equal runs."""
        return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in self.rows]


class Watch(Callback):
    """Reads what the model really has during each update."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.temperatures: list[float] = []
        self.alignments: list[float] = []
        self.on: list[tuple[bool, bool, bool]] = []
        self.clocks: list[Clock] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.events.append("train")

    def on_epoch_begin(self, trainer: Trainer) -> None:
        self.events.append("epoch")

    def on_batch_begin(self, trainer: Trainer) -> None:
        self.events.append("batch")

    def on_batch_end(self, trainer: Trainer) -> None:
        self.events.append("/batch")

    def on_step(self, trainer: Trainer) -> None:
        self.events.append("step")
        model = trainer.model
        self.clocks.append(trainer.clock)
        self.temperatures.append(model.moe_layers[-1].temperature.item())
        self.alignments.append(model.align.weight.item())
        self.on.append((model.moe_layers[0].enabled, model.align.enabled, model.voter.enabled))

    def on_epoch_end(self, trainer: Trainer) -> None:
        self.events.append("/epoch")

    def on_train_end(self, trainer: Trainer) -> None:
        self.events.append("/train")


def test_values_and_switches_are_in_force_during_their_update_and_logged_at_it(small: Small) -> None:
    watch = Watch()
    run = Run(small("schedule.align_weight.warmup=4"), callbacks=[watch])
    run.trainer.fit()

    per_epoch = [1.5, 1.36, 1.22, 1.08, 0.94, 0.8]
    assert watch.temperatures == pytest.approx([value for value in per_epoch for _ in range(4)])
    assert watch.alignments == pytest.approx([0.0] * 4 + [0.3 * k / 19 for k in range(20)])
    assert watch.on == [(step >= 8, step >= 12, step >= 20) for step in range(24)]
    assert watch.clocks == [Clock(epoch=step // 4, step=step, sample=2 * step, token=32 * step) for step in range(24)]

    train = {row["step"]: row for row in run.rows if "train/loss" in row}
    for step, row in train.items():
        assert row["schedule/route_temp"] == pytest.approx(watch.temperatures[step])
        assert row["schedule/align_weight"] == pytest.approx(watch.alignments[step])
        assert row["schedule/moe_enabled"] == float(step >= 8)
        assert row["epoch"] == step // 4
        assert row["tokens"] == 32 * (step + 1)
        assert ("moe/balance_loss" in row) == (step >= 8)
        assert ("align/loss" in row) == (step >= 12)
        assert ("voter/entropy" in row) == (step >= 20)
    assert set(train) == {0, 3, *range(4, 24)}
    assert [row["step"] for row in run.rows if "val/loss" in row] == [3, 7, 11, 15, 19, 23]


def test_events_come_in_their_order(small: Small) -> None:
    watch = Watch()
    config = small("schedule=none", "trainer.max_epochs=1", "trainer.max_batches_per_epoch=3", "trainer.accumulate=2")
    Run(config, callbacks=[watch]).trainer.fit()
    update = ["batch", "/batch"]
    assert watch.events == ["train", "epoch", *update, *update, "step", *update, "step", "/epoch", "/train"]


def test_the_clock_counts_updates_and_not_batches(small: Small) -> None:
    watch = Watch()
    run = Run(small("trainer.max_batches_per_epoch=5", "trainer.accumulate=2"), callbacks=[watch])
    run.trainer.fit()
    assert run.trainer.schedule.planned.steps == 18
    assert [clock.step for clock in watch.clocks] == list(range(18))
    assert [clock.sample for clock in watch.clocks[:4]] == [0, 4, 8, 10]  # the epoch's last update has one batch
    assert watch.alignments[-1] == pytest.approx(0.3)
    assert watch.temperatures[-1] == pytest.approx(0.8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_that_are_computed_again_train_to_the_same_weights(small: Small, precision: str) -> None:
    given = ("model.dropout=0.1", "moe.jitter=0.1", "moe.router=sigmoid", f"trainer.precision={precision}")
    plain = Run(small(*given))
    plain.trainer.fit()
    config = small(*given, "trainer.activation_checkpointing=true")
    again = Run(config)
    calls = []
    again.trainer.model.blocks[1].attention.register_forward_hook(lambda *_: calls.append(again.trainer.clock.step))
    again.trainer.fit()
    assert calls.count(0) == 2, "forward, and again"
    assert again.told() == plain.told()
    for name, weight in plain.weights().items():
        assert torch.equal(weight, again.weights()[name]), name
    assert config.identity == small(*given).identity


def test_accumulating_batches_equals_one_larger_batch(small: Small) -> None:
    plain = ("schedule=none", "trainer.max_epochs=2", "trainer.grad_clip=null", "trainer.lr_schedule.warmup=0")
    one = Run(small(*plain, "trainer.batch_size=4", "trainer.max_batches_per_epoch=2"))
    two = Run(small(*plain, "trainer.batch_size=2", "trainer.max_batches_per_epoch=4", "trainer.accumulate=2"))
    one.trainer.fit()
    two.trainer.fit()
    for name, weight in one.weights().items():
        assert torch.allclose(weight, two.weights()[name], atol=1e-5), name


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_experts_are_balanced_over_the_batches_of_an_update_as_over_one_larger_batch(small: Small, router: str) -> None:
    given = (*ROUTED, "trainer.grad_clip=null", "moe.balance_scope=global", f"moe.router={router}")
    given += ("moe.balance_loss_weight=1", "moe.upcycling=noise", "moe.bias_update_rate=0.05", "trainer.max_epochs=3")
    larger = ("trainer.batch_size=4", "trainer.max_batches_per_epoch=2")
    shares = ("trainer.batch_size=2", "trainer.max_batches_per_epoch=4", "trainer.accumulate=2")
    runs = []
    for more in (larger, shares, (*larger, "moe.balance_scope=micro")):
        runs.append(Run(small(*given, *more)))
        runs[-1].trainer.fit()
    one, two, micro = runs
    for name in ("train/loss", "train/auxiliary_loss", "moe/balance_loss", "moe/layer_01/balance_loss"):
        assert two.rows[0][name] == pytest.approx(one.rows[0][name], rel=1e-5), name
    for name, weight in one.weights().items():
        assert torch.allclose(weight, two.weights()[name], atol=2e-5), name
        assert torch.allclose(weight, micro.weights()[name], atol=2e-5), (
            "of one batch there is nothing else to balance over"
        )
    if router == "sigmoid":
        bias = two.weights()["blocks.0.ffn.router.bias"]
        assert torch.allclose(bias, (bias / 0.05).round() * 0.05), "so many whole steps"
        assert bias.abs().max() <= 0.05 * 6 + 1e-6, "one an update at the most"


class Masked(Batches):
    """Leaves out some targets, of each sequence another number."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.masked = True

    def epoch(self, epoch: int, **where: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for tokens, targets in super().epoch(epoch, **where):
            left_out = torch.arange(tokens.shape[1]) < tokens[:, :1] % 13
            yield tokens, targets.masked_fill(left_out, IGNORED)


def test_each_target_counts_the_same_however_many_its_batch_has(small: Small) -> None:
    runs = []
    given = (*ROUTED, "moe.balance_scope=global", "moe.balance_loss_weight=1", "trainer.grad_clip=null")
    for more in (
        ("trainer.batch_size=4", "trainer.max_batches_per_epoch=2"),
        ("trainer.batch_size=1", "trainer.max_batches_per_epoch=8", "trainer.accumulate=4"),
    ):
        run = Run(small(*given, *more, "trainer.log_every=1"))
        run.trainer.train_batches = Masked(run.trainer.train_batches.tokens, run.trainer.train_batches.sampler)
        run.trainer.fit()
        runs.append(run)
    one, many = runs
    whole, parts = ([row for row in run.rows if "train/loss" in row] for run in runs)
    for name in (
        "train/loss",
        "train/auxiliary_loss",
        "train/grad_norm",
        "moe/balance_loss",
        "moe/load_entropy",
        "tokens",
    ):
        assert [row[name] for row in parts] == pytest.approx([row[name] for row in whole], rel=1e-4), name
    for name, weight in one.weights().items():
        assert torch.allclose(weight, many.weights()[name], atol=2e-5), name


def test_slots_of_an_update_are_those_that_its_batches_then_have(small: Small) -> None:
    draws = ("moe.jitter=0.3", "model.dropout=0.2", "trainer.accumulate=2", "trainer.max_epochs=1")
    trainer = Run(small(*ROUTED, "moe.balance_scope=global", *draws, "trainer.activation_checkpointing=true")).trainer
    trainer.fit()
    counts = torch.stack(trainer.meter._routing).sum(dim=0)[:, -4:]  # of the last update
    for layer, found in zip(trainer.model.moe_layers, counts, strict=True):
        assert found.sum() == 2 * 2 * 2 * 16, "two batches of two sequences of 16 tokens, at two experts each"
        assert torch.equal(layer.load * found.sum(), found)
        assert torch.equal(layer.counts.float(), found), "a pass that is computed again is not counted again"


ROUTED = ("schedule=none", "schedule.enable_moe_at_epoch=0", "trainer.max_epochs=2", "moe.capacity_factor=null")


def test_routing_is_reported_of_all_batches_of_an_update(small: Small) -> None:
    one = Run(small(*ROUTED, "trainer.batch_size=4", "trainer.max_batches_per_epoch=2"))
    one.trainer.fit()
    two = Run(small(*ROUTED, "trainer.batch_size=2", "trainer.max_batches_per_epoch=4", "trainer.accumulate=2"))
    two.trainer.fit()
    whole, added = one.rows[0], two.rows[0]
    names = [name for name in whole if name.startswith("moe/") and not name.endswith("balance_loss")]
    assert len(names) == 10 * 3
    assert [added[name] for name in names] == pytest.approx([whole[name] for name in names], abs=1e-4)


def test_a_row_that_is_there_for_an_anneal_reports_no_single_layer(small: Small) -> None:
    run = Run(small("schedule.enable_moe_at_epoch=1"))
    run.trainer.fit()
    rows = {row["step"]: row for row in run.rows if "train/loss" in row}
    of_layers = {step for step, row in rows.items() if "moe/layer_01/max_load" in row}
    assert {step for step, row in rows.items() if "moe/max_load" in row} == set(range(4, 24))  # align_weight moves
    switches, last = {4, 12, 20}, {7, 11, 15, 19, 23}
    assert of_layers == switches | last | {step for step in range(4, 24) if step % 3 == 0}


@pytest.mark.parametrize("watched", [False, True])
def test_the_model_reports_routing_only_where_somebody_reads_it(small: Small, watched: bool) -> None:
    asked: list[bool] = []
    latch = "+schedule.events.x={enable: voter, when: {metric: moe/layer_01/max_load, above: 99, deadline: 5ep}}"
    more = (latch, "trainer.max_epochs=6") if watched else ()
    run = Run(small(*ROUTED, "trainer.accumulate=2", "trainer.max_batches_per_epoch=10", *more))
    run.trainer.model.register_forward_hook(lambda model, given, output: asked.append(output.routing is not None))
    run.trainer.fit()
    updates = 5 * (6 if watched else 2)
    logged = {row["step"] for row in run.rows if "train/loss" in row}
    assert {row["step"] for row in run.rows if "moe/layer_01/max_load" in row} == logged < set(range(updates))
    told = [step in logged or watched for step in range(updates) for _ in range(2)]
    for epoch in range(updates // 5):  # after the ten batches of an epoch, validation has two
        told[12 * epoch + 10 : 12 * epoch + 10] = [False, False]
    assert asked == told


def test_the_learning_rate_warms_up_and_falls_to_its_end(small: Small) -> None:
    config = small(
        "schedule=none", "trainer.log_every=1", "trainer.lr_schedule.warmup=4", "trainer.lr_schedule.type=linear"
    )
    run = Run(config)
    run.trainer.fit()
    rates = [row["lr"] for row in run.rows if "lr" in row]
    assert rates[:5] == pytest.approx([0.0, 0.0005, 0.001, 0.0015, 0.002])
    assert rates[-1] == pytest.approx(0.0002)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(small: Small) -> None:
    told = []
    for seed in (0, 0, 1):
        run = Run(small(f"seed={seed}"))
        run.trainer.fit()
        told.append(run.told())
    assert told[0] == told[1] != told[2]


def test_the_loss_falls(small: Small) -> None:
    run = Run(small("trainer.max_batches_per_epoch=20", "optimizer.lr=0.01"))
    run.trainer.fit()
    losses = [row["val/loss"] for row in run.rows if "val/loss" in row]
    assert losses[-1] < losses[0] - 0.5


def test_mixed_precision_keeps_weights_in_float32(small: Small) -> None:
    run = Run(small("trainer.precision=bf16"))
    run.trainer.fit()
    assert all(weight.dtype == torch.float32 for weight in run.weights().values())
    assert run.rows[-1]["val/loss"] < run.rows[0]["train/loss"]


FINE = ("moe.num_experts=8", "moe.top_k=4", "moe.granularity=2", "moe.upcycling=drop", "moe.jitter=0.1")
GROWING = ("+schedule.events.more={grow: moe, to: 16, at: 13st}",)


@pytest.fixture(scope="module")
def wholes() -> dict[tuple[str, ...], Run]:
    """Runs that nothing interrupts, by their options: each is trained once."""
    return {}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("trainer.accumulate=2", "trainer.max_batches_per_epoch=5"),
        (
            *FINE,
            *GROWING,
            "moe.router=sigmoid",
            "moe.bias_update_rate=0.01",
        ),  # all about experts that draws or remembers
        pytest.param(("trainer.device=cuda", "moe.upcycling=drop", "moe.jitter=0.1"), marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("stop_after", [1, 4, 8, 9, 13, 17, 18])
def test_a_resume_ends_in_the_same_weights_and_rows(
    small: Small, tmp_path: Path, wholes: dict[tuple[str, ...], Run], stop_after: int, options: tuple[str, ...]
) -> None:
    config = small(*options)
    if options not in wholes:
        wholes[options] = Run(config)
        wholes[options].trainer.fit()
    whole = wholes[options]

    folder = tmp_path / "checkpoints"
    before = Run(config, checkpoints=Checkpoints(folder))
    before.trainer.stop_requested = lambda: before.trainer.clock.step >= stop_after
    with pytest.raises(Interrupted):
        before.trainer.fit()

    checkpoint, _ = newest_intact(folder)
    after = Run(config, resume=checkpoint)
    after.trainer.fit()
    for name, weight in whole.weights().items():
        assert torch.equal(weight, after.weights()[name]), name
    assert before.told() + after.told() == whole.told()


def test_a_latch_watches_the_entropy_while_the_voter_is_off_and_survives_a_resume(small: Small, tmp_path: Path) -> None:
    config = small(
        "schedule.enable_voter_at_epoch=null",
        "trainer.log_every=1",
        "optimizer.lr=0.02",
        "+schedule.events.vote={enable: voter, when: {metric: voter/entropy, below: 4.6, smooth: 0.5, not_before: 2ep}}",
    )
    whole = Run(config)
    whole.trainer.fit()
    train = [row for row in whole.rows if "train/loss" in row]
    smoothed, expected = None, None
    for row in train:
        if expected is None and smoothed is not None and smoothed < 4.6 and row["epoch"] >= 2:
            expected = row["step"]
        smoothed = row["voter/entropy"] if smoothed is None else 0.5 * smoothed + 0.5 * row["voter/entropy"]
    assert expected is not None
    assert 8 < expected < 23, "the latch decides, not its bounds"
    assert [row["step"] for row in train if row["schedule/voter_enabled"]] == list(range(int(expected), 24))

    before = Run(config, checkpoints=Checkpoints(tmp_path))
    before.trainer.stop_requested = lambda: before.trainer.clock.step >= expected - 1
    with pytest.raises(Interrupted):
        before.trainer.fit()
    after = Run(config, resume=newest_intact(tmp_path)[0])
    after.trainer.fit()
    assert before.told() + after.told() == whole.told()


def test_frozen_parameters_stay_and_experts_that_appear_are_frozen_with_them(small: Small) -> None:
    class Snapshots(Callback):
        def __init__(self) -> None:
            self.embedding: list[torch.Tensor] = []
            self.experts: list[torch.Tensor] = []

        def on_step(self, trainer: Trainer) -> None:
            self.embedding.append(trainer.model.embedding.weight.detach().clone())
            layer = trainer.model.moe_layers[0]
            self.experts.append(layer.experts.up.detach().clone() if layer.enabled else torch.zeros(()))

    seen = Snapshots()
    config = small(
        "+schedule.events.f={freeze: embedding, at: 2ep}",
        "+schedule.events.u={unfreeze: embedding, at: embedding.frozen + 1ep}",
        "+schedule.events.g={freeze: blocks.*.ffn, at: 1ep}",
    )
    run = Run(config, callbacks=[seen])
    run.trainer.fit()
    moved = [not torch.equal(a, b) for a, b in pairwise(seen.embedding)]
    assert [step + 1 for step, m in enumerate(moved) if not m] == [8, 9, 10, 11]
    assert all(torch.equal(seen.experts[8], later) for later in seen.experts[9:])
    assert [row["step"] for row in run.rows if row.get("schedule/embedding_frozen") and "lr" in row] == [8, 9, 10, 11]


@pytest.mark.parametrize("stop_after", [5, 8, 12, 18])
def test_a_part_of_a_frozen_whole_trains_again_and_a_resume_is_exact(
    small: Small, tmp_path: Path, stop_after: int
) -> None:
    class Moved(Callback):
        def __init__(self) -> None:
            self.weights: list[tuple[torch.Tensor, ...]] = []

        def on_step(self, trainer: Trainer) -> None:
            self.weights.append(tuple(b.attention.qkv.weight.detach().clone() for b in trainer.model.blocks))

        def still(self, block: int) -> list[int]:
            """The updates that left the weights of a block alone."""
            pairs = enumerate(pairwise(weights[block] for weights in self.weights))
            return [step + 1 for step, (before, after) in pairs if torch.equal(before, after)]

    config = small(
        "schedule=none",
        "schedule.enable_voter_at_step=15",
        "+schedule.events.a={freeze: blocks, at: 1ep}",
        "+schedule.events.b={freeze: blocks.1, at: 1ep}",
        "+schedule.events.c={unfreeze: blocks.1, at: 2ep}",
    )
    moved = Moved()
    whole = Run(config, callbacks=[moved])
    whole.trainer.fit()
    assert moved.still(0) == [*range(4, 24)]
    assert moved.still(1) == [4, 5, 6, 7]

    before = Run(config, checkpoints=Checkpoints(tmp_path))
    before.trainer.stop_requested = lambda: before.trainer.clock.step >= stop_after
    with pytest.raises(Interrupted):
        before.trainer.fit()
    after = Run(config, resume=newest_intact(tmp_path)[0])
    after.trainer.fit()
    assert all(torch.equal(weight, after.weights()[name]) for name, weight in whole.weights().items())
    assert before.told() + after.told() == whole.told()


def test_a_curriculum_can_write_the_learning_rate_and_any_layer(small: Small) -> None:
    config = small(
        "schedule=none",
        "trainer.lr_schedule=null",
        "trainer.log_every=1",
        "+schedule.anneals.lr={target: optimizer.lr, start: 0.01, end: 0.001, by: step, type: exponential}",
        "+schedule.anneals.wd={target: optimizer.weight_decay, start: 0.1, end: 0.0, by: epoch}",
        "+schedule.anneals.drop={target: blocks.1.ffn.dropout, start: 0.5, end: 0.0, by: token}",
    )
    run = Run(config)
    run.trainer.fit()
    train = [row for row in run.rows if "train/loss" in row]
    assert [row["lr"] for row in train] == pytest.approx([0.01 * 0.1 ** (k / 23) for k in range(24)])
    assert [row["schedule/drop"] for row in train] == pytest.approx([0.5 * (1 - k / 23) for k in range(24)])
    assert run.trainer.optimizer.param_groups[0]["weight_decay"] == 0.0
    assert run.trainer.optimizer.param_groups[1]["weight_decay"] == 0.0
    assert run.trainer.model.moe_layers[1].dropout.item() == 0.0


def test_a_resume_of_a_finished_run_trains_no_more(small: Small, tmp_path: Path) -> None:
    config = small()
    first = Run(config, checkpoints=Checkpoints(tmp_path))
    first.trainer.fit()
    again = Run(config, resume=newest_intact(tmp_path)[0])
    again.trainer.fit()
    assert again.rows == []
    assert again.trainer.clock == first.trainer.clock


def test_a_resume_with_an_edited_schedule_is_brought_to_what_the_clock_says(small: Small, tmp_path: Path) -> None:
    grown = "+schedule.events.more={grow: moe, to: 8, at: 5st}"
    first = Run(small("schedule.enable_moe_at_epoch=1", grown), checkpoints=Checkpoints(tmp_path))
    first.trainer.stop_requested = lambda: first.trainer.clock.step == 6
    with pytest.raises(Interrupted):
        first.trainer.fit()
    assert first.trainer.model.moe_layers[0].enabled
    assert first.weights()["blocks.0.ffn.experts.up"].shape[0] == 8
    watch = Watch()
    after = Run(small("schedule.enable_moe_at_epoch=2"), resume=newest_intact(tmp_path)[0], callbacks=[watch])
    after.trainer.fit()
    assert [on[0] for on in watch.on] == [False, False] + [True] * 16
    assert after.weights()["blocks.0.ffn.experts.up"].shape[0] == 4


def test_seeds_share_the_split_and_the_batches_that_validate(composed: Small) -> None:
    given = (
        "trainer.device=cpu",
        "trainer.max_batches_per_epoch=2",
        "trainer.validation_batches=2",
        "model.d_model=16",
    )
    first, second = (Run(composed(*given, f"seed={seed}")).trainer for seed in (0, 1))
    for batches, same in (("val_batches", True), ("train_batches", False)):
        one, other = getattr(first, batches), getattr(second, batches)
        assert (one.tokens.array() == other.tokens.array()).all()
        assert (one.sampler.windows(0) == other.sampler.windows(0)).all() == same


def test_a_longer_run_needs_a_word(small: Small, tmp_path: Path) -> None:
    first = Run(small(), checkpoints=Checkpoints(tmp_path))
    first.trainer.fit()
    checkpoint = newest_intact(tmp_path)[0]
    longer = Run(small("trainer.max_epochs=7"), resume=checkpoint)
    with pytest.raises(ConfigError, match=r"6 epochs x 4 updates = 24 steps.*7 epochs x 4 updates = 28 steps"):
        longer.trainer.fit()
    kept = Run(small("trainer.max_epochs=7", "schedule.on_horizon_change=keep_absolute"), resume=checkpoint)
    kept.trainer.fit()
    assert kept.trainer.clock.step == 28
    assert kept.rows[-1]["schedule/route_temp"] == 0.8


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # from 1 down to 0 over 4 epochs x 4 updates: the last of 16 has 0, and it stays
        ("keep_absolute", [1 - step / 15 for step in range(16)] + [0.0] * 8),
        # the first 8 as they were, then over 6 epochs x 4 updates
        ("rescale", [1 - step / 15 for step in range(8)] + [1 - step / 23 for step in range(8, 24)]),
    ],
)
def test_a_longer_run_does_with_the_learning_rate_what_it_does_with_the_curriculum(
    small: Small, tmp_path: Path, policy: str, expected: list[float]
) -> None:
    given = (
        "schedule=none",
        "optimizer.lr=0.01",
        "trainer.lr_schedule={start: 1.0, end: 0.0, by: step, type: linear, warmup: 0}",
        "+schedule.anneals={smooth: {target: label_smoothing, start: 0.5, end: 0.0, by: step}}",
        "trainer.log_every=1",
    )
    first = Run(small(*given, "trainer.max_epochs=4"), checkpoints=Checkpoints(tmp_path))
    first.trainer.stop_requested = lambda: first.trainer.clock.step == 8
    with pytest.raises(Interrupted):
        first.trainer.fit()
    config = small(*given, "trainer.max_epochs=6", f"schedule.on_horizon_change={policy}")
    after = Run(config, resume=newest_intact(tmp_path)[0])
    after.trainer.fit()
    rows = [row for row in first.rows + after.rows if "lr" in row]
    assert [row["step"] for row in rows] == list(range(24))
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * factor for factor in expected], abs=1e-12)
    assert [row["schedule/smooth"] for row in rows] == pytest.approx([0.5 * factor for factor in expected], abs=1e-12)


class Fails(Callback):
    def __init__(self, event: str, step: int) -> None:
        setattr(self, event, self.fail)
        self.step = step

    def fail(self, trainer: Trainer, *details: object) -> None:
        if trainer.clock.step >= self.step:
            raise KeyError("oops")


@pytest.mark.parametrize("event", ["on_step", "on_batch_begin", "on_batch_end", "on_schedule", "on_epoch_end"])
def test_a_callback_that_raises_stops_the_run_with_its_name_and_the_clock(small: Small, event: str) -> None:
    run = Run(small(), callbacks=[Fails(event, step=5)])
    with pytest.raises(CallbackError, match=rf"callback Fails\.{event} failed at epoch 1, step \d: KeyError: 'oops'"):
        run.trainer.fit()


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(small: Small) -> None:
    class Poison(Callback):
        def on_batch_begin(self, trainer: Trainer) -> None:
            if trainer.clock.step == 5:
                with torch.no_grad():
                    trainer.model.norm.weight.fill_(float("nan"))

    run = Run(small(), callbacks=[Poison()])
    with pytest.raises(NonFiniteError, match=r"the loss is nan at epoch 1, step 5"):
        run.trainer.fit()
    assert run.rows[-1]["step"] == 4


def test_a_gradient_that_is_no_number_stops_the_run_before_the_update(small: Small) -> None:
    class Poison(Callback):
        def on_batch_end(self, trainer: Trainer) -> None:
            if trainer.clock.step == 2:
                trainer.model.norm.weight.grad[0] = float("inf")

    run = Run(small(), callbacks=[Poison()])
    with pytest.raises(NonFiniteError, match=r"the gradient's norm is inf at epoch 0, step 2"):
        run.trainer.fit()
    assert all(torch.isfinite(weight).all() for weight in run.weights().values())


def test_updates_that_do_not_fit_the_plan_stop_the_run(small: Small) -> None:
    run = Run(small())
    run.trainer.train_batches.sampler.num_batches = 3
    with pytest.raises(HorizonError, match=r"epoch 0 had 3 updates and 0 skipped ones, but 4 were planned"):
        run.trainer.fit()


def test_an_update_that_mixed_precision_skips_is_not_counted(
    small: Small, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(small("schedule=none", "trainer.max_epochs=2"))
    scales = iter([1.0, 0.5] + [0.5] * 100)  # torch's scaler halves its scale when it skips an update
    monkeypatch.setattr(run.trainer.scaler, "get_scale", lambda: next(scales))
    run.trainer.fit()
    assert run.trainer.clock.step == 7
    assert "1 of 4 updates were skipped" in caplog.text


def test_validation_does_not_touch_training(small: Small) -> None:
    class Validates(Callback):
        def on_step(self, trainer: Trainer) -> None:
            trainer.validate()

    plain = Run(small())
    plain.trainer.fit()
    validating = Run(small(), callbacks=[Validates()])
    validating.trainer.fit()
    for name, weight in plain.weights().items():
        assert torch.equal(weight, validating.weights()[name])


def test_devices_and_precisions_that_are_not_there_are_reported(small: Small) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ConfigError, match=r"trainer\.device: 'cuda' was asked for.*trainer\.device=cpu"):
        Run(small("trainer.device=cuda"))
    with pytest.raises(ConfigError, match=r"trainer\.precision: fp16 needs a CUDA device.*bf16"):
        Run(small("trainer.precision=fp16"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_curriculum_trains_on_cuda(small: Small, precision: str) -> None:
    run = Run(small("trainer.device=cuda", f"trainer.precision={precision}"))
    run.trainer.fit()
    assert run.rows[-1]["val/loss"] < run.rows[0]["train/loss"]


def test_norms_of_parts_make_the_norm_of_the_gradient(small: Small) -> None:
    run = Run(small("schedule=none", "schedule.enable_moe_at_epoch=1", "trainer.log_every=1", "trainer.max_epochs=2"))
    run.trainer.fit()
    rows = [{k.rpartition("/")[2]: v for k, v in row.items() if "grad_norm/" in k} for row in run.rows]
    begun, last = rows[0], next(row for row in reversed(rows) if row)
    assert begun.keys() == {"attention", "feed_forward", "embedding", "other"}
    assert last.keys() == {"attention", "experts", "router", "embedding", "other"}
    for parts, row in zip(rows, run.rows, strict=True):
        if parts:
            assert sum(norm**2 for norm in parts.values()) ** 0.5 == pytest.approx(row["train/grad_norm"], rel=1e-5)


def test_logits_of_attention_stay_below_the_limit_through_a_resume(small: Small, tmp_path: Path) -> None:
    given = (
        "schedule=none",
        "trainer.qk_clip=0.002",
        "trainer.log_every=1",
        "trainer.max_epochs=2",
        "trainer.accumulate=2",
    )
    config = small(*given, "optimizer.lr=0.01")
    whole = Run(config)
    whole.trainer.fit()
    before = Run(config, checkpoints=Checkpoints(tmp_path))
    before.trainer.stop_requested = lambda: before.trainer.clock.step >= 2
    with pytest.raises(Interrupted):
        before.trainer.fit()
    checkpoint, _ = newest_intact(tmp_path)
    after = Run(config, resume=checkpoint)
    after.trainer.fit()
    assert before.told() + after.told() == whole.told()
    free = Run(small(*given, "optimizer.lr=0.01", "trainer.qk_clip=1e9"))
    free.trainer.fit()
    found = [[row["train/max_attention_logit"] for row in run.rows if "train/loss" in row] for run in (whole, free)]
    assert found[0][0] == found[1][0] > 0.002, "the first update begins with equal weights"
    assert found[0][-1] < found[1][-1]


@pytest.mark.parametrize("stop", [None, 2])
def test_a_trace_of_some_updates_changes_nothing_and_goes_on_after_a_resume(
    small: Small, tmp_path: Path, stop: int | None
) -> None:
    config = small("schedule=none", "trainer.max_epochs=1")
    plain = Run(config)
    plain.trainer.fit()
    traced = Run(config, callbacks=[Profile(tmp_path / "a", at=1, steps=2)], checkpoints=Checkpoints(tmp_path / "c"))
    told = []
    if stop is not None:
        traced.trainer.stop_requested = lambda: traced.trainer.clock.step >= stop
        with pytest.raises(Interrupted):
            traced.trainer.fit()
        told = traced.told()
        checkpoint, _ = newest_intact(tmp_path / "c")
        traced = Run(config, callbacks=[Profile(tmp_path / "a", at=1, steps=2)], resume=checkpoint)
    traced.trainer.fit()
    assert told + traced.told() == plain.told()
    files = {path.name: json.loads(gzip.decompress(path.read_bytes())) for path in (tmp_path / "a").iterdir()}
    steps = [1] if stop is None else [1, 2]
    assert sorted(files) == [f"step-{step:08d}.json.gz" for step in steps]
    for trace in files.values():
        assert any("embedding" in event.get("name", "") for event in trace["traceEvents"])
