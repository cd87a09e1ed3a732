"""What two runs have in common: as many first updates as is said, to the bit, and the rows of the record."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_launch.config.run_config import RunConfig
from apt_launch.config.schema import all_keys, reach_of
from apt_model.errors import Interrupted
from apt_model.schedule.prefix import Reach, shared_updates
from tests.training.test_trainer import Run

Small = Callable[..., RunConfig]


def shared(whole: RunConfig, fork: RunConfig) -> int:
    return shared_updates(whole.course, fork.course)


CONSTANT = ("schedule=none", "trainer.lr_schedule=null")
FLAT = ("schedule=none", *(f"trainer.lr_schedule.{key}" for key in ("warmup=0", "start=1", "end=1", "by=step")))
WSD = ("schedule=none", "trainer/lr=wsd", "trainer.lr_schedule.warmup=4", "trainer.lr_schedule.cooldown=4")
ROOT = ("schedule=none", "trainer/lr=inverse_sqrt", "trainer.lr_schedule.warmup=4")
LATCHED = (
    "+schedule.events.x={enable: voter, when: {metric: train/loss, below: 1, not_before: 4st}}",
    "schedule.enable_voter_at_epoch=null",
)


GROWS = "+schedule.events.more={{grow: moe, to: 8, at: {}ep}}"


# 6 epochs of 4 updates: experts from update 8 on, alignment from 12, votes from 20
@pytest.mark.parametrize(
    ("whole", "fork", "updates"),
    [
        ([], ["schedule.route_temp.end=0.3"], 8),  # nothing routes before
        ([], ["moe.num_experts=2"], 8),
        ([], ["moe.top_k=1", "voter.num_votes=2"], 8),
        ([], ["schedule.align_weight.end=0.1"], 12),
        ([], ["align.tau=0.5"], 12),
        ([], ["schedule.vote_threshold.end=1"], 20),
        ([], ["voter.dropout=0.3"], 20),
        ([], ["schedule.enable_moe_at_epoch=1"], 4),
        ([], ["schedule.enable_voter_at_epoch=null"], 20),
        ([GROWS.format(4)], [GROWS.format(5)], 16),
        ([], ["seed=1"], 0),
        ([], ["model.d_ff=64"], 0),
        ([], ["optimizer.weight_decay=0.2"], 0),
        ([], ["optimizer.lr=1e-2"], 1),  # the first rate of a warmup is 0
        (["trainer.lr_schedule=null"], ["trainer.lr_schedule=null", "optimizer.lr=1e-2"], 0),
        ([], ["trainer.log_every=2"], 0),  # other rows
        ([], ["trainer.checkpoint_every_epochs=2", "logger.mode=offline"], 24),
        # temperatures that move give a row at the first update of an epoch, and one that stands does not
        (["schedule.route_temp.by=step"], ["schedule.route_temp.by=step", "schedule.route_temp.start=1"], 8),
        ([], ["schedule.enable_moe_at_epoch=null", "schedule.route_temp=null"], 8),
        # 24 updates at one rate, and a cooldown to 0 over the last eight
        (FLAT, [*FLAT, "+trainer.lr_schedule.cooldown=8"], 16),
        # runs of other lengths, until the shorter cools down, or to its end
        ([*WSD, "trainer.max_epochs=4"], WSD, 12),
        ([*WSD, "trainer.lr_schedule.warmup=1ep", "trainer.max_epochs=4"], WSD, 12),
        ([*WSD, "trainer.lr_schedule.warmup=2"], WSD, 1),
        ([*ROOT, "trainer.max_epochs=4"], ROOT, 16),
        (["schedule=none", "trainer/lr=cosine"], ["schedule=none", "trainer/lr=linear"], 2),  # to the peak
        # runs of other lengths, at a constant rate
        (
            ["schedule=none", "trainer.lr_schedule=null"],
            ["schedule=none", "trainer.lr_schedule=null", "trainer.max_epochs=9"],
            24,
        ),
        # a latch may act from update 4 on
        (LATCHED, [*LATCHED, "schedule.route_temp.end=0.3"], 4),
    ],
)
def test_the_first_update_that_can_differ(small: Small, whole: list[str], fork: list[str], updates: int) -> None:
    assert shared(small(*whole), small(*fork)) == updates


GROUPS_THAT_REACH_ALL = ("model", "data", "optimizer", "loss", "callbacks")


def test_keys_that_reach_every_update_are_these() -> None:
    keys = {key for key in all_keys() if reach_of(key) is Reach.ALL and not key.startswith("hydra.")}
    keys = {key for key in keys if key.split(".")[0] not in GROUPS_THAT_REACH_ALL and not key.endswith("._target_")}
    assert keys == {
        *("seed", "trainer", "profile"),
        *(f"trainer.{key}" for key in ("max_batches_per_epoch", "batch_size", "accumulate", "precision", "device")),
        *(f"trainer.{key}" for key in ("compile", "grad_clip", "validation_batches", "on_nonfinite", "parallel")),
        *(f"trainer.{key}" for key in ("expert_parallel", "activation_checkpointing", "onednn_products", "log_every")),
        *("trainer.ema", "trainer.init_from", "trainer.qk_clip"),
    }
    assert reach_of("optimizer.weight_decay") is reach_of("model.d_ff") is reach_of("nobody.knows") is Reach.ALL
    assert reach_of("optimizer.lr") is Reach.SCHEDULED


CHANGES = {
    "schedule.route_temp.end": ["0.3", "1.5"],
    "schedule.route_temp.by": ["step"],
    "schedule.moe_capacity.type": ["cosine"],
    "schedule.align_weight.end": ["0", "0.1"],
    "+schedule.align_weight.from": ["2"],
    "schedule.vote_threshold.start": ["2.5"],
    "schedule.enable_moe_at_epoch": ["1", "3", "null"],
    "schedule.enable_align_at_epoch": ["4", "null"],
    "moe.num_experts": ["2", "8"],
    "moe.top_k": ["1"],
    "moe.router": ["sigmoid"],
    "moe.jitter": ["0.2"],
    "moe.upcycling": ["noise", "drop"],
    "moe.shared_expert": ["true"],
    "moe.eval_capacity_factor": ["1.0"],
    "align.rank": ["2"],
    "align.alpha": ["0.9"],
    "voter.num_votes": ["2"],
    "optimizer.lr": ["1e-4"],
    "+trainer.lr_schedule.cooldown": ["2"],
    "trainer.max_epochs": ["7"],
    "+schedule.anneals.z": ["{target: moe.z_loss_weight, start: 0, end: 1}"],
}
one_or_two = st.lists(
    st.sampled_from(sorted(CHANGES)).flatmap(lambda key: st.sampled_from([f"{key}={value}" for value in CHANGES[key]])),
    min_size=1,
    max_size=2,
    unique_by=lambda change: change.split("=")[0],
)


def stopped(config: RunConfig, update: int) -> Run:
    run = Run(config)
    run.trainer.stop_requested = lambda: run.trainer.clock.step == update
    with suppress(Interrupted):
        run.trainer.fit()
    assert run.trainer.clock.step == update
    return run


@settings(
    max_examples=int(os.environ.get("APT_EXAMPLES", "60")) // 10,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mine=one_or_two, other=one_or_two)
def test_whatever_two_runs_differ_in_their_weights_are_equal_as_long_as_is_said(
    small: Small, mine: list[str], other: list[str]
) -> None:
    base = ("model.dropout=0.1", "schedule.enable_voter_at_epoch=4")
    whole, fork = small(*base, *mine), small(*base, *other)
    updates = shared(whole, fork)
    if updates == 0:
        return
    one, two = stopped(whole, updates), stopped(fork, updates)
    weights = two.weights()
    for name, weight in one.weights().items():
        assert name in weights
        if weight.dim():  # what is one number is written anew at each update
            assert torch.equal(weight, weights[name]), name
    rows = {row["step"]: row for row in one.told() if "train/loss" in row}
    for row in two.told():
        if "train/loss" in row:
            mean = {name: value for name, value in row.items() if not name.startswith("schedule/")}
            assert mean == {name: rows[row["step"]][name] for name in mean}
