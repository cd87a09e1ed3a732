"""One profile in three trainers: the scheduled values in the model during each update are the same, to the bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_launch.config.run_config import RunConfig
from apt_launch.record import read_rows
from apt_launch.runs.build import build_trainer
from apt_launch.runs.train import train
from apt_launch.values import read_frozen
from apt_model.errors import CallbackError, ConfigError, HorizonError, Interrupted, NonFiniteError
from apt_model.layers import scheduled
from apt_model.training.base import BaseTrainer
from apt_model.training.callbacks import Callback
from apt_model.training.checkpoint import Checkpoints, newest_intact
from apt_model.training.trainer import Trainer

Small = Callable[..., RunConfig]
OTHERS = ("lightning", "hf")


class Run:
    """A run of one trainer; ``trace`` has the clock and what the model held, read at each forward pass in training."""

    def __init__(self, config: RunConfig, **options: Any) -> None:
        self.rows: list[dict[str, float]] = []
        self.trace: list[tuple[Any, ...]] = []
        self.batches: list[torch.Tensor] = []
        self.trainer: BaseTrainer = build_trainer(config, log=self.rows.append, **options)
        self.model = self.trainer.model
        self.model.register_forward_pre_hook(self.look)

    def look(self, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not model.training:
            return
        values = {path: self.value(path) for path in scheduled.targets(model)}
        on = (self.model.moe_layers[0].enabled, self.model.align.enabled, self.model.voter.enabled)
        rates = [group["lr"] for group in self.trainer.optimizer.param_groups]
        held = sum(len(group["params"]) for group in self.trainer.optimizer.param_groups)
        self.trace.append((self.trainer.clock, values, on, rates, held))
        self.batches.append(inputs[0])

    def value(self, path: str) -> float:
        owner, _, name = path.rpartition(".")
        return getattr(self.model.get_submodule(owner), name).item()

    def told(self) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in self.rows]


def trained(config: RunConfig, **options: Any) -> Run:
    run = Run(config, **options)
    run.trainer.fit()
    return run


LATCH = (
    "schedule.enable_voter_at_epoch=null",
    "+schedule.events.vote={enable:voter,when:{metric:train/loss,below:5.3,smooth:0.5}}",
)


@pytest.mark.parametrize("more", [(), LATCH], ids=["timed", "latched"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trace_of_the_three_trainers_is_identical(small: Small, accumulate: int, more: tuple[str, ...]) -> None:
    overrides = (
        f"trainer.accumulate={accumulate}",
        "trainer.max_batches_per_epoch=5",
        "schedule.align_weight.warmup=4",
        "optimizer.lr=0.01",
        *more,
    )
    ours, lightning, hf = (trained(small(f"trainer={name}", *overrides)) for name in ("default", *OTHERS))

    updates = -(-5 // accumulate)
    steps = [clock.step for clock, *_ in ours.trace]
    assert steps == [e * updates + b // accumulate for e in range(6) for b in range(5)]
    assert [clock.sample for clock, *_ in ours.trace] == [
        e * 10 + 2 * (b - b % accumulate) for e in range(6) for b in range(5)
    ]
    voting = [on[2] for _, _, on, *_ in ours.trace]
    assert True in voting
    assert False in voting
    for other in (lightning, hf):
        assert other.trace == ours.trace
        assert other.trainer.clock == ours.trainer.clock
        assert other.trainer.schedule.state_dict() == ours.trainer.schedule.state_dict()
        assert all(torch.equal(mine, its) for mine, its in zip(ours.batches, other.batches, strict=True))


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_rows_and_weights_agree(small: Small, other: str, accumulate: int) -> None:
    overrides = (f"trainer.accumulate={accumulate}", "trainer.max_batches_per_epoch=5", "trainer.log_every=1")
    ours = trained(small(*overrides))
    its = trained(small(f"trainer={other}", *overrides))
    assert len(ours.rows) == len(its.rows)
    for mine, row in zip(ours.told(), its.told(), strict=True):
        assert list(row) == list(mine)
        assert row == pytest.approx(mine, abs=1e-4)
    for name, weight in ours.model.state_dict().items():
        assert torch.allclose(weight, its.model.state_dict()[name], atol=1e-4), name


class Events(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda trainer, *details: self.seen.append(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("other", OTHERS)
def test_callbacks_are_called_in_the_same_order(small: Small, other: str) -> None:
    overrides = ("trainer.accumulate=2", "trainer.max_batches_per_epoch=3", "trainer.max_epochs=6")
    seen = []
    for name in ("default", other):
        events = Events()
        trained(small(f"trainer={name}", *overrides), callbacks=[events])
        seen.append(events.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("stop_after", [3, 8])
def test_a_stopped_run_leaves_a_checkpoint_that_the_default_trainer_resumes_from(
    small: Small, tmp_path: Path, other: str, stop_after: int
) -> None:
    overrides = ("trainer.accumulate=2", "trainer.max_batches_per_epoch=5")
    whole = trained(small(*overrides))
    first = Run(small(f"trainer={other}", *overrides), checkpoints=Checkpoints(tmp_path))
    first.trainer.stop_requested = lambda: first.trainer.clock.step >= stop_after
    with pytest.raises(Interrupted, match=f"step {stop_after}"):
        first.trainer.fit()
    assert first.trainer.clock.step == stop_after
    checkpoint, _ = newest_intact(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == f"step-{stop_after:08d}"

    rest = trained(small(*overrides), resume=checkpoint)
    assert first.trace + rest.trace == whole.trace
    for mine, row in zip(whole.told(), first.told() + rest.told(), strict=True):
        assert row == pytest.approx(mine, abs=1e-4)


@pytest.mark.parametrize("other", OTHERS)
def test_a_job_that_was_preempted_is_continued_by_the_default_trainer(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    config = small(f"trainer={other}", "logger=none", "trainer.log_every=1")
    about = {"identity": config.identity, "config": config.result_values, "horizon": asdict(config.horizon)}
    first = Run(config, checkpoints=Checkpoints(tmp_path / "checkpoints", about=about))
    first.trainer.stop_requested = lambda: first.trainer.clock.step >= 11
    with pytest.raises(Interrupted):
        first.trainer.fit()
    with caplog.at_level(logging.INFO):
        train(config.resuming(), tmp_path)  # as a job does in its next attempt
    assert f"trainer={other} cannot continue from a checkpoint: trainer=default trains the rest" in caplog.text
    whole = [row for row in trained(small("trainer.log_every=1")).told() if row["step"] >= 11]
    rest = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rest] == [row["step"] for row in whole]
    for mine, row in zip(whole, rest, strict=True):
        assert {name: row[name] for name in mine} == pytest.approx(mine, abs=1e-4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["state"], summary["identity"]) == ("done", config.identity)
    frozen = read_frozen(tmp_path / "config.yaml")["trainer"]  # of the run that was planned
    assert frozen["_target_"] == config.values["trainer"]["_target_"]


@pytest.mark.parametrize("other", OTHERS)
def test_checkpoints_are_written_at_the_same_steps(small: Small, tmp_path: Path, other: str) -> None:
    trained(small(f"trainer={other}"), checkpoints=Checkpoints(tmp_path, keep_last=9))
    assert [path.name for path in Checkpoints(tmp_path).all()] == [f"step-{4 * epoch:08d}" for epoch in range(1, 7)]


@pytest.mark.parametrize("other", OTHERS)
def test_what_stops_a_run_stops_it_here_too(small: Small, other: str) -> None:
    class Poison(Callback):
        def on_batch_begin(self, trainer: BaseTrainer) -> None:
            if trainer.clock.step == 5:
                with torch.no_grad():
                    trainer.model.norm.weight.fill_(float("nan"))

    class Explode(Callback):
        def on_batch_end(self, trainer: BaseTrainer) -> None:
            if trainer.clock.step == 2:
                trainer.model.norm.weight.grad[0] = float("inf")

    class Fails(Callback):
        def on_step(self, trainer: BaseTrainer) -> None:
            raise KeyError("oops")

    with pytest.raises(NonFiniteError, match="the loss is nan at epoch 1, step 5"):
        trained(small(f"trainer={other}"), callbacks=[Poison()])
    with pytest.raises(NonFiniteError, match=r"the gradient's norm is (inf|nan) at epoch 0, step 2"):
        trained(small(f"trainer={other}"), callbacks=[Explode()])
    with pytest.raises(CallbackError, match=r"callback Fails\.on_step failed at epoch 0, step 0: KeyError: 'oops'"):
        trained(small(f"trainer={other}"), callbacks=[Fails()])
    run = Run(small(f"trainer={other}"))
    run.trainer.train_batches.sampler.num_batches = 3
    with pytest.raises(HorizonError, match="epoch 0 had 3 updates and 0 skipped ones, but 4 were planned"):
        run.trainer.fit()


@pytest.mark.parametrize("other", OTHERS)
def test_mixed_precision_agrees(small: Small, other: str) -> None:
    ours = trained(small("trainer.precision=bf16"))
    its = trained(small(f"trainer={other}", "trainer.precision=bf16"))
    assert its.rows[-1]["val/loss"] == pytest.approx(ours.rows[-1]["val/loss"], abs=1e-3)
    assert all(weight.dtype == torch.float32 for weight in its.model.state_dict().values())


@pytest.mark.parametrize("other", OTHERS)
def test_a_resume_is_refused_with_the_remedy(small: Small, other: str) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.resume: trainer={other} cannot .*Choose trainer=default"):
        small(f"trainer={other}", "trainer.resume=auto")


@pytest.mark.gpu
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_trace_is_identical_on_cuda(small: Small, other: str, precision: str) -> None:
    overrides = ("trainer.device=cuda", f"trainer.precision={precision}", "trainer.accumulate=2")
    ours = trained(small(*overrides))
    its = trained(small(f"trainer={other}", *overrides))
    assert its.trace == ours.trace


def test_only_the_default_trainer_resumes() -> None:
    assert Trainer.can_resume
    assert not BaseTrainer.can_resume
