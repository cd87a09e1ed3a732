"""The callback alone, in Lightning's own trainer with models of other people."""

from __future__ import annotations

import math
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from apt_model.errors import ConfigError, HorizonError
from apt_model.schedule import Clock, Horizon, ScheduleRunner
from tests.integrations.curriculum import CURRICULUM, runner
from tests.late import Late

own = Late("tests.integrations.of_lightning")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # Lightning's own


def test_a_plain_module_goes_through_the_curriculum_update_by_update(tmp_path: Path) -> None:
    seen = own.fit(tmp_path).seen
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
    module = own.fit(tmp_path)
    optimizer = module.made.optimizers[0]
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.net.parameters()}
    experts = module.net.moe_layers[0].experts
    assert experts is not None
    assert optimizer.state[experts.up]["step"] == 12  # those of the dense layer among them


def test_parameters_left_to_no_optimizer_stay_out(tmp_path: Path) -> None:
    class Partial(own.Plain):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            kept = [p for name, p in self.net.named_parameters() if "ffn.dense" not in name]
            return torch.optim.AdamW(kept, lr=1e-2)

    module = Partial()
    module.callback = own.ScheduleCallback(runner())
    made = own.trainer(module.callback, tmp_path)
    made.fit(module, own.batches())
    held = {id(parameter) for group in made.optimizers[0].param_groups for parameter in group["params"]}
    names = {name for name, parameter in module.net.named_parameters() if id(parameter) in held}
    assert not any("experts" in name for name in names)
    assert "align.down.weight" in names


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resume_from_a_checkpoint_of_lightning_equals_an_uninterrupted_run(tmp_path: Path, epochs: int) -> None:
    torch.manual_seed(1)
    whole = own.fit(tmp_path)
    torch.manual_seed(1)
    first = own.fit(tmp_path, max_epochs=epochs)
    path = tmp_path / "state.ckpt"
    first.made.save_checkpoint(path)
    state = torch.get_rng_state()

    schedule = runner()
    module = own.Plain()
    module.callback = own.ScheduleCallback(schedule)
    made = own.trainer(module.callback, tmp_path)
    torch.set_rng_state(state)

    class Restore(own.pl.Callback):  # what the checkpoint cannot hold: the generator that new modules draw from
        def on_train_start(self, *unused: Any) -> None:
            torch.set_rng_state(state)

    made.callbacks.append(Restore())
    made.fit(module, own.batches(), ckpt_path=path)
    assert first.seen + module.seen == whole.seen
    for name, weight in whole.net.state_dict().items():
        assert torch.allclose(weight, module.net.state_dict()[name], atol=1e-6), name
    assert schedule.state_dict() == whole.callback.driver.schedule.state_dict()


def test_a_resume_over_another_length_needs_a_word(tmp_path: Path) -> None:
    first = own.fit(tmp_path, max_epochs=1)
    path = tmp_path / "state.ckpt"
    first.made.save_checkpoint(path)
    longer = ScheduleRunner(horizon=Horizon(epochs=5, updates_per_epoch=3), **CURRICULUM)
    with pytest.raises(ConfigError, match=r"4 epochs x 3 updates = 12 steps.*5 epochs"):
        own.fit(tmp_path, longer, max_epochs=5, ckpt_path=path)


def test_an_update_that_mixed_precision_skips_is_not_counted(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)  # the first ones overflow
    precision = own.pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    module = own.fit(tmp_path, runner(route_temp={"start": 2.0, "end": 0.5, "by": "epoch"}), plugins=[precision])
    skipped = round(24 - torch.tensor(scaler.get_scale()).log2().item())
    assert 0 < skipped < 12
    assert module.callback is not None
    assert module.callback.clock.step == 12 - skipped
    assert module.made.global_step == 12
    assert [clock.step for clock, *_ in module.seen[:2]] == [0, 0]
    assert module.seen[-1][0].sample == 4 * (11 - skipped) - 2 * sum(3 * e + 2 >= skipped for e in range(3))


@pytest.mark.parametrize("metric", ["train/loss", "entropy", "val_loss"])
def test_latches_see_what_is_logged_and_once(tmp_path: Path, metric: str) -> None:
    schedule = runner(events={"x": {"enable": "voter", "when": {"metric": metric, "below": -1.0}}})
    told: list[float] = []
    schedule.observe = lambda metrics: told.extend([metrics[metric]] if metric in metrics else [])  # type: ignore[method-assign]
    own.fit(tmp_path, schedule, validation=own.batches(2))
    if metric == "entropy":
        assert told == [9.0, 7.0, 6.0] * 4  # as logged in the update's last training step
    else:
        assert len(told) == (12 if metric == "train/loss" else 4)
        assert all(0.0 < loss < 6.0 for loss in told)


