"""The curriculum in Lightning: a callback for any LightningModule, and a trainer that runs a profile.

::

    trainer = lightning.Trainer(callbacks=[ScheduleCallback(schedule)], accumulate_grad_batches=2)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError, Interrupted
from apt_model.integrations.loader import EpochLoader
from apt_model.schedule import Clock, ScheduleRunner
from apt_model.training.base import BaseTrainer
from apt_model.training.follower import Follower, Switches, Values, bind, numbers, sizes, subject_of

try:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.plugins.environments import LightningEnvironment
except ImportError:
    raise ConfigError(
        "trainer: lightning is not installed. Run: pip install 'apt-launch[lightning]', or choose trainer=default."
    ) from None


class ScheduleCallback(pl.Callback):
    """Takes a curriculum through the training of any LightningModule.

    Before each optimizer update (not each batch) the model is brought to what the clock says; the clock goes on after
    updates that really changed the weights, of the first optimizer. Samples and tokens are those of ``training_step``'s
    batches (see :func:`apt_model.training.follower.sizes`), over all processes. Latches see what ``self.log`` logged in the
    update's last training step, what ``training_step`` returned beside the loss, ``train/loss`` (the mean over the update's
    batches), and after a validation what was logged there. The clock and the runner's state go into Lightning's
    checkpoints, and modules are switched before a checkpoint's weights are loaded.

    Args:
        schedule: a runner that nothing is bound to yet; its horizon must fit the run.
        values: targets and their setters; None: every value that a module declares as scheduled.
        switches: modules and what switches them; None: those of the model's ``switches()``, if it has them.

    The model is the first submodule that has ``switches()``, or else the LightningModule itself.
    """

    def __init__(
        self, schedule: ScheduleRunner, *, values: Values | None = None, switches: Switches | None = None
    ) -> None:
        super().__init__()
        self.follower = Follower(schedule)
        self.values = values
        self.switches = switches
        self._attempted = False
        self._losses: list[Tensor] = []
        self._logged_before: dict[str, Any] = {}

    @property
    def clock(self) -> Clock:
        """The clock of the update in the making, or of the next one."""
        return self.follower.clock

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Bind the curriculum; should a checkpoint be loaded, switch modules first, so that its weights fit.

        Raises:
            ConfigError: the curriculum names what the model does not have.
        """
        if stage != "fit":
            return
        model = subject_of(pl_module)
        bind(self.follower.schedule, model, values=self.values, switches=self.switches)
        theirs = pl_module.on_load_checkpoint

        # Lightning calls no callback before it loads weights
        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None:
                self.load_state_dict(state)
                getattr(model, "take_lineage", list)()  # the checkpoint has the optimizer's state
            theirs(checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the model and its optimizer."""
        vars(pl_module).pop("on_load_checkpoint", None)
        self.follower.connect(subject_of(pl_module), trainer.optimizers[0])
        self._stop_watching = self.follower.watch()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Bring the model to the clock, once an update."""
        self.follower.clock = self.follower.clock.at_epoch(trainer.current_epoch)
        if not self.follower.begun:
            self._losses = []
            self.follower.begin_update()
        self._count(batch, trainer.world_size)
        if self.follower.schedule.program.watched:
            self._logged_before = dict(trainer.callback_metrics)

    def _count(self, batch: Any, world_size: int) -> None:
        samples, tokens = sizes(batch)
        self.follower.count(samples=samples * world_size, tokens=tokens * world_size)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notice that an update is tried."""
        self._attempted = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the update's last batch: show latches its metrics, and let the clock go on if it has happened."""
        metrics = self._metrics(trainer, outputs)
        if not self._attempted:
            return
        self._attempted = False
        if self.follower.happened:
            self.follower.end_update(metrics)
        else:
            self.follower.skip_update()

    def _metrics(self, trainer: pl.Trainer, outputs: Any) -> dict[str, float]:
        if not self.follower.schedule.program.watched:
            return {}
        outputs = dict(outputs) if isinstance(outputs, Mapping) else {"loss": outputs}
        loss = outputs.pop("loss", None)
        if isinstance(loss, Tensor):  # Lightning has divided it
            self._losses.append(loss.detach() * trainer.accumulate_grad_batches)
        mean = {"train/loss": torch.stack(self._losses).mean().item()} if self._losses else {}
        return mean | self._logged_since(trainer) | numbers(outputs)

    def _logged_since(self, trainer: pl.Trainer) -> dict[str, float]:
        before = self._logged_before
        return numbers({name: v for name, v in trainer.callback_metrics.items() if before.get(name) is not v})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what was logged before the validation."""
        self._logged_before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show latches what the validation logged."""
        if not trainer.sanity_checking:
            self.follower.schedule.observe(self._logged_since(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the optimizer go."""
        self._stop_watching()

    def state_dict(self) -> dict[str, Any]:
        """Return the clock and the runner's state, as plain values."""
        return self.follower.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, and bring the model to it.

        Raises:
            ConfigError: the horizon has changed and ``on_horizon_change`` is ``error``.
        """
        self.follower.load_state_dict(state_dict)
        self.follower.schedule.reconcile()


class LightningTrainer(BaseTrainer):
    """Runs a profile in Lightning: one process, one device. Arguments: see :class:`apt_model.training.base.BaseTrainer`.

    Batches, precision, learning rate, rows and checkpoints are those of :class:`apt_model.training.trainer.Trainer`, which
    can go on from its checkpoints; it cannot do that itself.
    """

    def fit(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            Interrupted: ``stop_requested`` said so; the update was finished and a checkpoint written.
            TrainingError: the run cannot go on.
        """
        loop = _Loop(self)
        scaled = self.scaler.is_enabled()
        with _quiet():
            trainer = pl.Trainer(
                accelerator=self.device.type,
                devices=[self.device.index or 0] if self.device.type == "cuda" else 1,
                max_epochs=self.max_epochs,
                accumulate_grad_batches=self.accumulate,
                callbacks=[loop],
                plugins=[
                    LightningEnvironment(),  # under SLURM, too: a job's number of tasks is the launcher's business
                    *([MixedPrecision("16-mixed", "cuda", self.scaler)] if scaled else []),
                ],
                limit_val_batches=0,
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            self.callbacks.notify("on_train_begin", self)
            try:
                trainer.fit(_Module(self), EpochLoader(self.train_batches, self.device))
            except SystemExit:  # Lightning's way to end after SIGTERM; the checkpoint is written by then
                if not loop.stopped:
                    raise
            finally:
                self.callbacks.notify("on_train_end", self)
        if loop.stopped:
            raise Interrupted(f"stopped on request before {self.clock}")


class _Loop(ScheduleCallback):
    """Hands the events of Lightning's loop to a trainer of this project."""

    def __init__(self, owner: LightningTrainer) -> None:
        super().__init__(owner.schedule)
        self.follower: LightningTrainer = owner
        self.stopped = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the curriculum bound as it is."""

    def _count(self, batch: Any, world_size: int) -> None:
        """Leave it to the trainer."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.follower.callbacks.notify("on_epoch_begin", self.follower)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.follower.callbacks.notify("on_batch_end", self.follower)

    def on_train_batch_end(self, trainer: pl.Trainer, *details: Any) -> None:
        last = self._attempted
        super().on_train_batch_end(trainer, *details)
        if last:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.stopped:
            self.follower.end_epoch()
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self.follower.asked_to_stop():
            self.stopped = trainer.should_stop = True


class _Module(pl.LightningModule):
    """A trainer's model as Lightning wants it."""

    def __init__(self, owner: LightningTrainer) -> None:
        super().__init__()
        self.model: nn.Module = owner.model
        self.owner = owner

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.owner.loss_of(*batch)
        accumulate = self.owner.accumulate
        first = batch_idx - batch_idx % accumulate
        num_batches = min(accumulate, len(self.owner.train_batches) - first)
        # Lightning divides by accumulate also where an epoch's last update takes fewer batches
        return loss if num_batches == accumulate else loss * (accumulate / num_batches)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.owner.optimizer

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *unused: Any, **others: Any) -> None:
        scaler = self.owner.scaler
        if scaler.is_enabled() and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves this to a fused optimizer, which would do it after clipping
        self.owner.clip(scaled=scaler.is_enabled())


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Lightning's notes, and its warnings about its own use of torch."""
    theirs = logging.getLogger("lightning.pytorch")
    level = theirs.level
    theirs.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
            warnings.filterwarnings("ignore", message="The `srun` command is available")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.")
            yield
    finally:
        theirs.setLevel(level)
