"""The callback alone, in transformers' own trainer with models of other people."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apt_model.errors import ConfigError, HorizonError
from apt_model.schedule import Clock, Horizon, ScheduleRunner
from tests.integrations.curriculum import CURRICULUM, runner
from tests.late import Late

own = Late("tests.integrations.of_transformers")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the library's own


def test_a_plain_model_goes_through_the_curriculum_update_by_update(tmp_path: Path) -> None:
    model, _ = own.trained(tmp_path)
    seen = model.seen
    clocks = [clock for clock, *_ in seen]
    assert [clock.step for clock in clocks] == [3 * e + b // 2 for e in range(4) for b in range(5)]
    assert [clock.epoch for clock in clocks] == [e for e in range(4) for _ in range(5)]
    assert [clock.sample for clock in clocks[:6]] == [0, 0, 4, 4, 8, 10]  # the epoch's last update has one batch
    assert [clock.token for clock in clocks[:6]] == [0, 0, 24, 24, 48, 60]
    assert [temperature for _, temperature, *_ in seen] == [[2.0, 1.5, 1.0, 0.5][clock.epoch] for clock in clocks]
    assert [weight for _, _, weight, *_ in seen] == pytest.approx([0.8 * clock.step / 11 for clock in clocks])
    assert [on for *_, on, _ in seen] == [clock.epoch >= 1 for clock in clocks]
    assert [on for *_, on in seen] == [clock.step >= 5 for clock in clocks]


def test_the_optimizer_follows_the_model_and_keeps_moments(tmp_path: Path) -> None:
    model, trainer = own.trained(tmp_path)
    optimizer = trainer.optimizer
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    experts = model.net.moe_layers[0].experts
    assert experts is not None
    assert optimizer.state[experts.up]["step"] == 12  # those of the dense layer among them


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resume_from_a_checkpoint_of_the_library_equals_an_uninterrupted_run(tmp_path: Path, epochs: int) -> None:
    whole, _ = own.trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{3 * epochs}"

    model = own.Plain()
    model.callback = own.ScheduleCallback(runner())
    trainer = own.made(model, model.callback, tmp_path / "again")
    model.callback.restore(checkpoint, model)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert model.seen == whole.seen[5 * epochs :]
    for name, weight in whole.state_dict().items():
        assert torch.allclose(weight, model.state_dict()[name], atol=1e-6), name
    assert whole.callback is not None
    assert model.callback.driver.state_dict() == whole.callback.driver.state_dict()


def test_a_resume_without_the_state_is_refused(tmp_path: Path) -> None:
    own.trained(tmp_path)
    model = own.Plain()
    model.callback = own.ScheduleCallback(runner())
    trainer = own.made(model, model.callback, tmp_path)
    with pytest.raises(ConfigError, match=r"Call ScheduleCallback\.restore\(checkpoint, model\) before trainer\.train"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ConfigError, match=r"nowhere is no checkpoint"):
        model.callback.restore(tmp_path / "nowhere", model)


def test_a_resume_over_another_length_needs_a_word(tmp_path: Path) -> None:
    own.trained(tmp_path)
    longer = own.ScheduleCallback(ScheduleRunner(horizon=Horizon(epochs=5, updates_per_epoch=3), **CURRICULUM))
    with pytest.raises(ConfigError, match=r"4 epochs x 3 updates = 12 steps.*5 epochs"):
        longer.restore(tmp_path / "checkpoint-6", own.Plain())


@pytest.mark.parametrize("metric", ["train/loss", "batches", "val/loss", "eval_loss", "lr"])
def test_latches_see_what_there_is_and_once(tmp_path: Path, metric: str) -> None:
    schedule = runner(events={"x": {"enable": "voter", "when": {"metric": metric, "below": -1.0}}})
    told: list[float] = []
    schedule.observe = lambda metrics: told.extend([metrics[metric]] if metric in metrics else [])  # type: ignore[method-assign]
    own.trained(tmp_path, schedule, eval_strategy="epoch", logging_strategy="epoch", save_strategy="no")
    if metric == "batches":
        assert told == [5 * e + b for e in range(4) for b in (2, 4, 5)]
    else:
        assert len(told) == (12 if metric == "train/loss" else 4)
        assert all(0.0 <= value < 6.0 for value in told)


def test_a_latch_turns_a_module_on_at_the_next_update(tmp_path: Path) -> None:
    schedule = runner(events={"x": {"enable": "align", "when": {"metric": "batches", "above": 4.5}}})
    model, _ = own.trained(tmp_path, schedule)
    assert [on for *_, on in model.seen] == [clock.step >= 3 for clock, *_ in model.seen]


def test_setters_and_switches_may_be_given(tmp_path: Path) -> None:
    model = own.Dial()
    schedule = ScheduleRunner(
        horizon=Horizon(epochs=2, updates_per_epoch=2),
        anneals={"s": {"target": "strength", "start": 4.0, "end": 1.0, "by": "step"}},
        enable_moe_at_step=3,
    )
    callback = own.ScheduleCallback(
        schedule,
        values={"strength": partial(setattr, model, "strength")},
        switches={"moe": partial(setattr, model, "on")},
    )
    trainer = own.made(model, callback, tmp_path, num_train_epochs=2, save_strategy="no")
    trainer.train_dataset = [{"x": torch.randn(7)} for _ in range(6)]
    trainer.train()
    assert [strength for strength, _ in model.seen] == pytest.approx([4, 4, 3, 2, 2, 1])
    assert [on for _, on in model.seen] == [False] * 5 + [True]
    assert callback.clock == Clock(epoch=1, step=4, sample=12, token=12)


def test_a_name_that_the_model_does_not_have_is_reported_before_the_first_update(tmp_path: Path) -> None:
    schedule = runner(anneals={"x": {"target": "blocks.*.ffn.temprature", "start": 1.0, "end": 2.0}})
    with pytest.raises(ConfigError, match=r"temprature.*Did you mean 'blocks\.\d\.ffn\.temperature'"):
        own.trained(tmp_path, schedule)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_each_epoch_of_a_stream_begins_with_its_first_update(tmp_path: Path) -> None:
    model = own.streamed(tmp_path, 12, runner())  # 6 batches, 2 an update
    clocks = [clock for clock, *_ in model.seen]
    assert [clock.epoch for clock in clocks] == [batch // 6 for batch in range(24)]
    assert [clock.step for clock in clocks] == [batch // 2 for batch in range(24)]
    assert [values[0] for _, *values in model.seen] == [[2.0, 1.5, 1.0, 0.5][batch // 6] for batch in range(24)]
    assert [moe for *_, moe, _ in model.seen] == [batch >= 6 for batch in range(24)]


def test_batches_left_over_in_an_epoch_are_counted_with_the_update_that_takes_them(tmp_path: Path) -> None:
    model = own.streamed(tmp_path, 14, runner())  # 7 batches, the last of which waits for the next epoch
    clocks = [clock for clock, *_ in model.seen]
    assert len(clocks) == 27  # the last epoch's seventh is not asked for
    assert [clock.epoch for clock in clocks] == [batch // 7 for batch in range(27)]
    assert [clock.step for clock in clocks[5:10]] == [2, 3, 3, 3, 4]
    assert [clock.sample for clock in clocks[5:10]] == [8, 12, 12, 12, 18]
    assert model.callback is not None
    assert model.callback.clock == Clock(epoch=3, step=12, sample=54, token=54 * 6)


def test_a_stream_that_does_not_go_by_the_planned_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"an epoch goes on past the 3 updates.*give the data a length, or plan Horizon"
    ):
        own.streamed(tmp_path, math.inf, runner(), endless := own.Plain())
    assert endless.callback is not None
    assert endless.callback.clock.step == 3  # the fourth update of its first epoch was not made
    with pytest.raises(HorizonError, match="epoch 0 had 2 updates, and 4 epochs x 3 updates = 12 steps were planned"):
        own.streamed(tmp_path, 8, runner())
    by_step = runner(route_temp={"start": 2.0, "end": 0.9, "by": "step"})
    seen = own.streamed(tmp_path, math.inf, by_step).seen
    assert [clock.epoch for clock, *_ in seen] == [0] * 24
    assert [values[0] for _, *values in seen] == pytest.approx([2.0 - 0.1 * (batch // 2) for batch in range(24)])


# --- loops that begin again ------------------------------------------------------------------------------------------


def test_a_second_train_begins_the_curriculum_anew(tmp_path: Path) -> None:
    model, trainer = own.trained(tmp_path, save_strategy="no")
    first, model.seen = model.seen, []
    trainer.train()
    assert model.seen == first
    assert model.callback is not None
    assert model.callback.clock == Clock(epoch=3, step=12, sample=40, token=240)
    assert own.hooks(model, trainer) == 0


@pytest.mark.parametrize("where", ["forward", "on_pre_optimizer_step"])
def test_after_ctrl_c_nothing_stays_behind_and_the_loop_begins_anew(tmp_path: Path, where: str) -> None:
    class Stopped(own.Plain):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
            if where == "forward" and len(self.seen) == 7 and not again:
                raise KeyboardInterrupt
            return super().forward(input_ids, labels)

    again = False
    model = Stopped()
    model.callback = own.ScheduleCallback(
        runner(events={"x": {"enable": "align", "when": {"metric": "batches", "above": 1e9}}})
    )
    trainer = own.made(model, model.callback, tmp_path, save_strategy="no")
    if where != "forward":
        trainer.add_callback(own.Stops(where, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert own.hooks(model, trainer) <= 1  # of the latch, or of the optimizer, which the next begin removes
    model.seen, again = [], True
    trainer.train()
    assert [clock.step for clock, *_ in model.seen] == [3 * e + b // 2 for e in range(4) for b in range(5)]
    assert model.callback.clock == Clock(epoch=3, step=12, sample=40, token=240)
    assert own.hooks(model, trainer) == 0


def test_a_smaller_batch_that_the_library_finds_begins_anew(tmp_path: Path) -> None:
    model = own.Plain()
    schedule = ScheduleRunner(horizon=Horizon(epochs=8, updates_per_epoch=1), route_temp=CURRICULUM["route_temp"])
    model.callback = own.ScheduleCallback(schedule)
    options = {"per_device_train_batch_size": 10, "num_train_epochs": 8, "auto_find_batch_size": True}
    trainer = own.made(model, model.callback, tmp_path, save_strategy="no", **options)
    trainer.add_callback(own.Stops("on_step_end", RuntimeError))
    trainer.train()  # 4 updates of 10 samples; then 8 updates, each of 9 and 1
    assert trainer.state.train_batch_size == 9
    assert [clock.sample for clock, *_ in model.seen] == [10 * u for u in range(4)] + [
        10 * u for u in range(8) for _ in "ab"
    ]
    assert model.callback.clock == Clock(epoch=7, step=8, sample=80, token=480)


def test_another_model_is_brought_to_the_begin(tmp_path: Path) -> None:
    model, _ = own.trained(tmp_path, save_strategy="no")
    other = own.Plain()
    other.callback = model.callback
    assert other.callback is not None
    own.made(other, other.callback, tmp_path, save_strategy="no").train()
    assert other.seen == model.seen


def test_a_resume_needs_the_state_of_its_own_checkpoint(tmp_path: Path) -> None:
    own.trained(tmp_path)
    model = own.Plain()
    model.callback = own.ScheduleCallback(runner())
    trainer = own.made(model, model.callback, tmp_path)
    model.callback.restore(tmp_path / "checkpoint-6", model)
    with pytest.raises(ConfigError, match=r"with the same checkpoint, not one of step 6"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


# --- runs that are not the planned one -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": 5}, r"this run makes 15 steps.*or change num_train_epochs, max_steps"),
        ({"max_steps": 13}, r"this run makes 13 steps"),
        ({"gradient_accumulation_steps": 1}, r"this run makes 5 updates an epoch.*updates_per_epoch=5\)"),
        ({"per_device_train_batch_size": 5}, r"this run makes 1 updates an epoch"),
    ],
)
def test_a_run_that_does_not_fit_the_horizon_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^horizon: 4 epochs x 3 updates = 12 steps were planned, and " + message):
        own.trained(tmp_path, **options)


def test_a_part_of_the_planned_run_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own.trained(tmp_path, num_train_epochs=2, save_strategy="no")
    assert "12 steps were planned, and this run ends after 6 steps" in caplog.text