def test_a_latch_turns_a_module_on_at_the_next_update(tmp_path: Path) -> None:
    schedule = runner(events={"x": {"enable": "align", "when": {"metric": "entropy", "below": 6.5}}})
    seen = own.fit(tmp_path, schedule).seen
    assert [on for *_, on in seen] == [clock.step >= 3 for clock, *_ in seen]


def test_setters_and_switches_may_be_given(tmp_path: Path) -> None:
    module = own.Dialled()
    schedule = ScheduleRunner(
        horizon=Horizon(epochs=2, updates_per_epoch=2),
        anneals={"s": {"target": "strength", "start": 4.0, "end": 1.0, "by": "step"}},
        enable_moe_at_step=3,
    )
    callback = own.ScheduleCallback(
        schedule,
        values={"strength": partial(setattr, module.dial, "strength")},
        switches={"moe": partial(setattr, module.dial, "on")},
    )
    loader = DataLoader(TensorDataset(torch.randn(6, 3)), batch_size=2)
    own.trainer(callback, tmp_path, max_epochs=2).fit(module, loader)
    assert [strength for strength, _ in module.seen] == pytest.approx([4, 4, 3, 2, 2, 1])
    assert [on for _, on in module.seen] == [False] * 5 + [True]
    assert callback.clock == Clock(epoch=1, step=4, sample=12, token=12)


def test_a_name_that_the_model_does_not_have_is_reported_before_the_first_update(tmp_path: Path) -> None:
    schedule = runner(anneals={"x": {"target": "blocks.*.ffn.temprature", "start": 1.0, "end": 2.0}})
    with pytest.raises(ConfigError, match=r"temprature.*Did you mean 'blocks\.\d\.ffn\.temperature'"):
        own.fit(tmp_path, schedule)


# --- what the clock counts where training_step makes the updates -----------------------------------------------------


def test_samples_reach_an_update_of_any_optimizer(tmp_path: Path) -> None:
    # the first one steps in batches 1, 3 and 5 of 7, the second in each
    module = own.manual(tmp_path, lambda batch: [0, 1] if batch % 2 else [1], Horizon(epochs=1, updates_per_epoch=3))
    assert module.callback is not None
    assert module.callback.clock == Clock(step=3, sample=56, token=56)
    assert [(step, sample) for step, sample, _ in module.seen] == [
        *[(0, 0), (0, 8), (1, 16), (1, 16), (1, 24), (2, 32), (2, 32), (2, 40), (3, 48), (3, 48)],
    ]


