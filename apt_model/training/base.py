"""What every trainer has in common: how a run is set up, what an update is, what is logged, checked and saved."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from apt_model.data import Corpus, Sampler
from apt_model.data.batches import Batches
from apt_model.errors import ConfigError, HorizonError, NonFiniteError, TrainingError
from apt_model.gpt import GPT
from apt_model.layers.tally import routing_metrics
from apt_model.schedule import Anneal, Change, Clock, ScheduleRunner
from apt_model.schedule.clock import Unit
from apt_model.schedule.targets import OF_OPTIMIZER
from apt_model.training.callbacks import Callback, Callbacks
from apt_model.training.checkpoint import Checkpoints
from apt_model.training.compiling import compile_model, compiling, eagerly
from apt_model.training.device import Precision, choose_device, choose_dtype
from apt_model.training.distributed import Ranks, any_rank, barrier, gathered, mean_of
from apt_model.training.follower import Follower, bind
from apt_model.training.optimizer import named_state, parameter_groups
from apt_model.training.parallel import Parallel, engine
from apt_model.training.randomness import random_state
from apt_model.training.sharding import clip_gradients, gathered_state
from apt_model.training.specialisation import SourceLoads

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
Row = dict[str, float]


class Made(NamedTuple):
    """An update that was made: its losses and the norm of its gradient, 0-dim, on the device."""

    clock: Clock
    loss: Tensor
    auxiliary: Tensor
    norm: Tensor
    scaled: bool  # whether a norm that is not finite is mixed precision's business


class BaseTrainer(Follower):
    """What every trainer of this project has in common; a subclass runs the loop, or has it run, in :meth:`fit`.

    On CUDA the host does not wait for the device but where a row is logged: losses and norms of the updates between are read
    there, and what is not finite left the weights as they were until then. With ``on_nonfinite`` other than ``stop``, in fp16,
    and where a latch watches training, each update is read at once.

    A row goes to ``log`` when the curriculum changed something, every ``log_every`` updates, at each epoch's last update,
    and after each validation. Where only a value has moved, it tells nothing of single layers. Its ``step`` and ``epoch``
    are the clock of the update it tells of, from 0; its ``tokens`` and ``time`` (seconds of training) count what that update
    took, too.

    Args:
        model: moved to ``device``.
        optimizer: called with parameter groups.
        weight_decay: of matrices; vectors do not decay.
        schedule: a runner whose horizon fits ``corpus`` and the numbers below.
        corpus: text in two splits.
        seed: of the batches' order and of validation.
        max_epochs: epochs to train.
        max_batches_per_epoch: None: all that the corpus gives.
        batch_size: sequences a batch.
        accumulate: batches an update.
        parallel: how ranks share the model: ``ddp``, each has all of it, or ``fsdp``, each has a part of every layer.
        expert_parallel: ranks that share one set of experts, with ``fsdp``.
        precision: ``auto`` is bf16 or, where the device has none, fp16 on CUDA, and fp32 on the CPU.
        device: ``auto`` is CUDA where there is a device.
        compile: whether torch.compile makes graphs of the model's parts for training; validation goes without.
        activation_checkpointing: whether the backward pass computes blocks again, so that only their inputs are kept.
        grad_clip: largest norm of the gradient; None: no limit.
        lr_schedule: an anneal of the factor on the optimizer's learning rate; None: the rate is that of the optimizer, or
            of a curriculum that writes ``optimizer.lr``.
        resume: the folder of a checkpoint to go on from.
        log_every: updates between rows.
        validation_batches: batches of the validation split, the same each time; None: all.
        checkpoint_every_epochs: epochs between checkpoints; the last epoch always has one.
        checkpoint_every_minutes: minutes of training after which there is one in the middle of an epoch, too; None: none.
        on_nonfinite: what follows a loss or gradient that is not finite: ``stop``, ``skip`` the update, or ``rollback``,
            which stops here and is the caller's to do.
        leave_out: updates that are not made: (epoch, first batch); what a rollback found.
        checkpoints: where they go; None: none are written.
        log: receives every row.
        callbacks: see :class:`apt_model.training.callbacks.Callback`.
        stop_requested: asked after each update; True makes it the last one before a checkpoint and ``Interrupted``.

    Raises:
        ConfigError: the device or its precision is not there, the corpus is too small, ranks cannot share a batch, or this
            trainer cannot resume.
    """

    model: GPT
    can_resume: ClassVar[bool] = False
    shares_batches: ClassVar[bool] = False  # among the ranks of a process group
    may_read_late: ClassVar[bool] = False  # whether its loop makes updates before it knows the numbers of earlier ones

    def __init__(
        self,
        *,
        model: GPT,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: ScheduleRunner,
        corpus: Corpus,
        max_epochs: int,
        batch_size: int,
        lr_schedule: Mapping[str, Any] | None,
        weight_decay: float = 0.0,
        seed: int = 0,
        max_batches_per_epoch: int | None = None,
        accumulate: int = 1,
        parallel: Parallel = "ddp",
        expert_parallel: int = 1,
        precision: Precision = "auto",
        device: str = "auto",
        compile: bool = False,
        activation_checkpointing: bool = False,
        grad_clip: float | None = 1.0,
        resume: Path | None = None,
        log_every: int = 10,
        validation_batches: int | None = None,
        checkpoint_every_epochs: int = 1,
        checkpoint_every_minutes: float | None = None,
        on_nonfinite: Literal["stop", "skip", "rollback"] = "stop",
        leave_out: Collection[tuple[int, int]] = (),
        checkpoints: Checkpoints | None = None,
        log: Callable[[Row], None] = lambda row: None,
        callbacks: Sequence[Callback] = (),
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(schedule)
        if resume is not None and not self.can_resume:
            raise ConfigError(
                f"trainer.resume: {type(self).__name__} cannot go on from a checkpoint. Go on from it with trainer=default."
            )
        self.device = choose_device(device)
        self.autocast_dtype = choose_dtype(precision, self.device)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.autocast_dtype == torch.float16)
        self.ranks = Ranks.of_group() if self.shares_batches else Ranks()
        if batch_size % self.ranks.world:
            raise ConfigError(
                f"trainer.batch_size = {batch_size} cannot be shared by {self.ranks.world} ranks. Make it a multiple of "
                f"{self.ranks.world}."
            )
        self.model: GPT = model.to(self.device)
        self.model.activation_checkpointing = activation_checkpointing
        self.engine = engine(
            parallel,
            self.model,
            self.ranks,
            expert_parallel=expert_parallel,
            dtype=self.autocast_dtype,
            device_type=self.device.type,
        )
        self.compiled = compile
        if compile:
            compile_model(self.model, self.device, whole=self.engine.whole_blocks)
        self.optimizer = optimizer(parameter_groups(model, weight_decay))
        self.base_lr: float = self.optimizer.param_groups[0]["lr"]
        self.lr_curve = Anneal.model_validate(lr_schedule).curve(schedule.planned) if lr_schedule else None
        self.lr_by: Unit = Anneal.model_validate(lr_schedule).by if lr_schedule else "step"
        self._bind()
        self.seed = seed
        self.train_batches = self._batches(corpus, "train", batch_size, max_batches_per_epoch)
        self.val_batches = self._batches(corpus, "val", batch_size, validation_batches)
        self.max_epochs = max_epochs
        self.accumulate = accumulate
        self.grad_clip = math.inf if grad_clip is None else grad_clip
        self.resume = resume
        self.log_every = log_every
        self.checkpoint_every_epochs = checkpoint_every_epochs
        self.checkpoint_every_seconds = 60 * checkpoint_every_minutes if checkpoint_every_minutes else math.inf
        self.on_nonfinite = on_nonfinite
        self.leave_out = frozenset(leave_out)
        self.checkpoints = checkpoints
        self.log = log
        self.callbacks = Callbacks(callbacks)
        self.stop_requested = stop_requested

        self.batches_done = 0  # of this epoch
        self.updates_done = 0  # of this epoch, skipped ones not counted
        self.updates_skipped = 0  # of this epoch
        self.rows = 0
        self.seconds = 0.0
        self._saved_at = 0.0  # of these seconds
        self.last_row: Row = {}
        self.last_loss = torch.tensor(math.nan)  # of the last update, 0-dim; to read it waits for the device
        self._changes: list[Change] = []  # for the update in the making
        self._losses: list[Tensor] = []  # of its batches
        self._auxiliary: list[Tensor] = []
        self._told: list[dict[str, Tensor]] = []  # what the model told of them
        self._routing: list[Tensor] = []
        self._logged = False  # whether it gets a row
        self._telling = False  # whether the model is asked for metrics of routing
        self._in_full = False  # whether those of each layer, and of the experts' weights, are wanted, too
        self._made: list[Made] = []  # updates whose numbers were not read yet
        self._made_in = [0, 0.0]  # tokens, seconds
        self._numbers: Row = {}  # of the last update that was read
        self._began = 0.0
        self.reads_every_update = self._must_read_every_update()

    def _batches(self, corpus: Corpus, split: Literal["train", "val"], batch_size: int, limit: int | None) -> Batches:
        tokens = corpus.read(split)
        sampler = Sampler(
            num_tokens=len(tokens),
            seq_len=self.model.seq_len,
            batch_size=batch_size,
            seed=self.seed,
            limit=limit,
            name=split,
        )
        return Batches(tokens, sampler)

    def _bind(self) -> None:
        """Bind the curriculum to the model and the optimizer."""

        def set_lr(value: float) -> None:
            self.base_lr = value

        def set_weight_decay(value: float) -> None:
            self.optimizer.param_groups[0]["weight_decay"] = value  # of matrices

        setters = {"optimizer.lr": set_lr, "optimizer.weight_decay": set_weight_decay}
        bind(self.schedule, self.model, switches=self.engine.switches(), more=setters, domains=OF_OPTIMIZER)

    def fit(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            Interrupted: ``stop_requested`` said so; the update was finished and a checkpoint written.
            TrainingError: the run cannot go on.
        """
        raise NotImplementedError

    # --- an update, in the order of its parts -------------------------------------------------------------------------

    def begin_update(self) -> list[Change]:
        """Bring model, optimizer and learning rate to the clock; tell the callbacks what changed."""
        self._changes = super().begin_update()
        if self._changes:
            self.callbacks.notify("on_schedule", self, self._changes)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self._losses, self._auxiliary, self._told, self._routing = [], [], [], []
        last = len(self.train_batches) - self.batches_done <= self.accumulate  # of the epoch
        switched = any(isinstance(change.value, bool) for change in self._changes)
        regular = self.clock.step % self.log_every == 0 or last or switched
        watched = self.schedule.program.watched
        self._logged = regular or bool(self._changes)
        self._telling = self._logged or any(name.startswith("moe/") for name in watched)
        self._in_full = regular or any(name.startswith("moe/layer_") or name == "moe/expert_cosine" for name in watched)
        self._began = time.perf_counter()
        return self._changes

    @property
    def lr(self) -> float:
        """The learning rate at the clock."""
        return self.base_lr * (self.lr_curve(getattr(self.clock, self.lr_by)) if self.lr_curve else 1.0)

    def loss_of(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, 0-dim, to go backward from; tokens and targets: (batch, seq).

        Raises:
            TrainingError: the curriculum has frozen every parameter.
        """
        self.callbacks.notify("on_batch_begin", self)
        with self._autocast(), compiling() if self.compiled else nullcontext():
            output = self.engine.forward(tokens, targets, telling=self._telling)
        assert output.language_loss is not None
        loss: Tensor = output.language_loss + output.auxiliary_loss
        if not loss.requires_grad:
            raise TrainingError(
                f"every parameter is frozen at {self.clock}: there is nothing to train. See schedule.events."
            )
        self._losses.append(output.language_loss.detach())
        self._auxiliary.append(output.auxiliary_loss.detach())
        self._told.append(output.metrics)
        if output.routing is not None:
            self._routing.append(output.routing)
        self.count(samples=len(tokens) * self.ranks.world, tokens=tokens.numel() * self.ranks.world)
        return loss

    def mean_of_ranks(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return 0-dim values as their means over ranks that share batches."""
        return values if self.ranks.world == 1 else mean_of(values)

    def clip(self, *, scaled: bool) -> Tensor:
        """Limit the gradient's norm and return what it was, 0-dim.

        Args:
            scaled: whether mixed precision scales gradients and skips an update whose gradients overflowed.

        Raises:
            NonFiniteError: it is not finite and nothing would skip the update, or the loss is not.
        """
        norm = clip_gradients(self.model.parameters(), self.grad_clip)
        losses, auxiliary = torch.stack(self._losses).mean(), torch.stack(self._auxiliary).mean()
        self.last_loss = losses
        self._made.append(Made(self.clock, losses, auxiliary, norm, scaled))
        if self.reads_every_update:
            self._read()
        else:  # a fused optimizer leaves the weights alone where this is 1, as mixed precision asks it to
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        return norm

    def _must_read_every_update(self) -> bool:
        """Say whether each update's numbers have to be known before the next: on CUDA that waits for the device."""
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        waits = self.device.type != "cuda" or self.scaler.is_enabled() or not (self.may_read_late and fused)
        return waits or self.on_nonfinite != "stop" or bool(self.schedule.program.watched - {"val/loss"})

    def _read(self) -> None:
        """Read the numbers of updates that were made since, all at once.

        Raises:
            NonFiniteError: those of one are not finite.
        """
        if not self._made:
            return
        made, self._made = self._made, []
        stacked = torch.stack([torch.stack([m.loss, m.auxiliary]).float() for m in made])
        losses = self.mean_of_ranks({"losses": stacked})["losses"]
        norms = torch.stack([m.norm.float() for m in made]).unsqueeze(1)
        for update, (loss, auxiliary, norm) in zip(made, torch.cat([losses, norms], dim=1).tolist(), strict=True):
            where = f"at {update.clock}"
            if not math.isfinite(loss + auxiliary):
                raise NonFiniteError(
                    f"the loss is {loss + auxiliary} {where} (language model {loss:g}, auxiliary {auxiliary:g}). The last "
                    "checkpoint is from before it. Try a lower optimizer.lr, a longer trainer.lr_schedule.warmup or "
                    "trainer.precision=fp32."
                )
            if not math.isfinite(norm) and not update.scaled:
                raise NonFiniteError(
                    f"the gradient's norm is {norm} {where}, its loss {loss + auxiliary:g}. The last checkpoint is from "
                    "before it. Try a lower optimizer.lr or trainer.precision=fp32."
                )
            self._numbers = {"train/loss": loss, "train/auxiliary_loss": auxiliary, "train/grad_norm": norm}

    def end_update(self, metrics: Mapping[str, float] | None = None) -> None:
        """Take note of an update that has happened, and log it where it is due; the clock goes on."""
        row: Row = {}
        if self._logged or self.reads_every_update:
            self._read()
            row = self._numbers | {"lr": self.lr} | self._told_by_model()
        self._made_in[0] += self.tokens
        self._made_in[1] += self._take_time()
        self.updates_done += 1
        if self._logged:
            tokens, seconds = self._made_in
            self._made_in = [0, 0.0]
            speed = {"tokens_per_second": tokens / seconds}
            self._log(
                row | self.schedule.metrics() | speed, step=self.clock.step, tokens=self.clock.token + self.tokens
            )
        self.callbacks.notify("on_step", self)
        super().end_update(row)

    def _told_by_model(self) -> Row:
        """Return the model's metrics: means over the update's batches, and what the sums of their routing give."""
        names = self._told[-1]
        means = {name: torch.stack([told[name] for told in self._told]).mean() for name in names}
        row = {name: value.item() for name, value in self.mean_of_ranks(means).items()}
        if not self._routing:
            return row
        sums = torch.stack(self._routing).sum(dim=0)
        sums = self.mean_of_ranks({"routing": sums})["routing"]
        if self._in_full:
            cosines = self.mean_of_ranks({"cosines": self.model.expert_cosines()})["cosines"]
            return row | routing_metrics(sums, cosines.float())
        return row | {name: value for name, value in routing_metrics(sums).items() if "/layer_" not in name}

    def skip_update(self) -> None:
        """Take note of an update that was skipped; the clock stays."""
        self._take_time()
        self.updates_skipped += 1
        super().skip_update()

    def _take_time(self) -> float:
        took = time.perf_counter() - self._began
        self.seconds += took
        self.batches_done += len(self._losses)
        return took

    # --- around updates -----------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """Compare the epoch with the plan, validate, go on to the next epoch, and save where it is due."""
        self._compare_with_plan()
        loss = self.validate()
        self.callbacks.notify("on_epoch_end", self)
        epoch = self.clock.epoch + 1
        self.clock = self.clock.at_epoch(epoch)
        self.batches_done = self.updates_done = self.updates_skipped = 0
        if epoch % self.checkpoint_every_epochs == 0 or epoch == self.max_epochs:
            self.save(wait=epoch == self.max_epochs, epochs=epoch, loss=loss)

    def asked_to_stop(self) -> bool:
        """Say whether the run should stop here; a checkpoint is written then, and also where one is due by time."""
        due = self.seconds - self._saved_at >= self.checkpoint_every_seconds
        asked, due = any_rank(self.stop_requested(), due) if self.ranks.world > 1 else (self.stop_requested(), due)
        if asked or due:
            self.save(wait=asked)
        return asked

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss on the validation batches, and log it with the clock of the last update."""
        self.model.eval()
        losses = []
        loads = self._loads_by_source()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), eagerly() if self.compiled else nullcontext():
            torch.manual_seed(self.seed)  # the voter draws: the same draws each time, and none from training
            for number, (tokens, targets) in enumerate(self.val_batches.epoch(0, device=self.device)):
                with self._autocast(), loads.counting(number, tokens) if loads else nullcontext():
                    losses.append(self.model(tokens, targets, telling=False).language_loss)
        self.model.train()
        self.engine.rest()
        loss = torch.stack(losses).mean().item()
        self.schedule.observe({"val/loss": loss})
        told = {"val/loss": loss} | (loads.metrics() if loads else {})
        self._log(told | self.schedule.metrics(), step=self.clock.step - 1, tokens=self.clock.token)
        return loss

    def _loads_by_source(self) -> SourceLoads | None:
        """Return what counts who serves whom, where the validation text has several sources and experts are on."""
        sources = self.val_batches.tokens.sources
        if sources is None or len(sources.names) < 2 or not any(layer.enabled for layer in self.model.moe_layers):
            return None
        return SourceLoads(self.model.moe_layers, sources, self.val_batches.sampler.windows(0))

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
        trained = {"model": self.model.state_dict(), "optimizer": named_state(self.optimizer, self.model)}
        return {
            **gathered_state(trained, keep=self.ranks.rank == 0),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "clock": asdict(self.clock),
            "progress": {
                name: getattr(self, name)
                for name in ("batches_done", "updates_done", "updates_skipped", "rows", "seconds")
            },
            "random": gathered(random_state(self.device)) if self.ranks.world > 1 else [random_state(self.device)],
        }

    def save(self, *, wait: bool = True, epochs: int | None = None, loss: float | None = None) -> None:
        """Write a checkpoint, named after the update that comes next; the first rank writes for all.

        Args:
            wait: until it is safe; False: go on once the state is copied.
            epochs: that are complete; None: this one is in the middle of an epoch.
            loss: of its validation.

        Raises:
            CheckpointError: it could not be written; without ``wait`` that is a warning.
        """
        self._saved_at = self.seconds
        self._read()  # what is not finite gets no checkpoint
        if self.checkpoints is None and self.ranks.world == 1:
            return
        state = self.state_dict()
        if self.checkpoints is not None and self.ranks.rank == 0:
            about = {"rows": self.rows, "epochs": epochs, "loss": loss}
            path = self.checkpoints.save(state, step=self.clock.step, wait=wait, **about)
            logger.debug("checkpoint %s", path)
        if self.ranks.world > 1:
            barrier()
