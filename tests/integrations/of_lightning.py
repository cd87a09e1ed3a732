"""What tests of the callback in Lightning share: models of other people, in the library's own trainer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from apt_model.integrations.lightning import ScheduleCallback
from apt_model.schedule import Horizon, ScheduleRunner
from tests.integrations.curriculum import net, runner


class Plain(pl.LightningModule):
    """A language model of its own making, which knows nothing of curricula."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.seen: list[tuple[Any, ...]] = []
        self.callback: ScheduleCallback | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        assert self.callback is not None
        layer = self.net.moe_layers[-1]
        values = (layer.temperature.item(), self.net.align.weight.item())
        self.seen.append((self.callback.clock, *values, layer.enabled, self.net.align.enabled))
        output = self.net(*batch)
        self.log("entropy", 10.0 - batch_idx, on_step=True)
        return output.language_loss + output.auxiliary_loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(*batch).language_loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def batches(number: int = 5) -> DataLoader[Any]:
    tokens = torch.randint(0, 20, (2 * number, 7), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=2, generator=torch.Generator())


def trainer(callback: ScheduleCallback, folder: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    given = {"max_epochs": 4, "accumulate_grad_batches": 2, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return pl.Trainer(callbacks=[callback], default_root_dir=folder, **{**quiet, **given, **options})


def fit(folder: Path, schedule: ScheduleRunner | None = None, **options: Any) -> Plain:
    module = Plain()
    module.callback = ScheduleCallback(schedule or runner())
    path = options.pop("ckpt_path", None)
    validation = options.pop("validation", None)
    module.made = trainer(module.callback, folder, **options)
    module.made.fit(module, batches(), validation, ckpt_path=path)
    return module


class Dial(nn.Module):
    """Somebody's module with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.strength = 1.0
        self.on = False


class Dialled(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.dial = Dial()
        self.seen: list[tuple[float, bool]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append((self.dial.strength, self.dial.on))
        return self.dial.linear(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(pl.LightningModule):
    """Steps its optimizers by itself: ``plan`` says which of them in which batch (counted over epochs), in order."""

    def __init__(self, plan: Callable[[int], Sequence[int]]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
        self.strength = 0.0
        self.plan = plan
        self.batches = 0
        self.seen: list[tuple[int, int, float]] = []
        self.callback: ScheduleCallback | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for number in self.plan(self.batches):
            loss = self.parts[number](batch[0]).square().mean()
            assert self.callback is not None
            self.seen.append((self.callback.clock.step, self.callback.clock.sample, self.strength))
            self.manual_backward(loss)
            optimizer = self.optimizers()[number]
            optimizer.step()
            optimizer.zero_grad()
        self.batches += 1

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.parts]


def manual(folder: Path, plan: Callable[[int], Sequence[int]], horizon: Horizon, **options: Any) -> Manual:
    """Train on epochs of 7 batches of 8 samples; ``strength`` is the number of the update."""
    module = Manual(plan)
    last = horizon.steps - 1
    schedule = ScheduleRunner(
        horizon=horizon, anneals={"s": {"target": "strength", "start": 0.0, "end": float(last), "by": "step"}}
    )
    module.callback = ScheduleCallback(schedule, values={"strength": partial(setattr, module, "strength")}, switches={})
    loader = DataLoader(TensorDataset(torch.randn(56, 3)), batch_size=8)
    trainer(module.callback, folder, accumulate_grad_batches=1, max_epochs=horizon.epochs, **options).fit(
        module, loader
    )
    return module


class Stream(IterableDataset[Any]):
    """Batches that do not say how many they are."""

    def __init__(self, number: float) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        count = itertools.count() if self.number == math.inf else range(int(self.number))
        for _ in count:
            yield torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
