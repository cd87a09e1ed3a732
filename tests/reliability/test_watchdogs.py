"""Losses that are not finite, jumps of the loss, steps that stall, memory that runs out."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from apt_launch.config.run_config import RunConfig
from apt_launch.record import read_rows
from apt_launch.runs.build import build_trainer
from apt_launch.runs.train import train
from apt_model.errors import NonFiniteError
from apt_model.gpt import GPT, Output
from apt_model.layers.feed_forward import FeedForward
from apt_model.layers.moe import MoE
from apt_model.schedule import Change, Clock
from apt_model.training.callbacks import Callback
from apt_model.training.checkpoint import Checkpoints, load
from apt_model.training.watchdogs import CollapseWatch, Memory, SpikeWatch, Watchdog, host_memory
from tests.conftest import until

MARK = 1
"""A byte that stands once in the text; a batch with it has a loss that is not finite."""


@pytest.fixture
def marked(text_file: Path) -> Path:
    text_file.write_text(text_file.read_text()[:400] + chr(MARK) + text_file.read_text()[400:900])
    return text_file


@contextmanager
def poison() -> Iterator[list[int]]:
    """Make the loss NaN where the mark is trained on; yield the number of times."""
    times: list[int] = []

    def hook(module: torch.nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        if isinstance(module, GPT) and module.training and (given[0] == MARK).any():
            times.append(1)
            return Output(output.logits, output.language_loss * float("nan"), output.auxiliary_loss, output.metrics)
        return None

    handle = register_module_forward_hook(hook)
    try:
        yield times
    finally:
        handle.remove()


Small = Callable[..., RunConfig]
WHOLE = ("trainer.max_batches_per_epoch=null", "trainer.max_epochs=3", "schedule=none", "trainer.log_every=1")


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load(Checkpoints(run / "checkpoints").all()[-1])["model"]
    return state


def test_stop_fails_with_the_checkpoint_from_before(small: Small, marked: Path, tmp_path: Path) -> None:
    config = small(*WHOLE)
    with poison() as times, pytest.raises(NonFiniteError, match="the loss is nan"):
        train(config, tmp_path / "run")
    assert len(times) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "failed"


def test_skip_and_rollback_leave_out_the_same_updates_and_end_with_the_same_weights(
    small: Small, marked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planned = small(*WHOLE).horizon.steps
    found = {}
    for policy, expected in (("skip", 3), ("rollback", 3)):
        config = small(*WHOLE, f"trainer.on_nonfinite={policy}")
        with poison() as times, caplog.at_level(logging.WARNING):
            train(config, tmp_path / policy)
        assert len(times) == expected  # the mark is met once an epoch, and never again after a rollback
        summary = json.loads((tmp_path / policy / "summary.json").read_text())
        assert (summary["state"], summary["steps"]) == ("done", planned - 3)
        rows = [row for row in read_rows(tmp_path / policy / "metrics.jsonl") if "train/loss" in row]
        assert [row["step"] for row in rows] == list(range(planned - 3))
        found[policy] = weights(tmp_path / policy), [row["train/loss"] for row in rows]
    assert found["skip"][1] == found["rollback"][1]
    assert all(torch.equal(found["skip"][0][name], found["rollback"][0][name]) for name in found["skip"][0])
    assert caplog.text.count("skipped an update: the loss is nan") == 3
    assert caplog.text.count("rolling back to the last checkpoint") == 3


def test_a_run_that_is_never_finite_stops_whatever_the_policy(small: Small, text_file: Path, tmp_path: Path) -> None:
    text_file.write_text(chr(MARK) * 3000)
    for policy, told in (("skip", "20 updates in a row"), ("rollback", "the loss is nan")):
        with poison(), pytest.raises(NonFiniteError, match=told):
            train(small(*WHOLE, f"trainer.on_nonfinite={policy}"), tmp_path / policy)
        assert json.loads((tmp_path / policy / "summary.json").read_text())["state"] == "failed"
    left_out = json.loads((tmp_path / "rollback" / "left_out.json").read_text())
    assert len(left_out["updates"]) == 10


def trainer_at(step: int, loss: float) -> Any:
    return SimpleNamespace(clock=Clock(epoch=0, step=step), last_loss=loss)


def test_a_jump_of_the_loss_after_a_switch_is_reported_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    watch = SpikeWatch(window=4, short=2)
    with caplog.at_level(logging.WARNING):
        for step, loss in enumerate((9.0, 2.0, 2.2, 2.0, 2.2)):  # the first one is forgotten: mean 2.1, deviation 0.1
            watch.on_step(trainer_at(step, loss))
        watch.on_schedule(trainer_at(5, 0.0), [Change("route_temp", 1.0), Change("moe_enabled", True)])
        watch.on_step(trainer_at(5, 2.3))
        watch.on_step(trainer_at(6, 2.45))  # mean 2.375 < 2.1 + 0.3
        assert caplog.text == ""
        watch.on_step(trainer_at(7, 2.55))  # mean 2.5
        watch.on_step(trainer_at(8, 9.0))
    assert caplog.text.count("train/loss rose") == 1
    assert (
        "moe enabled at epoch 0, step 5: train/loss rose from 2.1000 (mean of the updates before, deviation 0.1000) to 2.5000"
        in (caplog.text)
    )


def test_a_switch_that_the_loss_does_not_notice_is_reported_too(caplog: pytest.LogCaptureFixture) -> None:
    watch = SpikeWatch(window=4, short=2)
    with caplog.at_level(logging.INFO):
        for step, loss in enumerate((3.0, 2.4, 2.2, 2.0)):
            watch.on_step(trainer_at(step, loss))
        watch.on_schedule(trainer_at(4, 0.0), [Change("moe_enabled", True)])
        for step in range(4, 8):
            watch.on_step(trainer_at(step, 2.0))
    assert caplog.messages == [
        "moe enabled at epoch 0, step 4: train/loss 2.1000 before, 2.0000 after (means of 2 updates)"
    ]


def test_a_jump_without_a_switch_or_long_after_one_is_none_of_its_business(caplog: pytest.LogCaptureFixture) -> None:
    watch = SpikeWatch(window=4, short=2)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            watch.on_step(trainer_at(step, 2.0 + step / 100))
        watch.on_schedule(trainer_at(4, 0.0), [Change("route_temp", 1.0)])
        watch.on_step(trainer_at(4, 50.0))
        watch.losses.extend([2.0, 2.01, 2.0, 2.01])
        watch.on_schedule(trainer_at(5, 0.0), [Change("moe_enabled", True)])
        for step in range(5, 9):
            watch.on_step(trainer_at(step, 2.0))
        for step in range(9, 12):
            watch.on_step(trainer_at(step, 50.0))
    assert caplog.text == ""


def layers_at(step: int, *layers: tuple[float, float]) -> Any:
    """A trainer after an update whose row has (dead experts, load entropy) of each layer of 8 experts."""
    row: dict[str, float] = {"step": step}
    for number, (dead, entropy) in enumerate(layers):
        row |= {f"moe/layer_{number:02}/dead_experts": dead, f"moe/layer_{number:02}/load_entropy": entropy}
    model = nn.ModuleList(MoE(FeedForward(d_model=4, d_ff=8), num_experts=8, balance_loss_weight=0.01) for _ in layers)
    return SimpleNamespace(clock=Clock(epoch=1, step=step), last_row=row, model=model)


EVEN = (0, math.log(8))


@pytest.mark.parametrize("bad", [(3, math.log(5)), (0, math.log(3.5))], ids=["dead experts", "uneven load"])
def test_routing_that_stays_collapsed_is_reported_once_with_numbers(
    bad: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    watch = CollapseWatch(updates=20)
    with caplog.at_level(logging.WARNING):
        for step, now in ((0, bad), (10, EVEN), (20, bad), (30, bad)):  # it has been well in between
            watch.on_step(layers_at(step, EVEN, now))
        assert caplog.text == ""
        for step in (40, 50):
            watch.on_step(layers_at(step, EVEN, bad))
    assert caplog.text.count("has collapsed") == 1
    told = f"the routing of layer 1 has collapsed since step 20: {bad[0]} of its 8 experts get no token"
    assert f"epoch 1, step 40: {told}" in caplog.text
    assert f"as if {math.exp(bad[1]):.1f} were in use" in caplog.text
    assert "moe.balance_loss_weight (it is 0.01)" in caplog.text


def test_routing_that_is_uneven_for_a_while_is_nothing_to_report(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(updates=20)
    with caplog.at_level(logging.WARNING):
        for step in range(0, 100, 10):
            watch.on_step(layers_at(step, (0, math.log(3)) if step % 30 else EVEN))
            watch.on_step(layers_at(step, (1, math.log(6))))
        stale = layers_at(0, (8, 0.0))
        for _ in range(5):
            stale.clock = stale.clock.after_update(samples=1, tokens=1)  # updates without a row of their own
            watch.on_step(stale)
        for step in (200, 300):
            watch.on_step(layers_at(step, (8, 0.0)))  # two rows are too few
    assert caplog.text == ""


def test_a_run_whose_router_sends_all_to_two_experts_is_reported(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Pull(Callback):
        """A router that prefers two experts whatever it sees."""

        def on_batch_begin(self, trainer: Any) -> None:
            for layer in trainer.model.moe_layers:
                layer.router.weight.data[2:] = 0.0

    given = ("schedule.enable_moe_at_epoch=0", "moe.num_experts=8", "trainer.log_every=1")
    watch = CollapseWatch(updates=10)
    trainer = build_trainer(small(*given), log=lambda row: None, callbacks=[Pull(), watch])
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    assert caplog.text.count("has collapsed since step") == 1


def test_a_step_that_stalls_is_reported_and_the_log_shows_where_every_thread_stands(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "train.log"

    class Stall(Callback):
        def on_batch_begin(self, trainer: Any) -> None:
            if trainer.clock.step == 3:
                self.wait_for_the_dump()

        def wait_for_the_dump(self) -> None:
            until(lambda: "no batch has ended" in caplog.text and log.read_text().count("Thread 0x") >= 2, "a dump")

    watchdog = Watchdog(log, stall_seconds=2.0)
    trainer = build_trainer(
        small("schedule=none", "trainer.max_epochs=2"), log=lambda row: None, callbacks=[watchdog, Stall()]
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    assert caplog.text.count("no batch has ended") == 1
    assert "epoch 0, step 3" in caplog.text
    assert "wait_for_the_dump" in log.read_text()
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_memory_that_is_nearly_full_is_reported_once(
    small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    looks = 0

    def memory() -> dict[str, Memory | None]:
        nonlocal looks
        looks += 1
        return {"the host": Memory(96 * 2**30, 100 * 2**30), "cuda": Memory(94 * 2**30, 100 * 2**30), "other": None}

    class Wait(Callback):
        def on_batch_begin(self, trainer: Any) -> None:
            until(lambda: looks >= 3, "three looks")

    watchdog = Watchdog(tmp_path / "train.log", stall_seconds=None, every=0.01, memory=memory)
    trainer = build_trainer(
        small("schedule=none", "trainer.max_epochs=1"), log=lambda row: None, callbacks=[watchdog, Wait()]
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    assert caplog.text.count("the memory of the host is nearly full: 96.0 of 100.0 GiB") == 1
    assert caplog.text.count("nearly full") == 1


def test_the_hosts_memory_is_that_of_the_control_group_where_it_has_a_limit(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/slurm/job_7"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 400 kB\n")
    (group / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == Memory(600 * 1024, 1000 * 1024)
    (group / "memory.max").write_text("5000\n")
    (group / "memory.current").write_text("4000\n")
    (group / "memory.stat").write_text("anon 3000\ninactive_file 700\n")
    assert host_memory(tmp_path) == Memory(3300, 5000)
    assert host_memory(tmp_path / "nowhere") is None


def test_a_group_is_limited_by_those_above_it_and_the_one_with_the_least_left_counts(tmp_path: Path) -> None:
    write_groups(
        tmp_path,
        "0::/a/b",
        {
            "a/b/memory.max": "max",
            "a/b/memory.current": "10",
            "a/memory.max": "9000",
            "a/memory.current": "8000",
            "a/memory.stat": "inactive_file 100",
            "memory.max": "8000",
            "memory.current": "500",
            "memory.stat": "anon 1",
        },
    )
    assert host_memory(tmp_path) == Memory(7900, 9000)


def test_control_groups_of_version_1_count_too(tmp_path: Path) -> None:
    write_groups(
        tmp_path,
        "4:memory:/docker/x\n1:cpu,cpuacct:/docker/x\n0::/",  # the host's path; the container sees its own group on top
        {
            "memory/memory.limit_in_bytes": "5000",
            "memory/memory.usage_in_bytes": "4000",
            "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 700",
        },
    )
    assert host_memory(tmp_path) == Memory(3300, 5000)
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 400 kB\n")
    assert host_memory(tmp_path) == Memory(600 * 1024, 1000 * 1024)


def write_groups(root: Path, of_process: str, files: dict[str, str]) -> None:
    """Make a tree of control groups."""
    for name, text in [("proc/self/cgroup", of_process), *((f"sys/fs/cgroup/{n}", t) for n, t in files.items())]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
