"""What tests of the callback in transformers share: models of other people, in the library's own trainer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from apt_model.integrations.transformers import ScheduleCallback
from apt_model.schedule import ScheduleRunner
from tests.integrations.curriculum import net, runner


class Plain(nn.Module):
    """A language model with the library's interface, which knows nothing of curricula."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
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


class Stream(IterableDataset[Any]):
    """Rows that do not say how many they are."""

    def __init__(self, number: float) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        kept = rows(14)
        count = itertools.count() if self.number == math.inf else range(int(self.number))
        for number in count:
            yield kept[number % 14]


def streamed(folder: Path, number: float, schedule: ScheduleRunner, model: Plain | None = None) -> Plain:
    model = Plain() if model is None else model
    model.callback = ScheduleCallback(schedule)
    trainer = made(model, model.callback, folder, max_steps=12, save_strategy="no")
    trainer.train_dataset = Stream(number)
    trainer.train()
    return model


def hooks(model: nn.Module, trainer: transformers.Trainer) -> int:
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return len(model._forward_pre_hooks) + len(model._forward_hooks) + len(optimizer._optimizer_step_post_hooks)


class Stops(transformers.TrainerCallback):
    """Ends the loop from within, where it is asked to."""

    def __init__(self, event: str, error: type[BaseException]) -> None:
        setattr(self, event, self.stop)
        self.error: type[BaseException] | None = error

    def stop(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        error = self.error
        if state.global_step == 4 and error is not None:
            self.error = None
            raise error("CUDA out of memory.")
