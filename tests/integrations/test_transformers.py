"""The callback alone, in transformers' own trainer with models of other people."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from apt_model.errors import ConfigError
from apt_model.gpt import GPT
from apt_model.integrations.transformers import ScheduleCallback
from apt_model.layers.moe import MoE
from apt_model.schedule import Clock, Horizon, ScheduleRunner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the library's own

CURRICULUM = {
    "enable_moe_at_epoch": 1,
    "enable_align_at_step": 5,
    "route_temp": {"start": 2.0, "end": 0.5, "by": "epoch"},
    "align_weight": {"start": 0.0, "end": 0.8, "by": "step"},
}


class Plain(nn.Module):
    """A language model with the library's interface, which knows nothing of curricula."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = GPT(
            vocab_size=20, d_model=8, num_heads=2, num_layers=2, d_ff=16, seq_len=6, moe=partial(MoE, num_experts=4)
        )
        self.seen: list[tuple[Any, ...]] = []
        self.callback: ScheduleCallback | None = None

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        if self.training:
            assert self.callback is not None
            layer = self.net.moe_layers[-1]
            values = (layer.temperature.item(), self.net.align.weight.item())
            self.seen.append((self.callback.clock, *values, layer.enabled, self.net.align.enabled))
        output = self.net(input_ids, labels)
        loss = output.language_loss + output.auxiliary_loss
        return {"loss": loss, "logits": output.logits, "metrics": {"batches": torch.tensor(float(len(self.seen)))}}


class Told(transformers.TrainerCallback):
    """Keeps the optimizer."""

    optimizer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.optimizer = given["optimizer"]


def rows(number: int = 10) -> list[dict[str, Tensor]]:
    tokens = torch.randint(0, 20, (number, 7), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row[:-1], "labels": row[1:]} for row in tokens]


def runner(**curriculum: Any) -> ScheduleRunner:
    return ScheduleRunner(horizon=Horizon(epochs=4, updates_per_epoch=3), **(curriculum or CURRICULUM))


def made(model: nn.Module, callback: ScheduleCallback, folder: Path, **options: Any) -> transformers.Trainer:
    given = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "epoch",
        "logging_strategy": "no",
        "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **{**given, **options}
    )
    return transformers.Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=[callback, Told()]
    )


def trained(folder: Path, schedule: ScheduleRunner | None = None, **options: Any) -> tuple[Plain, transformers.Trainer]:
    model = Plain()
    model.callback = ScheduleCallback(schedule or runner())
    trainer = made(model, model.callback, folder, **options)
    trainer.train()
    return model, trainer


def test_a_plain_model_goes_through_the_curriculum_update_by_update(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
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
    model, trainer = trained(tmp_path)
    optimizer = trainer.optimizer
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    experts = model.net.moe_layers[0].experts
    assert experts is not None
    assert optimizer.state[experts.up]["step"] == 12  # those of the dense layer among them


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resume_from_a_checkpoint_of_the_library_equals_an_uninterrupted_run(tmp_path: Path, epochs: int) -> None:
    whole, _ = trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / f"checkpoint-{3 * epochs}"

    model = Plain()
    model.callback = ScheduleCallback(runner())
    trainer = made(model, model.callback, tmp_path / "again")
    model.callback.restore(checkpoint, model)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert model.seen == whole.seen[5 * epochs :]
    for name, weight in whole.state_dict().items():
        assert torch.allclose(weight, model.state_dict()[name], atol=1e-6), name
    assert whole.callback is not None
    assert model.callback.follower.state_dict() == whole.callback.follower.state_dict()


def test_a_resume_without_the_state_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    model = Plain()
    model.callback = ScheduleCallback(runner())
    trainer = made(model, model.callback, tmp_path)
    with pytest.raises(ConfigError, match=r"Call ScheduleCallback\.restore\(checkpoint, model\) before trainer\.train"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ConfigError, match=r"nowhere is no checkpoint"):
        model.callback.restore(tmp_path / "nowhere", model)


def test_a_resume_over_another_length_needs_a_word(tmp_path: Path) -> None:
    trained(tmp_path)
    longer = ScheduleCallback(ScheduleRunner(horizon=Horizon(epochs=5, updates_per_epoch=3), **CURRICULUM))
    with pytest.raises(ConfigError, match=r"4 epochs x 3 updates = 12 steps.*5 epochs"):
        longer.restore(tmp_path / "checkpoint-6", Plain())


@pytest.mark.parametrize("metric", ["train/loss", "batches", "val/loss", "eval_loss", "lr"])
def test_latches_see_what_there_is_and_once(tmp_path: Path, metric: str) -> None:
    schedule = runner(events={"x": {"enable": "voter", "when": {"metric": metric, "below": -1.0}}})
    told: list[float] = []
    schedule.observe = lambda metrics: told.extend([metrics[metric]] if metric in metrics else [])  # type: ignore[method-assign]
    trained(tmp_path, schedule, eval_strategy="epoch", logging_strategy="epoch", save_strategy="no")
    if metric == "batches":
        assert told == [5 * e + b for e in range(4) for b in (2, 4, 5)]
    else:
        assert len(told) == (12 if metric == "train/loss" else 4)
        assert all(0.0 <= value < 6.0 for value in told)


def test_a_latch_turns_a_module_on_at_the_next_update(tmp_path: Path) -> None:
    schedule = runner(events={"x": {"enable": "align", "when": {"metric": "batches", "above": 4.5}}})
    model, _ = trained(tmp_path, schedule)
    assert [on for *_, on in model.seen] == [clock.step >= 3 for clock, *_ in model.seen]


class Dial(nn.Module):
    """Somebody's model with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 1)
        self.strength = 1.0
        self.on = False
        self.seen: list[tuple[float, bool]] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen.append((self.strength, self.on))
        return {"loss": self.linear(x).square().mean()}


def test_setters_and_switches_may_be_given(tmp_path: Path) -> None:
    model = Dial()
    schedule = ScheduleRunner(
        horizon=Horizon(epochs=2, updates_per_epoch=2),
        anneals={"s": {"target": "strength", "start": 4.0, "end": 1.0, "by": "step"}},
        enable_moe_at_step=3,
    )
    callback = ScheduleCallback(
        schedule,
        values={"strength": partial(setattr, model, "strength")},
        switches={"moe": partial(setattr, model, "on")},
    )
    trainer = made(model, callback, tmp_path, num_train_epochs=2, save_strategy="no")
    trainer.train_dataset = [{"x": torch.randn(7)} for _ in range(6)]
    trainer.train()
    assert [strength for strength, _ in model.seen] == pytest.approx([4, 4, 3, 2, 2, 1])
    assert [on for _, on in model.seen] == [False] * 5 + [True]
    assert callback.clock == Clock(epoch=1, step=4, sample=12, token=12)


def test_a_name_that_the_model_does_not_have_is_told_before_the_first_update(tmp_path: Path) -> None:
    schedule = runner(anneals={"x": {"target": "blocks.*.ffn.temprature", "start": 1.0, "end": 2.0}})
    with pytest.raises(ConfigError, match=r"temprature.*Did you mean 'blocks\.\d\.ffn\.temperature'"):
        trained(tmp_path, schedule)
