"""Updates whose numbers are read only where a row is logged, as on CUDA: nothing is lost, and nothing waits between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apt_launch.config.run_config import RunConfig
from apt_model.errors import NonFiniteError
from apt_model.training.callbacks import Callback
from apt_model.training.trainer import Trainer
from tests.training.test_trainer import Run

Small = Callable[..., RunConfig]
EXPERTS = ("schedule=none", "schedule.enable_moe_at_epoch=0", "moe.capacity_factor=null")


def test_rows_and_weights_are_those_of_reading_each_update(small: Small) -> None:
    runs = []
    for late in (False, True):
        run = Run(small("trainer.log_every=5", "trainer.accumulate=2"))
        run.trainer.meter.reads_every_update = not late
        run.trainer.fit()
        runs.append(run)
    at_once, late = runs
    assert late.told() == at_once.told()
    assert all(torch.equal(value, late.weights()[name]) for name, value in at_once.weights().items())


class Reads(TorchDispatchMode):
    """Notes what makes a host wait for its device: numbers read, and shapes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
        ):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def make_update(trainer: Trainer, batches: Any) -> None:
    trainer.begin_update()
    trainer.step(batches)
    trainer.end_update()


def test_nothing_is_read_in_an_update_without_a_row(small: Small) -> None:
    trainer = Run(small(*EXPERTS, "trainer.log_every=3")).trainer
    trainer.meter.reads_every_update = False
    updates = trainer._updates(0)
    make_update(trainer, next(updates))  # a row, for the switch
    with Reads() as quiet:
        make_update(trainer, next(updates))
    with Reads() as logged:
        make_update(trainer, next(updates))
        make_update(trainer, next(updates))
    assert quiet.found == ["aten._local_scalar_dense.default"], (
        "whether all positions count: only the CPU looks that up"
    )
    assert len(logged.found) > 2  # the mode sees what it looks for


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_was_not_finite_left_the_weights_and_is_reported_with_its_own_clock(small: Small, device: str) -> None:
    class Poison(Callback):
        def on_batch_end(self, trainer: Trainer) -> None:
            if trainer.clock.step == 1:
                before.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
                trainer.model.norm.weight.grad[0] = float("nan")

        def on_step(self, trainer: Trainer) -> None:
            if trainer.clock.step == 1:
                after.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    before: list[dict[str, torch.Tensor]] = []
    after: list[dict[str, torch.Tensor]] = []
    run = Run(small("schedule=none", "trainer.log_every=3", f"trainer.device={device}"), callbacks=[Poison()])
    run.trainer.meter.reads_every_update = False
    with pytest.raises(NonFiniteError, match=r"the gradient's norm is nan at epoch 0, step 1"):
        run.trainer.fit()
    assert [row["step"] for row in run.rows] == [0]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert all(torch.isfinite(value).all() for value in run.weights().values())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of the debug mode, and the compiler's own
@pytest.mark.parametrize(
    "more",
    ["moe.router=softmax", "moe.router=sigmoid", "trainer.activation_checkpointing=true", "trainer.compile=true"],
)
def test_no_update_without_a_row_waits_for_the_gpu(small: Small, more: str) -> None:
    given = ("schedule=none", "schedule.enable_moe_at_epoch=0", "schedule.enable_voter_at_epoch=0")
    trainer = Run(small(*given, more, "trainer.log_every=4", "trainer.device=cuda", "trainer.precision=bf16")).trainer
    assert not trainer.reads_every_update
    updates = trainer._updates(0)
    make_update(trainer, next(updates))  # with a row
    make_update(trainer, next(updates))  # without, which compiles another graph
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        make_update(trainer, next(updates))
    finally:
        torch.cuda.set_sync_debug_mode("default")
