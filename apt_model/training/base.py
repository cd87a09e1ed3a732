"""What every trainer has in common: how a run is set up, what an update is, what is logged, checked and saved."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from apt_model.data import Corpus, Sampler
from apt_model.data.batches import Batches
from apt_model.errors import CheckpointError, ConfigError, HorizonError, TrainingError
from apt_model.ignored import IGNORED
from apt_model.layers import balance
from apt_model.layers.documents import Documents
from apt_model.schedule import Anneal, Change, Clock, ScheduleRunner
from apt_model.schedule.targets import OF_OPTIMIZER
from apt_model.training.callbacks import Callback, Callbacks, Named
from apt_model.training.checkpoint import Checkpoints
from apt_model.training.compiling import compile_model, compiling
from apt_model.training.device import choose_device, choose_dtype
from apt_model.training.distributed import Ranks, any_rank, barrier, gathered
from apt_model.training.ema import WeightAverage
from apt_model.training.meter import Meter, Row
from apt_model.training.optimizer import groups_for, named_state
from apt_model.training.options import CheckpointOptions, ComputeOptions, LoopOptions, NonFinitePolicy
from apt_model.training.parallel import engine
from apt_model.training.qk_clip import QKClip
from apt_model.training.randomness import random_state
from apt_model.training.saved_state import read_state
from apt_model.training.schedule_driver import ScheduleDriver, bind, restore_weights
from apt_model.training.sharding import clip_gradients, gathered_state, gradient_norm
from apt_model.training.subject import Forward, Loss, parameter_parts, recompute_blocks
from apt_model.training.validation import Validation

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]

OF_PARTS = ("moe/layer_", "train/grad_norm/")
"""Metrics that are computed for rows in full, as is the cosine of experts, by how their names begin."""


class BaseTrainer(ScheduleDriver):
    """What every trainer of this project has in common; a subclass runs the loop, or has it run, in :meth:`fit`.

    On CUDA the host does not wait for the device but where a row is logged: losses and norms of the updates between are read
    there, and what is not finite left the weights as they were until then. With ``on_nonfinite`` other than ``stop``, in fp16,
    and where a latch watches training, each update is read at once.

    A row goes to ``log`` when the curriculum changed something, every ``log_every`` updates, at each epoch's last update,
    and after each validation. Where only a value has moved, it has no metrics of single layers. Its ``step`` and ``epoch``
    are the clock of its update, from 0; its ``tokens`` and ``time`` (seconds of training) count what that update took, too.

    Args:
        model: moved to the device; what it may be and offer: :mod:`apt_model.training.subject`.
        optimizer: called with parameter groups.
        schedule: a runner whose horizon fits ``corpus`` and ``loop``.
        corpus: text in two splits.
        loop, compute, saving, nonfinite: see :mod:`apt_model.training.options`.
        loss: takes the place of the model's own; see :data:`apt_model.training.subject.Loss`.
        resume: the folder of a checkpoint to resume from.
        checkpoints: where they go; None: none are written.
        log: receives every row.
        callbacks: see :class:`apt_model.training.callbacks.Callback`.
        stop_requested: asked after each update; True makes it the last one before a checkpoint and ``Interrupted``.

    Raises:
        ConfigError: the device or its precision is not there, the corpus is too small, ranks cannot share a batch, this trainer
            cannot resume, or the checkpoint holds something that no run goes on from.
    """

    model: nn.Module
    can_resume: ClassVar[bool] = False
    shares_batches: ClassVar[bool] = False  # among the ranks of a process group
    may_read_late: ClassVar[bool] = False  # whether its loop makes updates before it knows the numbers of earlier ones

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: ScheduleRunner,
        corpus: Corpus,
        loop: LoopOptions,
        compute: ComputeOptions,
        saving: CheckpointOptions,
        nonfinite: NonFinitePolicy,
        loss: Loss | None = None,
        resume: Path | None = None,
        checkpoints: Checkpoints | None = None,
        log: Callable[[Row], None] = lambda row: None,
        callbacks: Sequence[Callback | Named] = (),
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(schedule)
        if resume is not None and not self.can_resume:
            raise ConfigError(
                f"trainer.resume: {type(self).__name__} cannot go on from a checkpoint. Go on from it with trainer=default."
            )
        if resume is not None:  # before anything is written or trained
            try:
                read_state(resume)
            except CheckpointError as error:
                raise ConfigError(f"trainer.resume: {error}") from None
        self.loop, self.compute, self.saving, self.nonfinite = loop, compute, saving, nonfinite
        self.resume = resume
        self.checkpoints = checkpoints
        self.log = log
        self.callbacks = Callbacks(callbacks)
        self.stop_requested = stop_requested
        self.forks: frozenset[int] = frozenset()
        """Updates before which a checkpoint is written, for other runs that begin there."""

        self.device = choose_device(compute.device)
        self.autocast_dtype = choose_dtype(compute.precision, self.device)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.autocast_dtype == torch.float16)
        self.ranks = Ranks.of_group() if self.shares_batches else Ranks()
        if loop.batch_size % self.ranks.world:
            raise ConfigError(
                f"trainer.batch_size = {loop.batch_size} cannot be shared by {self.ranks.world} ranks. Make it a multiple of "
                f"{self.ranks.world}."
            )
        self.model = model.to(self.device).train()
        self.qk_clip = None if loop.qk_clip is None else QKClip(self.model, loop.qk_clip)
        recompute_blocks(self.model, compute.activation_checkpointing)
        self.borders = corpus.borders
        self.forward = Forward(self.model, loss, self.borders)
        self.engine = engine(
            compute.parallel,
            self.model,
            self.ranks,
            expert_parallel=compute.expert_parallel,
            dtype=self.autocast_dtype,
            device_type=self.device.type,
        )
        self.compiled = compute.compile
        if self.compiled:
            compile_model(self.model, self.device, whole=self.engine.whole_blocks)
        try:
            self.optimizer = optimizer(groups_for(optimizer, model, loop.weight_decay))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"optimizer: it cannot be made for this model: {error}. Mend that, or choose another, such as optimizer=adamw."
            ) from error
        self.average = None if loop.ema is None else WeightAverage(self.model, loop.ema)
        self.base_lr: float = self.optimizer.param_groups[0]["lr"]
        self._lr_factor = self._lay_out_lr()
        self._bind()
        self.train_batches = self._batches(corpus, "train", loop.max_batches_per_epoch)
        self.val_batches = self._batches(corpus, "val", loop.validation_batches)
        self._report_packing()
        self.meter = Meter(self.model, self.ranks, reads_every_update=self._must_read_every_update())
        self.validation = Validation(
            self.model,
            self.forward,
            self.val_batches,
            seed=loop.seed,
            device=self.device,
            autocast=self._autocast,
            compiled=self.compiled,
        )
        self.batches_done = 0  # of this epoch
        self.updates_done = 0  # of this epoch, skipped ones not counted
        self.updates_skipped = 0  # of this epoch
        self._weights: Tensor | None = None  # of the batches of an update; None: they count alike
        self.rows = 0
        self.seconds = 0.0
        self._saved_at = 0.0  # of these seconds
        self._saved_before: Clock | None = None  # the update that the last checkpoint was written before
        self.last_row: Row = {}

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return self.loop.seq_len or int(self.model.seq_len)  # type: ignore[arg-type]

    @property
    def max_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.loop.max_epochs

    @property
    def accumulate(self) -> int:
        """Batches an update."""
        return self.loop.accumulate

    @property
    def seed(self) -> int:
        """The seed of the order of training's batches."""
        return self.loop.seed

    @property
    def last_loss(self) -> Tensor:
        """The loss of the last update, 0-dim; to read it waits for the device."""
        return self.meter.last_loss

    @property
    def reads_every_update(self) -> bool:
        """Whether each update's numbers are read at once."""
        return self.meter.reads_every_update

    def _batches(self, corpus: Corpus, split: Literal["train", "val"], limit: int | None) -> Batches:
        tokens = corpus.read(split)
        sampler = Sampler(
            num_tokens=len(tokens),
            seq_len=self.seq_len,
            batch_size=self.loop.batch_size,
            seed=self.loop.seed if split == "train" else 0,  # losses of several seeds are of the same batches
            limit=limit,
            name=split,
        )
        return Batches(tokens, sampler, self.borders)

    def _report_packing(self) -> None:
        """Say how the documents of the first batch share its sequences."""
        if self.borders is None:
            return
        tokens, targets = next(self.train_batches.epoch(0))
        documents = Documents(self.borders.numbers(tokens))
        logger.info(
            "documents do not see each other: %.3g a sequence in the first batch; %.2g%% of its targets begin another one and "
            "count nowhere; no position is padding, attention on the CPU computes %.2g%% more",
            (documents.positions == 0).sum() / len(tokens),
            100 * (targets == IGNORED).float().mean(),
            100 * documents.padding,
        )

    def _bind(self) -> None:
        """Bind the curriculum to the model and the optimizer."""

        def set_lr(value: float) -> None:
            self.base_lr = value

        def set_weight_decay(value: float) -> None:
            for group in self.optimizer.param_groups[:-1]:  # of matrices
                group["weight_decay"] = value

        setters = {"optimizer.lr": set_lr, "optimizer.weight_decay": set_weight_decay}
        bind(
            self.schedule,
            self.model,
            switches=self.engine.switches(),
            resize=self.engine.resize,
            more=setters,
            domains=OF_OPTIMIZER,
        )

    def init_from(self, path: Path) -> None:
        """Begin with the weights of the checkpoint ``path``, and with nothing else of it: the clock is at 0.

        What was enabled there is enabled until the first update, where the curriculum sets all to its own begin.

        Raises:
            CheckpointError: it is missing or damaged.
            ConfigError: it was made for another model.
        """
        restore_weights(self.model, read_state(path), switches=self.engine.switches(), resize=self.engine.resize)
        self.follow()

    def fit(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            Interrupted: ``stop_requested`` said so; the update was finished and a checkpoint written.
            TrainingError: the run cannot continue.
        """
        raise NotImplementedError

    # --- an update, in the order of its parts -------------------------------------------------------------------------

    def begin_update(self) -> list[Change]:
        """Set model, optimizer and learning rate to the clock, call the callbacks, and return what changed."""
        changes = super().begin_update()
        if changes:
            self.callbacks.notify("on_schedule", self, changes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        last = len(self.train_batches) - self.batches_done <= self.loop.accumulate  # of the epoch
        switched = any(isinstance(change.value, bool) for change in changes)
        regular = self.clock.step % self.loop.log_every == 0 or last or switched
        watched = self.schedule.program.watched
        has_row = regular or bool(changes)
        self.meter.begin_update(
            has_row=has_row,
            with_metrics=has_row or any(name.startswith("moe/") for name in watched),
            in_full=regular or any(name.startswith(OF_PARTS) or name == "moe/expert_cosine" for name in watched),
        )
        return changes

    def _lay_out_lr(self) -> Callable[[Clock], float] | None:
        """Return the factor on the learning rate at a clock; None: the rate has none.

        It goes over the curriculum's length, which a resume with ``on_horizon_change=keep_absolute`` takes from its checkpoint.
        """
        if not self.loop.lr_schedule:
            return None
        anneal = Anneal.model_validate(self.loop.lr_schedule)
        curve = anneal.curve(self.schedule.program.horizon)
        return lambda clock: curve(getattr(clock, anneal.by))

    @property
    def lr(self) -> float:
        """The learning rate at the clock."""
        return self.base_lr * (self._lr_factor(self.clock) if self._lr_factor else 1.0)

    @property
    def looks_ahead(self) -> bool:
        """Whether batches of an update have to know of each other before the first."""
        over_update = any(
            layer.enabled and layer.balance_scope == "global" and "balance_loss_weight" in layer.expected
            for layer in self.moe_layers
        )
        return self.train_batches.masked or (over_update and self.accumulate > 1)

    def look_ahead(self, batches: Sequence[Batch]) -> None:
        """Learn of this rank's share of an update's batches how much each counts, and each expert's load; all ranks call it."""
        self._weights = None
        if not self.looks_ahead:
            return
        if self.train_batches.masked:
            counts = torch.stack([(targets != IGNORED).sum() for _, targets in batches]).double()
            mean = self.over_ranks(counts.sum()) / (len(batches) * self.ranks.world)
            self._weights = (counts / mean.clamp(min=1e-9)).float()
        if len(batches) > 1:
            self._count_loads(batches)

    @torch.no_grad()
    def _count_loads(self, batches: Sequence[Batch]) -> None:
        """Have layers count slots of a whole update, whose forward passes will draw the same random numbers again."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), compiling() if self.compiled else nullcontext():
            for tokens, targets in batches:
                with self._autocast():
                    self.forward(self.model, tokens, targets, with_metrics=False)
        self.engine.rest()
        balance.settle_loads(self.moe_layers)

    def loss_of(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, 0-dim, to go backward from; tokens and targets: (batch, seq).

        Raises:
            TrainingError: the curriculum has frozen every parameter.
        """
        self.callbacks.notify("on_batch_begin", self)
        with self._autocast(), compiling() if self.compiled else nullcontext():
            output = self.forward(self.engine.forward, tokens, targets, with_metrics=self.meter.with_metrics)
        assert output.language_loss is not None
        loss: Tensor = output.language_loss + output.auxiliary_loss
        weight = None if self._weights is None else self._weights[self.meter.num_batches]
        if weight is not None:
            loss = loss * weight
        if not loss.requires_grad:
            raise TrainingError(
                f"every parameter is frozen at {self.clock}: there is nothing to train. See schedule.events."
            )
        self.meter.add_batch(output, weight)
        self.count(samples=len(tokens) * self.ranks.world, tokens=tokens.numel() * self.ranks.world)
        return loss

    def clip(self, *, scaled: bool) -> Tensor:
        """Limit the gradient's norm and return what it was, 0-dim.

        Args:
            scaled: whether mixed precision scales gradients and skips an update whose gradients overflowed.

        Raises:
            NonFiniteError: it is not finite and nothing would skip the update, or the loss is not.
        """
        if self.meter.in_full:
            self.meter.add_part_norms({part: gradient_norm(of) for part, of in parameter_parts(self.model).items()})
        norm = clip_gradients(self.model.parameters(), self.loop.largest_norm)
        self.meter.add_norm(self.clock, norm, scaled=scaled)
        if self.meter.reads_every_update:
            self.meter.read()
        else:  # a fused optimizer leaves the weights alone where this is 1, as mixed precision asks it to
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        return norm

    def _must_read_every_update(self) -> bool:
        """Return whether each update's numbers have to be known before the next: on CUDA that waits for the device."""
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        waits = self.device.type != "cuda" or self.scaler.is_enabled() or not (self.may_read_late and fused)
        return waits or self.nonfinite.on_nonfinite != "stop" or bool(self.schedule.program.watched - {"val/loss"})

    def end_update(self, metrics: Mapping[str, float] | None = None) -> None:
        """Count an update that has happened, log it where it is due, and advance the clock."""
        row: Row = {}
        if self.qk_clip is not None:
            self.qk_clip()
        if self.average is not None:
            self.average.update()
        if self.meter.has_row or self.meter.reads_every_update:
            self.meter.read()
            row = self.meter.numbers() | {"lr": self.lr} | self.meter.model_metrics()
            if self.qk_clip is not None:
                row["train/max_attention_logit"] = self.qk_clip.largest.item()
        self.meter.add_work(tokens=self.tokens, seconds=self._take_time())
        self.updates_done += 1
        if self.meter.has_row:
            row_of_log = row | self.schedule.metrics() | self.meter.take_speed()
            self._log(row_of_log, step=self.clock.step, tokens=self.clock.token + self.tokens)
        self.callbacks.notify("on_step", self)
        super().end_update(row)

    def skip_update(self) -> None:
        """Record an update that was skipped; the clock stays."""
        self._take_time()
        if self.qk_clip is not None:
            self.qk_clip.forget()
        self.updates_skipped += 1
        super().skip_update()

    def _take_time(self) -> float:
        took = self.meter.elapsed()
        self.seconds += took
        self.batches_done += self.meter.num_batches
        return took

    # --- around updates -----------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """Compare the epoch with the plan, validate, begin the next epoch, and save where it is due."""
        self._compare_with_plan()
        loss = self.validate()
        self.callbacks.notify("on_epoch_end", self)
        epoch = self.clock.epoch + 1
        self.clock = self.clock.at_epoch(epoch)
        self.batches_done = self.updates_done = self.updates_skipped = 0
        if epoch % self.saving.checkpoint_every_epochs == 0 or epoch == self.max_epochs:
            self.save(wait=epoch == self.max_epochs, epochs=epoch, loss=loss)

    def asked_to_stop(self) -> bool:
        """Return whether the run should stop here; a checkpoint is written then, and also where one is due by time."""
        due = self.seconds - self._saved_at >= self.saving.seconds
        asked, due = any_rank(self.stop_requested(), due) if self.ranks.world > 1 else (self.stop_requested(), due)
        if asked or due or self._begins_others():
            self.save(wait=asked)
        return asked

    def _begins_others(self) -> bool:
        """Return whether a checkpoint is due for other runs: where all updates before were made, and validated."""
        if self.clock.step not in self.forks or self._saved_before == self.clock:
            return False
        planned = self.schedule.planned.updates_per_epoch
        done = math.ceil(self.batches_done / self.accumulate)  # of this epoch
        return done < planned and self.clock.epoch * planned + done == self.clock.step

    def validate(self) -> float:
        """Return the mean loss on the validation batches, and log it with the clock of the last update."""
        metrics = self.validation()
        self.engine.rest()
        self.schedule.observe({"val/loss": metrics["val/loss"]})
        self._log(metrics | self.schedule.metrics(), step=self.clock.step - 1, tokens=self.clock.token)
        return metrics["val/loss"]

    def _log(self, metrics: Row, *, step: int, tokens: int) -> None:
        when = {"step": step, "epoch": self.clock.epoch, "tokens": tokens, "time": round(self.seconds, 3)}
        self.last_row = when | metrics
        self.rows += 1
        self.log(self.last_row)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _compare_with_plan(self) -> None:
        """Compare the updates counted in this epoch with those planned."""
        planned = self.schedule.planned.updates_per_epoch
        if self.updates_done + self.updates_skipped != planned:
            raise HorizonError(
                f"epoch {self.clock.epoch} had {self.updates_done} updates and {self.updates_skipped} skipped ones, but "
                f"{planned} were planned: every anneal by step would be off. Has the data changed?"
            )
        if self.updates_skipped:
            logger.warning(
                "epoch %d: %d of %d updates were skipped, which the clock does not count: step %d now, %d planned. Anneals "
                "by step end that much before their end value.",
                self.clock.epoch,
                self.updates_skipped,
                planned,
                self.clock.step,
                (self.clock.epoch + 1) * planned,
            )

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of training, validation and checkpoints left out."""
        return self.clock.token / self.seconds if self.seconds else 0.0

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs, as tensors and plain values; every rank calls it, and the first gets all."""
        trained: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": named_state(self.optimizer, self.model),
        }
        if self.average is not None:
            trained["ema"] = self.average.averages
        return {
            **gathered_state(trained, keep=self.ranks.rank == 0),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "clock": asdict(self.clock),
            "progress": {
                name: getattr(self, name)
                for name in ("batches_done", "updates_done", "updates_skipped", "rows", "seconds")
            },
            **({"callbacks": states} if (states := self.callbacks.state_dict()) else {}),
            "random": gathered(random_state(self.device)) if self.ranks.world > 1 else [random_state(self.device)],
        }

    def save(self, *, wait: bool = True, epochs: int | None = None, loss: float | None = None) -> None:
        """Write a checkpoint, named after the update that comes next; the first rank writes for all.

        Args:
            wait: until it is safe; False: return once the state is copied.
            epochs: that are complete; None: this one is in the middle of an epoch.
            loss: of its validation.

        Raises:
            CheckpointError: it could not be written; without ``wait`` that is a warning.
        """
        self._saved_at, self._saved_before = self.seconds, self.clock
        self.meter.read()  # what is not finite gets no checkpoint
        if self.checkpoints is None and self.ranks.world == 1:
            return
        state = self.state_dict()
        if self.checkpoints is not None and self.ranks.rank == 0:
            about = {"rows": self.rows, "epochs": epochs, "loss": loss}
            path = self.checkpoints.save(state, step=self.clock.step, wait=wait, **about)
            logger.debug("checkpoint %s", path)
        if self.ranks.world > 1:
            barrier()
