"""The curriculum in Hugging Face transformers: a callback for any model, and a trainer that runs a profile.

::

    trainer = transformers.Trainer(model, args, callbacks=[ScheduleCallback(schedule)], ...)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError, Interrupted
from apt_model.integrations.loader import EpochLoader
from apt_model.schedule import Clock, ScheduleRunner
from apt_model.training.base import BaseTrainer
from apt_model.training.follower import Follower, Switches, Values, bind, numbers, sizes, subject_of

try:
    import accelerate  # noqa: F401 - transformers' trainer needs it, and says so later
    import transformers
    from transformers.trainer_callback import ExportableState
except ImportError:
    raise ConfigError(
        "trainer: transformers and accelerate are not installed. Run: pip install 'apt-launch[hf]', or choose trainer=default."
    ) from None

ALIASES = {"eval_loss": "val/loss", "learning_rate": "lr", "grad_norm": "train/grad_norm"}
"""Names of the library, and what a latch may call them, too."""


class ScheduleCallback(transformers.TrainerCallback, ExportableState):
    """Takes a curriculum through the training of any model in ``transformers.Trainer``.

    Before each optimizer update (not each batch) the model is brought to what the clock says; the clock goes on after
    updates that really changed the weights, which ``state.global_step`` does not tell. Samples and tokens are those of the
    model's inputs (see :func:`apt_model.training.follower.sizes`), over all processes. Latches see ``train/loss`` (the mean
    of the loss in the model's outputs over the update's batches), the outputs' ``metrics`` if there are any, what the
    trainer logs, and what an evaluation gives, ``eval_loss`` also as ``val/loss``. The clock and the runner's state go into
    ``trainer_state.json`` of each checkpoint; before a resume call :meth:`restore`.

    Args:
        schedule: a runner that nothing is bound to yet; its horizon must fit the run.
        values: targets and their setters; None: every value that a module declares as scheduled.
        switches: modules and what switches them; None: those of the model's ``switches()``, if it has them.

    The model is the first submodule that has ``switches()``, or else all of it. Give the callback to the trainer's
    constructor: one that is added later is not part of checkpoints.
    """

    def __init__(
        self, schedule: ScheduleRunner, *, values: Values | None = None, switches: Switches | None = None
    ) -> None:
        self.follower = Follower(schedule)
        self.values = values
        self.switches = switches
        self._bound = False
        self._restored = False
        self._losses: list[Tensor] = []
        self._told: Mapping[str, Any] = {}
        self._hooks: list[Callable[[], None]] = []

    @property
    def clock(self) -> Clock:
        """The clock of the update in the making, or of the next one."""
        return self.follower.clock

    def restore(self, checkpoint: str | Path, model: nn.Module) -> None:
        """Take up what ``checkpoint`` has, and switch the modules of ``model`` so that its weights fit.

        Call it before ``trainer.train(resume_from_checkpoint=checkpoint)``, which loads no weights for modules that are not
        there.

        Raises:
            ConfigError: the checkpoint is not one with a curriculum, or has another horizon.
        """
        path = Path(checkpoint) / "trainer_state.json"
        if not path.is_file():
            raise ConfigError(f"{checkpoint} is no checkpoint of transformers: there is no {path.name} in it.")
        saved = transformers.TrainerState.load_from_json(str(path)).stateful_callbacks or {}
        if type(self).__name__ not in saved:
            raise ConfigError(f"{path} has no curriculum in it: it was made without {type(self).__name__}.")
        self._bind(model)
        self.follower.load_state_dict(saved[type(self).__name__]["attributes"]["saved"])
        self.follower.schedule.reconcile()
        getattr(subject_of(model), "take_lineage", list)()  # the checkpoint has the optimizer's state
        self._restored = True

    def _bind(self, model: nn.Module) -> None:
        if not self._bound:
            bind(self.follower.schedule, subject_of(model), values=self.values, switches=self.switches)
            self._bound = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Bind the curriculum, take up model and optimizer, and listen to them.

        Raises:
            ConfigError: the curriculum names what the model does not have, or this is a resume without :meth:`restore`.
        """
        model, optimizer = given["model"], _unwrapped(given["optimizer"])
        if state.global_step and not self._restored:
            raise ConfigError(
                "a resume needs the curriculum's state before the weights are loaded, so that modules are switched. Call "
                f"{type(self).__name__}.restore(checkpoint, model) before trainer.train(resume_from_checkpoint=checkpoint)."
            )
        self._bind(model)
        self.follower.connect(subject_of(model), optimizer)
        self._hooks = [self.follower.watch(), *self._listen(model, args.world_size)]

    def _listen(self, model: nn.Module, world_size: int) -> list[Callable[[], None]]:
        """Count each batch that ``model`` trains on, and keep what it tells; callbacks are shown neither."""

        def forward(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], outputs: Any) -> None:
            if not module.training:
                return
            samples, tokens = sizes([given, args])
            self.follower.count(samples=samples * world_size, tokens=tokens * world_size)
            if self.follower.schedule.program.watched:
                loss, self._told = (_part(outputs, name) for name in ("loss", "metrics"))
                if isinstance(loss, Tensor):
                    self._losses.append(loss.detach())

        return [model.register_forward_hook(forward, with_kwargs=True).remove]

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Bring the model to the clock."""
        self.follower.clock = self.follower.clock.at_epoch(int(state.epoch))
        self._losses = []
        self.follower.begin_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Show latches the update's metrics, and let the clock go on if it has happened."""
        if not self.follower.happened:
            self.follower.skip_update()
            return
        metrics = {}
        if self.follower.schedule.program.watched:
            metrics = numbers(self._told or {})
            if self._losses:
                metrics["train/loss"] = torch.stack(self._losses).mean().item()
        self.follower.end_update(metrics)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **given: Any) -> None:
        """Show latches what the trainer logs of training."""
        self._observe({name: value for name, value in (logs or {}).items() if not name.startswith("eval_")})

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **given: Any
    ) -> None:
        """Show latches what an evaluation gave."""
        self._observe(metrics or {})

    def _observe(self, metrics: Mapping[str, Any]) -> None:
        found = numbers(metrics)
        self.follower.schedule.observe(
            found | {ours: found[theirs] for theirs, ours in ALIASES.items() if theirs in found}
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let model and optimizer go."""
        for remove in self._hooks:
            remove()
        self._hooks = []

    def state(self) -> dict[str, Any]:
        """Return the clock and the runner's state, as the library keeps them: plain values for JSON."""
        return {"args": {}, "attributes": {"saved": self.follower.state_dict()}}


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself; accelerate wraps it."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        optimizer = optimizer.optimizer
    return optimizer


def _part(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


class HFTrainer(BaseTrainer):
    """Runs a profile in ``transformers.Trainer``: one process, one device.

    Batches, precision, learning rate, rows and checkpoints are those of :class:`apt_model.training.trainer.Trainer`, which
    can go on from its checkpoints; it cannot do that itself. Arguments: see :class:`apt_model.training.base.BaseTrainer`.

    Raises:
        ConfigError: also for a CUDA device other than the first, which this library cannot choose.
    """

    def fit(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            ConfigError: the device is another than the first.
            Interrupted: ``stop_requested`` said so; the update was finished and a checkpoint written.
            TrainingError: the run cannot go on.
        """
        if self.device.index:
            raise ConfigError(
                f"trainer.device: transformers takes the first device, not {self.device}. Set trainer.device=cuda and "
                f"CUDA_VISIBLE_DEVICES={self.device.index}."
            )
        loop = _Loop(self)
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,  # nothing is written there
                use_cpu=self.device.type == "cpu",
                fp16=self.scaler.is_enabled(),
                num_train_epochs=self.max_epochs,
                per_device_train_batch_size=self.train_batches.sampler.batch_size,
                gradient_accumulation_steps=self.accumulate,
                max_grad_norm=float("inf"),  # unscales gradients; this trainer limits them itself
                seed=self.seed,
                save_strategy="no",
                eval_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            if arguments.n_gpu > 1:
                arguments._n_gpu = 1  # no DataParallel
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                trainer = _Trainer(self, arguments, loop)  # which seeds anew
            if trainer.accelerator.scaler is not None:
                self.scaler = trainer.accelerator.scaler
            self.callbacks.notify("on_train_begin", self)
            try:
                trainer.train()
            finally:
                self.callbacks.notify("on_train_end", self)
        if loop.stopped:
            raise Interrupted(f"stopped on request before {self.clock}")


class _Loop(ScheduleCallback):
    """Hands the events of transformers' loop to a trainer of this project."""

    def __init__(self, owner: HFTrainer) -> None:
        super().__init__(owner.schedule)
        self.follower: HFTrainer = owner
        self.stopped = False

    def _bind(self, model: nn.Module) -> None:
        """Leave the curriculum bound as it is."""

    def _listen(self, model: nn.Module, world_size: int) -> list[Callable[[], None]]:
        return []  # the trainer counts

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.follower.callbacks.notify("on_epoch_begin", self.follower)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.follower.clip(scaled=self.follower.scaler.is_enabled())

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        super().on_step_end(args, state, control, **given)
        self._stop_if_asked(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self.stopped:
            self.follower.end_epoch()
            self._stop_if_asked(control)

    def _stop_if_asked(self, control: Any) -> None:
        if self.follower.asked_to_stop():
            self.stopped = control.should_training_stop = True


class _Trainer(transformers.Trainer):
    """The library's trainer, given everything by one of this project."""

    def __init__(self, owner: HFTrainer, arguments: transformers.TrainingArguments, loop: _Loop) -> None:
        self.owner = owner
        constant = torch.optim.lr_scheduler.LambdaLR(owner.optimizer, lambda step: 1.0)  # the rate is set each update
        super().__init__(model=owner.model, args=arguments, callbacks=[loop], optimizers=(owner.optimizer, constant))
        self.remove_callback(transformers.PrinterCallback)

    def get_train_dataloader(self) -> Any:
        return EpochLoader(self.owner.train_batches, self.owner.device, as_mapping=True)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *unused: Any, **others: Any) -> Tensor:
        return self.owner.loss_of(inputs["tokens"], inputs["targets"])

    def training_step(self, *arguments: Any, **others: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **others)
        self.owner.callbacks.notify("on_batch_end", self.owner)
        return loss
