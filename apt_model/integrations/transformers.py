"""The curriculum in Hugging Face transformers: a callback for any model, and a trainer that runs a profile.

::

    trainer = transformers.Trainer(model, args, callbacks=[ScheduleCallback(schedule)], ...)
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError, Interrupted, nearest
from apt_model.files import in_home
from apt_model.integrations.horizon import HostRun, anew
from apt_model.integrations.hosted import (
    EpochLoader,
    HostedTrainer,
    as_one_process,
    deciding_together,
    over_ranks,
    trained_parts,
)
from apt_model.layers.in_place import MoEInPlace, add_experts
from apt_model.schedule import Clock, ScheduleRunner
from apt_model.training.schedule_driver import ScheduleDriver, Switches, Values, bind, numbers, sizes, subject_of

try:
    import accelerate  # noqa: F401 - transformers' trainer needs it, and says so later
    import transformers
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import has_length
except ImportError:
    raise ConfigError(
        "trainer: transformers and accelerate are not installed. Run: pip install 'apt-launch[hf]', or choose trainer=default."
    ) from None

ALIASES = {"eval_loss": "val/loss", "learning_rate": "lr", "grad_norm": "train/grad_norm"}
"""Names of the library, and what a latch may call them, too."""


class ScheduleCallback(transformers.TrainerCallback, ExportableState):
    """Takes a curriculum through the training of any model in ``transformers.Trainer``.

    Before each optimizer update (not each batch) the model is set to the scheduled values of the clock. What the clock counts:

    * steps: updates that really changed the weights, which ``state.global_step`` does not count.
    * samples and tokens: those of the model's inputs in a batch's first forward pass (see
      :func:`apt_model.training.schedule_driver.sizes`), over all processes, when an update has changed the weights. Batches that
      are left over where an epoch of a stream ends wait for
      the next epoch's first update, which their gradients are part of; those of an update that mixed precision skipped are
      left out.
    * epochs: how often the trainer has begun one. ``state.epoch`` is a share of ``max_steps`` where data have no length.

    Latches see ``train/loss`` (the mean of the loss in the model's outputs over the update's batches), the outputs'
    ``metrics`` if there are any, what the trainer logs, and what an evaluation gives, ``eval_loss`` also as ``val/loss``; in
    several processes, what the first one has. The clock and the runner's state go into ``trainer_state.json`` of each
    checkpoint; before a resume call :meth:`restore`. A ``train()`` that begins at step 0 begins the curriculum anew.

    In several processes the library's engine shares the parameters of the beginning, so modules that add or remove parameters
    cannot be enabled or disabled.

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
        self.driver = ScheduleDriver(schedule)
        self.values = values
        self.switches = switches
        self._restored: tuple[int, dict[str, Any]] | None = None  # the checkpoint's step and the state in it
        self._run: HostRun | None = None
        self._epoch = -1
        self._model: nn.Module
        self._world_size = 1
        self._replicas = 1  # of DataParallel, each with its own share of a batch
        self._wrapped: list[tuple[int, bool]] = []  # what the library's engine knows of the model
        self._hooks: list[Callable[[], None]] = []
        self._forget()

    def _forget(self) -> None:
        """Forget what no update has had yet."""
        self._waiting = (0, 0)  # samples and tokens
        self._losses: list[Tensor] = []
        self._summary: Mapping[str, Any] = {}

    @property
    def clock(self) -> Clock:
        """The clock of the current update, or of the next one."""
        return self.driver.clock

    @property
    def follower(self) -> ScheduleDriver:
        """``driver``, by its earlier name."""
        return self.driver

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
        saved = transformers.TrainerState.load_from_json(str(path))
        callbacks = saved.stateful_callbacks or {}
        if type(self).__name__ not in callbacks:
            raise ConfigError(f"{path} has no curriculum in it: it was made without {type(self).__name__}.")
        state = callbacks[type(self).__name__]["attributes"]["saved"]
        self._release()
        self._bind(model)
        self.driver.load_state_dict(state)
        self.driver.schedule.reconcile()
        getattr(subject_of(model), "take_lineage", list)()  # the checkpoint has the optimizer's state
        self._restored = (saved.global_step, state)

    def _bind(self, model: nn.Module) -> None:
        bind(self.driver.schedule, subject_of(model), values=self.values, switches=self.switches)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Bind the curriculum, take up model and optimizer, and listen to them.

        Raises:
            ConfigError: the curriculum names what the model does not have, the run does not fit the horizon, or this is a
                resume without :meth:`restore`.
        """
        self._release()
        model = given["model"]
        self._bind(model)
        self._go_back(state)
        stream = not has_length(given["train_dataloader"])
        self._compare(args, state, given["train_dataloader"], stream=stream)
        begun = 0 if not state.global_step else self.clock.epoch if stream else int(state.epoch)
        self._epoch = begun - 1
        self._model, self._world_size, self._replicas = model, args.world_size, args.n_gpu
        if self._world_size > 1:
            self.driver.schedule.broadcast = deciding_together(self.driver.schedule.broadcast)
            self._wrapped = trained_parts(model)
        self.driver.connect(subject_of(model), _unwrapped(given["optimizer"]))

    def _go_back(self, state: Any) -> None:
        """Bring the clock to where the loop begins, whatever an earlier one has left."""
        if not state.global_step:
            self.driver.load_state_dict(anew(self.driver.schedule))
            return
        step, saved = self._restored or (None, {})
        if step != state.global_step:
            raise ConfigError(
                f"a resume needs the curriculum's state before the weights are loaded, so that modules are switched. Call "
                f"{type(self).__name__}.restore(checkpoint, model) before trainer.train(resume_from_checkpoint=checkpoint), "
                f"with the same checkpoint{f', not one of step {step}' if step else ''}."
            )
        self.driver.load_state_dict(saved)
        self.driver.schedule.reconcile()

    def _compare(self, args: Any, state: Any, data: Any, *, stream: bool) -> None:
        per_epoch = None if stream else max(1, math.ceil(len(data) / args.gradient_accumulation_steps))
        self._run = HostRun(
            self.driver.schedule,
            steps=state.max_steps,
            updates_per_epoch=per_epoch,
            set_by="num_train_epochs, max_steps, per_device_train_batch_size or gradient_accumulation_steps",
            stream=stream,
        )

    def _listen(self) -> None:
        """Count the next batch that the model trains on, and keep what it returns; callbacks are shown neither.

        Nothing is left on the model when its forward pass begins, but for a latch: an error or Ctrl-C ends the loop without
        a call of callbacks.
        """
        self._stop_listening()

        def before(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            if not module.training:
                return
            samples, tokens = sizes([given, args])
            self._waiting = (self._waiting[0] + samples, self._waiting[1] + tokens)
            if self._replicas <= 1:
                self._stop_listening()
            if self.driver.schedule.program.watched:
                self._hooks.append(module.register_forward_hook(after).remove)

        def after(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
            self._stop_listening()
            loss, self._summary = (_part(outputs, name) for name in ("loss", "metrics"))
            if isinstance(loss, Tensor):
                self._losses.append(loss.detach())

        self._hooks = [self._model.register_forward_pre_hook(before, with_kwargs=True).remove]

    def _stop_listening(self) -> None:
        for remove in self._hooks:
            remove()
        self._hooks = []

    def _release(self) -> None:
        self._stop_listening()
        self._forget()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count the epoch."""
        self._epoch += 1
        if self._run is not None:
            self._run.begin_epoch(self._epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Set the model to the clock, and listen to its first batch.

        Raises:
            ConfigError: parameters were added, removed, frozen or unfrozen, and the library's engine cannot take that up.
        """
        self.driver.clock = self.driver.clock.at_epoch(self._epoch)
        self.driver.begin_update()
        if self._world_size > 1 and trained_parts(self._model) != self._wrapped:
            raise ConfigError(
                f"parameters were added, removed, frozen or unfrozen at {self.clock}, and transformers' engine still shares "
                "those of the beginning among processes. Train in one process, in Lightning with strategy='ddp', or with "
                "python -m apt_launch trainer=hf."
            )
        self._listen()

    def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Listen to the update's next batch."""
        self._listen()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Notice whether the optimizer really steps.

        Raises:
            ConfigError: this epoch of a stream has had all updates that were planned, and the curriculum goes by epochs.
        """
        self._stop_listening()
        if self._run is not None:
            self._run.before_update()
        self._hooks = [self.driver.watch()]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Release the optimizer."""
        self._stop_listening()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Show latches the update's metrics, and advance the clock if it has happened."""
        if self.driver.happened:
            self._end_update()
        else:
            self.driver.skip_update()
        self._forget()
        if self._run is not None:
            self._run.end_update()

    def _end_update(self) -> None:
        samples, tokens = over_ranks(*self._waiting, self._world_size)
        metrics = {}
        if self.driver.schedule.program.watched:
            metrics = numbers(self._summary or {})
            if self._losses:
                metrics["train/loss"] = torch.stack(self._losses).mean().item()
        self.driver.count(samples=samples, tokens=tokens)
        self.driver.end_update(metrics)

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
        self.driver.schedule.observe(
            found | {ours: found[theirs] for theirs, ours in ALIASES.items() if theirs in found}
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Release model and optimizer."""
        self._release()
        self._restored = None

    def state(self) -> dict[str, Any]:
        """Return the clock and the runner's state, as the library keeps them: plain values for JSON."""
        return {"args": {}, "attributes": {"saved": self.driver.state_dict()}}


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer itself; accelerate wraps it."""
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        optimizer = optimizer.optimizer
    return optimizer


def _part(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


class HFTrainer(HostedTrainer):
    """Runs a profile in ``transformers.Trainer``.

    Batches, precision, learning rate, rows, checkpoints and how ranks share a batch are those of
    :class:`apt_model.training.trainer.Trainer`, which can resume from its checkpoints; it cannot do that itself. Arguments:
    see :class:`apt_model.training.base.BaseTrainer`.

    Raises:
        ConfigError: also for a CUDA device other than the first, which this library cannot choose.
    """

    def fit(self) -> None:
        """Train to the end of the last epoch.

        Raises:
            ConfigError: the device is another than the first.
            Interrupted: ``stop_requested`` said so; the update was finished and a checkpoint written.
            TrainingError: the run cannot continue.
        """
        if self.device.index:
            raise ConfigError(
                f"trainer.device: transformers takes the first device, not {self.device}. Set trainer.device=cuda and "
                f"CUDA_VISIBLE_DEVICES={self.device.index}."
            )
        loop = _Loop(self)
        self.engine.settle()
        with tempfile.TemporaryDirectory() as folder, _alone(), as_one_process():
            arguments = _Arguments(
                output_dir=folder,  # nothing is written there
                use_cpu=self.device.type == "cpu",
                fp16=self.scaler.is_enabled(),
                num_train_epochs=self.max_epochs,
                per_device_train_batch_size=self.train_batches.sampler.batch_size // self.ranks.world,
                gradient_accumulation_steps=self.accumulate,
                max_grad_norm=float("inf"),  # unscales gradients; this trainer limits them itself
                seed=self.seed,
                save_strategy="no",
                eval_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            arguments.take(self.numbered_device)
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


class _Arguments(transformers.TrainingArguments):
    """The library's arguments, with the device of one of several ranks."""

    def take(self, device: torch.device) -> None:
        """Train on ``device``, without DataParallel."""
        _ = self.device  # which the library sets up here, and takes the first
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self.__dict__["_setup_devices"] = self.distributed_state.device = device
            self._n_gpu = 1


@contextmanager
def _alone() -> Iterator[None]:
    """Leave out the library's warning that it does not take part in this process's group."""
    theirs = logging.getLogger("transformers.training_args")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


class _Loop(ScheduleCallback):
    """Hands the events of transformers' loop to a trainer of this project, which counts and compares by itself."""

    def __init__(self, owner: HFTrainer) -> None:
        super().__init__(owner.schedule)
        self.driver: HFTrainer = owner
        self.stopped = False

    def _bind(self, model: nn.Module) -> None:
        """Leave the curriculum bound as it is."""

    def _go_back(self, state: Any) -> None:
        pass

    def _compare(self, args: Any, state: Any, data: Any, *, stream: bool) -> None:
        pass

    def _listen(self) -> None:
        pass

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        super().on_epoch_begin(args, state, control, **given)
        self.driver.callbacks.notify("on_epoch_begin", self.driver)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.driver.clip(scaled=self.driver.scaler.is_enabled())
        super().on_pre_optimizer_step(args, state, control, **given)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        super().on_step_end(args, state, control, **given)
        self._stop_if_asked(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self.stopped:
            self.driver.end_epoch()
            self._stop_if_asked(control)

    def _stop_if_asked(self, control: Any) -> None:
        if self.driver.asked_to_stop():
            self.stopped = control.should_training_stop = True


class _Trainer(transformers.Trainer):
    """The library's trainer, given everything by one of this project."""

    def __init__(self, owner: HFTrainer, arguments: transformers.TrainingArguments, loop: _Loop) -> None:
        self.owner = owner
        constant = torch.optim.lr_scheduler.LambdaLR(owner.optimizer, lambda step: 1.0)  # the rate is set each update
        super().__init__(model=owner.model, args=arguments, callbacks=[loop], optimizers=(owner.optimizer, constant))
        self.remove_callback(transformers.PrinterCallback)

    def get_train_dataloader(self) -> Any:
        return EpochLoader(self.owner, as_mapping=True)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *unused: Any, **others: Any) -> Tensor:
        return self.owner.loss_of(inputs["tokens"], inputs["targets"])

    def training_step(self, *arguments: Any, **others: Any) -> Tensor:
        with self.owner.engine.batch(last=self.accelerator.sync_gradients):
            loss: Tensor = super().training_step(*arguments, **others)
        self.owner.callbacks.notify("on_batch_end", self.owner)
        return loss


def causal_lm(
    *,
    path: str | None = None,
    config: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    experts: bool = False,
    seq_len: int | None = None,
    moe: Callable[..., MoEInPlace],
) -> nn.Module:
    """Return a causal language model of the library: with the weights in a local folder, or new ones.

    Nothing is fetched, no pickle is read, and no code of the folder's is run.

    Args:
        path: a folder with ``config.json`` and weights in safetensors.
        config: ``model_type`` and what else differs from that model's defaults.
        vocab_size: of a new model; of one from a folder it has to be as it is there.
        seq_len: tokens of a sequence, which the model has to have room for.
        experts: whether layers of experts, dense until they are enabled, take the place of its feed-forward layers.
        moe: makes such a layer.

    Raises:
        ConfigError: not one of ``path`` and ``config`` is given, or the library cannot make a model of it.
    """
    if (path is None) == (config is None):
        raise ConfigError("model: give one of model.path (a local folder) and model.config={model_type: llama, ...}.")
    try:
        with _quiet():
            model = _with_weights(path, vocab_size) if path is not None else _new(config or {}, vocab_size)
    except ConfigError:
        raise
    except Exception as error:  # the library has a kind of its own for nearly each
        raise ConfigError(f"model: transformers makes no model of {path or dict(config or {})}: {error}") from error
    room = getattr(model.config, "max_position_embeddings", None)
    if seq_len is not None and isinstance(room, int) and seq_len > room:
        raise ConfigError(
            f"model.seq_len = {seq_len} is more than the model's {room} positions (max_position_embeddings). Set it to {room} "
            "or less."
        )
    if experts:
        add_experts(model, moe)
    return model


def _new(config: Mapping[str, Any], vocab_size: int | None) -> nn.Module:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(
            "model.config.model_type: missing. Name the kind of model: llama, qwen3, mistral, gpt_neox, ..."
        )
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"model.config.model_type: {kind!r} is unknown. {nearest(kind, transformers.CONFIG_MAPPING.keys())}"
        )
    size = {} if vocab_size is None else {"vocab_size": vocab_size}
    rest = {name: value for name, value in config.items() if name != "model_type"}
    made = transformers.AutoConfig.for_model(kind, **{**rest, **size})
    known = transformers.CONFIG_MAPPING[kind]().to_dict()
    if unknown := [name for name in rest if name not in known]:
        raise ConfigError(*(f"model.config.{name}: unknown key of {kind}. {nearest(name, known)}" for name in unknown))
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    return model


def _with_weights(path: str, vocab_size: int | None) -> nn.Module:
    folder = in_home(path, "model.path")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: there is no config.json in {folder}. Name a folder that save_pretrained made.")
    local = {"local_files_only": True, "trust_remote_code": False}
    made = transformers.AutoConfig.from_pretrained(folder, **local)
    if vocab_size not in (None, made.vocab_size):
        raise ConfigError(
            f"model.vocab_size = {vocab_size}, and the model in {folder} has {made.vocab_size} tokens. Set it to null."
        )
    if torch.empty(0).device.type == "meta":
        empty: nn.Module = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        return empty
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=made, dtype=torch.float32, use_safetensors=True, **local
    )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the library's progress bars."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()


def load_folder(folder: Path) -> nn.Module:
    """Return the causal language model in ``folder``, in float32.

    Raises:
        ConfigError: transformers cannot load it.
    """
    try:
        with _quiet():
            model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
    except Exception as error:  # of a library, about files of any kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"RUN_DIR: transformers cannot load {folder}: {reason[0].rstrip('.')}.") from None
    return model
