"""The curriculum in Lightning: a callback for any LightningModule, and a trainer that runs a profile.

::

    trainer = lightning.Trainer(callbacks=[ScheduleCallback(schedule)], accumulate_grad_batches=2)
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError, Interrupted
from apt_model.integrations.horizon import HostRun, anew
from apt_model.integrations.hosted import EpochLoader, HostedTrainer, deciding_together, over_ranks, trained_parts
from apt_model.schedule import Clock, ScheduleRunner
from apt_model.training.schedule_driver import ScheduleDriver, Switches, Values, bind, numbers, sizes, subject_of

try:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy
except ImportError:
    raise ConfigError(
        "trainer: lightning is not installed. Run: pip install 'apt-launch[lightning]', or choose trainer=default."
    ) from None


class ScheduleCallback(pl.Callback):
    """Takes a curriculum through the training of any LightningModule.

    Before each optimizer update (not each batch) the model is set to the scheduled values of the clock. What the clock counts:

    * steps: updates of the first optimizer that really changed the weights. Where ``training_step`` makes several of them
      (manual optimization), each is one, and the model is set to the clock before the next forward pass.
    * samples and tokens: those of ``training_step``'s batches (see :func:`apt_model.training.schedule_driver.sizes`), over all
      processes, once each, when an update of any optimizer has changed the weights. Those of batches that only accumulate
      gradients wait for the update that takes them; those of an update that mixed precision skipped are left out.
    * epochs: Lightning's.

    Latches see what ``self.log`` logged in the update's last training step, what ``training_step`` returned beside the
    loss, ``train/loss`` (the mean over the update's batches), and after a validation what was logged there; of several
    updates in one training step, the last one's; in several processes, the first one's. The clock and the runner's state go
    into Lightning's checkpoints, and modules are switched before a checkpoint's weights are loaded. A ``fit`` that begins
    at step 0 begins the curriculum anew; one that continues, in the same trainer or from a checkpoint, continues it. In
    several processes modules can be enabled and disabled under ``strategy="ddp"``.

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
        self.driver = ScheduleDriver(schedule)
        self.values = values
        self.switches = switches
        self._run: HostRun | None = None
        self._hooks: list[Callable[[], Any]] = []
        self._world_size = 1
        self._wrapped: list[tuple[int, bool]] = []  # what Lightning's engine knows of the model
        self._forget()

    def _forget(self) -> None:
        """Forget what no update has had yet."""
        self._waiting = (0, 0)  # samples and tokens
        self._attempted = False  # whether an update was tried in this batch
        self._made = False  # whether the first optimizer made one that the clock does not have yet
        self._made_by_others = False
        self._losses: list[Tensor] = []
        self._logged_before: dict[str, Any] = {}

    @property
    def clock(self) -> Clock:
        """The clock of the current update, or of the next one."""
        return self.driver.clock

    @property
    def follower(self) -> ScheduleDriver:
        """``driver``, by its earlier name."""
        return self.driver

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Bind the curriculum; should a checkpoint be loaded, switch modules first, so that its weights fit.

        Raises:
            ConfigError: the curriculum names what the model does not have.
        """
        if stage != "fit":
            return
        self._release()
        if not trainer.global_step:
            self.driver.load_state_dict(anew(self.driver.schedule))
        model = subject_of(pl_module)
        bind(self.driver.schedule, model, values=self.values, switches=self.switches)
        theirs = pl_module.on_load_checkpoint

        # Lightning calls no callback before it loads weights
        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None:
                self.load_state_dict(state)
                getattr(model, "take_lineage", list)()  # the checkpoint has the optimizer's state
            theirs(checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint
        self._hooks.append(lambda: vars(pl_module).pop("on_load_checkpoint", None))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the model and its optimizers.

        Raises:
            ConfigError: the run does not fit the horizon.
        """
        self._release()
        self._world_size = trainer.world_size
        self._compare(trainer, pl_module)
        if self._world_size > 1:
            self.driver.schedule.broadcast = deciding_together(self.driver.schedule.broadcast)
            self._wrapped = trained_parts(pl_module)
        self.driver.connect(subject_of(pl_module), trainer.optimizers[0])
        for number, optimizer in enumerate(trainer.optimizers):
            self._hooks.append(optimizer.register_step_post_hook(partial(self._stepped, number)).remove)
        if not pl_module.automatic_optimization:  # there may be more than one update a batch
            for module in pl_module.modules():
                self._hooks.append(module.register_forward_pre_hook(partial(self._before_forward, pl_module)).remove)

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run = host_run(trainer, pl_module, self.driver.schedule)

    def _release(self) -> None:
        """Remove what listens to the module and its optimizers."""
        for remove in self._hooks:
            remove()
        self._hooks = []
        self._forget()

    def _stepped(self, number: int, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        # a fused optimizer is called also with gradients that overflowed, and leaves the weights alone
        if bool(getattr(optimizer, "found_inf", None) or 0.0):
            return
        if number:
            self._made_by_others = True
            return
        self._end_update({})  # of an update before this one, in the same batch
        self._made = True

    def _before_forward(self, pl_module: pl.LightningModule, *unused: Any) -> None:
        """Set the model to the clock between two updates of one training step."""
        if self._made:
            self._end_update({})
            self.driver.begin_update()
            if self._world_size > 1 and trained_parts(pl_module) != self._wrapped:
                raise ConfigError(
                    f"strategy: parameters were added, removed, frozen or unfrozen between two updates of one training_step, at "
                    f"{self.clock}, and processes that share a model can take that up between batches only. Make one update "
                    "a batch, or let such events happen where a batch begins."
                )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the epoch before with the plan, where that was not possible before it was over."""
        if self._run is not None:
            self._run.begin_epoch(trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the model to the clock, once an update.

        Raises:
            ConfigError: parameters were added, removed, frozen or unfrozen, and the strategy cannot take that up.
        """
        self.driver.clock = self.driver.clock.at_epoch(trainer.current_epoch)
        if not self.driver.begun:
            self.driver.begin_update()
            self._wrap(trainer, pl_module)
        self._count(batch)
        if self.driver.schedule.program.watched:
            self._logged_before = dict(trainer.callback_metrics)

    def _wrap(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let processes share parameters that are new; Lightning's engine has those of the beginning."""
        if self._world_size == 1:
            return
        found = trained_parts(pl_module)
        if found == self._wrapped:
            return
        if not isinstance(trainer.strategy, DDPStrategy):
            raise ConfigError(
                f"strategy: parameters were added, removed, frozen or unfrozen at {self.clock}, and "
                f"{type(trainer.strategy).__name__} shares those of the beginning.  Use strategy='ddp', which can take new ones."
            )
        self._wrapped = found
        trainer.strategy.model = pl_module
        trainer.strategy.configure_ddp()

    def _count(self, batch: Any) -> None:
        samples, tokens = sizes(batch)
        self._waiting = (self._waiting[0] + samples, self._waiting[1] + tokens)

    def _taken(self) -> tuple[int, int]:
        """Return the samples and tokens that waited for an update, over all processes; it has had them now."""
        samples, tokens = self._waiting
        self._waiting = (0, 0)
        self._made = self._made_by_others = False
        return over_ranks(samples, tokens, self._world_size)

    def _end_update(self, metrics: Mapping[str, float]) -> None:
        """Advance the clock, if the first optimizer has made an update that it does not have yet."""
        if not self._made:
            return
        samples, tokens = self._taken()
        self.driver.count(samples=samples, tokens=tokens)
        self.driver.end_update(metrics)
        if self._run is not None:
            self._run.end_update()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notice that an update is tried.

        Raises:
            ConfigError: this epoch of a stream has had all updates that were planned, and the curriculum goes by epochs.
        """
        if self._run is not None:
            self._run.before_update()
        self._attempted = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the update's last batch: show latches its metrics, and advance the clock if it has happened."""
        metrics = self._metrics(trainer, outputs)
        if self._made:
            self._end_update(metrics)
        elif self._made_by_others:
            samples, tokens = self._taken()
            clock = self.driver.clock
            self.driver.clock = replace(clock, sample=clock.sample + samples, token=clock.token + tokens)
            self.driver.schedule.observe(metrics)
        elif self._attempted:
            self.driver.skip_update()
            self._waiting = (0, 0)
            if self._run is not None:
                self._run.end_update()
        else:
            return
        self._attempted = False
        self._losses = []

    def _metrics(self, trainer: pl.Trainer, outputs: Any) -> dict[str, float]:
        if not self.driver.schedule.program.watched:
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
            self.driver.schedule.observe(self._logged_since(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Release module and optimizers."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release module and optimizers, whatever ended the loop."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return the clock and the runner's state, as plain values."""
        return self.driver.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, and set the model to it.

        Raises:
            ConfigError: the horizon has changed and ``on_horizon_change`` is ``error``.
        """
        self.driver.load_state_dict(state_dict)
        self.driver.schedule.reconcile()


def host_run(trainer: pl.Trainer, module: pl.LightningModule, schedule: ScheduleRunner) -> HostRun | None:
    """Return the run that ``trainer`` is about to make, compared with the horizon; None: a run to find mistakes.

    How many updates manual optimization makes is not known beforehand; nor how long an epoch of a stream is.

    Raises:
        ConfigError: it does not fit.
    """
    if trainer.fast_dev_run:
        return None
    stream = trainer.num_training_batches == math.inf
    varied = any(
        isinstance(callback, pl.callbacks.GradientAccumulationScheduler) and len(set(callback.scheduling.values())) > 1
        for callback in trainer.callbacks
    )
    known = module.automatic_optimization and not stream and not varied
    per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) if known else None
    limits = [trainer.max_steps] if trainer.max_steps >= 0 and module.automatic_optimization else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * (per_epoch or schedule.planned.updates_per_epoch))
    return HostRun(
        schedule,
        steps=min(limits, default=None),
        updates_per_epoch=per_epoch,
        set_by="max_epochs, max_steps, limit_train_batches or accumulate_grad_batches",
        stream=stream,
    )


class LightningTrainer(HostedTrainer):
    """Runs a profile in Lightning. Arguments: see :class:`apt_model.training.base.BaseTrainer`.

    Batches, precision, learning rate, rows, checkpoints and how ranks share a batch are those of
    :class:`apt_model.training.trainer.Trainer`, which can resume from its checkpoints; it cannot do that itself.
    """

    def fit(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            Interrupted: ``stop_requested`` said so; the update was finished and a checkpoint written.
            TrainingError: the run cannot continue.
        """
        loop = _Loop(self)
        scaled = self.scaler.is_enabled()
        self.engine.settle()
        with _quiet():
            trainer = pl.Trainer(
                accelerator=self.device.type,
                devices=[self.numbered_device.index] if self.device.type == "cuda" else 1,
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
                trainer.fit(_Module(self), EpochLoader(self))
            except SystemExit:  # Lightning's way to end after SIGTERM; the checkpoint is written by then
                if not loop.stopped:
                    raise
            finally:
                self.callbacks.notify("on_train_end", self)
        if loop.stopped:
            raise Interrupted(f"stopped on request before {self.clock}")


class _Loop(ScheduleCallback):
    """Hands the events of Lightning's loop to a trainer of this project, which counts and compares by itself."""

    def __init__(self, owner: LightningTrainer) -> None:
        super().__init__(owner.schedule)
        self.driver: LightningTrainer = owner
        self.stopped = False
        self._batch = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the curriculum bound as it is."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Lightning ends a run in the middle of an update; stop_requested, which gets the same signals, does not
        trainer._signal_connector.teardown()

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pass

    def _count(self, batch: Any) -> None:
        pass

    def _metrics(self, trainer: pl.Trainer, outputs: Any) -> dict[str, float]:
        return {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.driver.callbacks.notify("on_epoch_begin", self.driver)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        done = batch_idx + 1
        last = not done % self.driver.accumulate or done == len(self.driver.train_batches)
        self._batch.enter_context(self.driver.engine.batch(last=last))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch.close()
        self.driver.callbacks.notify("on_batch_end", self.driver)

    def on_train_batch_end(self, trainer: pl.Trainer, *details: Any) -> None:
        last = self._attempted
        super().on_train_batch_end(trainer, *details)
        if last:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.stopped:
            self.driver.end_epoch()
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if self.driver.asked_to_stop():
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