def test_each_step_of_one_optimizer_is_an_update(tmp_path: Path) -> None:
    module = own.manual(tmp_path, lambda batch: [0, 0], Horizon(epochs=1, updates_per_epoch=14))
    assert module.callback is not None
    assert module.callback.clock == Clock(step=14, sample=56, token=56)
    assert module.seen == [
        (u, 8 * ((u + 1) // 2), float(u)) for u in range(14)
    ]  # a batch's samples come with its first


def test_batches_that_wait_for_an_update_are_counted_with_it_in_the_next_epoch_too(tmp_path: Path) -> None:
    module = own.manual(tmp_path, lambda batch: [0] if batch % 2 else [], Horizon(epochs=2, updates_per_epoch=4))
    assert module.callback is not None
    assert module.callback.clock == Clock(epoch=1, step=7, sample=112, token=112)
    assert [sample for _, sample, _ in module.seen] == [16 * update for update in range(7)]


# --- loops that begin again ------------------------------------------------------------------------------------------


def test_a_second_fit_begins_the_curriculum_anew(tmp_path: Path) -> None:
    callback = own.ScheduleCallback(runner())
    seen = []
    for _ in range(2):
        module = own.Plain()
        module.callback = callback
        own.trainer(callback, tmp_path).fit(module, own.batches())
        assert callback.clock == Clock(epoch=3, step=12, sample=40, token=240)
        seen.append(module.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_a_fit_nothing_stays_behind_and_the_next_begins_anew(
    tmp_path: Path, error: type[BaseException]
) -> None:
    class Fails(own.Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if len(self.seen) == 8:
                raise error
            return super().training_step(batch, batch_idx)

    module = Fails()
    module.callback = own.ScheduleCallback(runner())
    first = own.trainer(module.callback, tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        first.fit(module, own.batches())
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert module.callback.clock.step == 4
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in first.optimizers)
    assert "on_load_checkpoint" not in vars(module)

    again = own.Plain()
    again.callback = module.callback
    own.trainer(again.callback, tmp_path).fit(again, own.batches())
    assert [clock.step for clock, *_ in again.seen] == [3 * e + b // 2 for e in range(4) for b in range(5)]
    assert [on for *_, on, _ in again.seen] == [clock.epoch >= 1 for clock, *_ in again.seen]


def test_a_trainer_that_continues_continues_the_curriculum(tmp_path: Path) -> None:
    module = own.fit(tmp_path, max_epochs=2)
    module.made.fit_loop.max_epochs = 4
    module.made.fit(module, own.batches())
    assert [clock.step for clock, *_ in module.seen] == [3 * e + b // 2 for e in range(4) for b in range(5)]
    assert [on for *_, on, _ in module.seen] == [clock.epoch >= 1 for clock, *_ in module.seen]


# --- runs that are not the planned one -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 5}, r"this run makes 15 steps: .* Give the runner a horizon of 15 steps, or change max_epochs"),
        ({"max_epochs": -1}, r"this run has no end\. Set max_epochs"),
        ({"max_epochs": -1, "max_steps": 13}, r"this run makes 13 steps"),
        ({"accumulate_grad_batches": 1}, r"this run makes 5 updates an epoch.*updates_per_epoch=5\)"),
        ({"limit_train_batches": 2}, r"this run makes 1 updates an epoch.*Horizon\(epochs=4, updates_per_epoch=1\)"),
        ({"limit_train_batches": 0.8}, r"this run makes 2 updates an epoch"),
    ],
)
def test_a_run_that_does_not_fit_the_horizon_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^horizon: 4 epochs x 3 updates = 12 steps were planned, and " + message):
        own.fit(tmp_path, **options)


@pytest.mark.parametrize("options", [{"max_epochs": -1, "max_steps": 12}, {"fast_dev_run": 2}])
def test_other_ways_to_say_how_long_a_run_is_are_read(tmp_path: Path, options: Any) -> None:
    steps = 2 if "fast_dev_run" in options else 12
    module = own.fit(tmp_path, **{"accumulate_grad_batches": 1 if "fast_dev_run" in options else 2} | options)
    assert module.callback is not None
    assert module.callback.clock.step == steps


def test_a_part_of_the_planned_run_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own.fit(tmp_path, max_epochs=2)
    assert "12 steps were planned, and this run ends after 6 steps" in caplog.text


def test_a_curriculum_by_step_asks_for_no_more_than_the_number_of_steps(tmp_path: Path) -> None:
    schedule = ScheduleRunner(
        horizon=Horizon(epochs=1, updates_per_epoch=12), route_temp={"start": 2.0, "end": 0.9, "by": "step"}
    )
    seen = own.fit(tmp_path, schedule).seen
    assert [values[0] for _, *values in seen] == pytest.approx([2.0 - 0.1 * clock.step for clock, *_ in seen])


@pytest.mark.parametrize(
    ("number", "curriculum", "error"),
    [
        (5, CURRICULUM, None),
        (math.inf, {"route_temp": {"start": 2.0, "end": 0.5, "by": "step"}}, None),
        (math.inf, CURRICULUM, "an epoch goes on past the 3 updates.*by step, sample or token, give the data a length"),
        (3, CURRICULUM, "epoch 0 had 2 updates, and 4 epochs x 3 updates = 12 steps were planned"),
        (math.inf, {"events": {"x": {"enable": "align", "at": "1ep"}}}, "an epoch goes on past the 3 updates"),
    ],
)
def test_streams(tmp_path: Path, number: float, curriculum: Any, error: str | None) -> None:
    module = own.Plain()
    module.callback = own.ScheduleCallback(runner(**curriculum))
    made = own.trainer(module.callback, tmp_path, max_epochs=4, max_steps=12)
    with pytest.raises(ConfigError if "past" in error else HorizonError, match=error) if error else nullcontext():
        made.fit(module, DataLoader(own.Stream(number), batch_size=None))
    if error is not None and "past" in error:
        assert module.callback.clock.step == 3  # the fourth update of its first epoch was not made
    if error is None:
        assert module.callback.clock.step == 12
        epochs = [clock.epoch for clock, *_ in module.seen]
        assert epochs == ([e for e in range(4) for _ in range(5)] if number == 5 else [0] * 24)
