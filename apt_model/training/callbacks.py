"""Callbacks of a run, and when each is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from apt_model.errors import AptError, CallbackError
from apt_model.schedule import Change, Clock, ScheduleRunner

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Event = Literal[
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_batch_begin",
    "on_batch_end",
    "on_schedule",
    "on_step",
]


class TrainerView(Protocol):
    """What a callback may read of the trainer that it watches."""

    @property
    def clock(self) -> Clock:
        """The clock of the current update, or of the next one."""

    @property
    def schedule(self) -> ScheduleRunner:
        """The curriculum, its horizon and its scheduled values."""

    @property
    def model(self) -> nn.Module:
        """The model, with its current modules."""

    @property
    def device(self) -> torch.device:
        """Where it is computed."""

    @property
    def max_epochs(self) -> int:
        """Epochs of the whole run."""

    @property
    def last_row(self) -> Mapping[str, float]:
        """The row that was logged last."""

    @property
    def last_loss(self) -> Tensor:
        """The loss of the last update, 0-dim; to read it waits for the device."""

    @property
    def reads_every_update(self) -> bool:
        """Whether each update's numbers are read at once, so that ``last_loss`` costs nothing."""


class Callback:
    """Base of callbacks: override what you need. The trainer's ``clock``, ``last_row`` and ``model`` are there to read."""

    def on_train_begin(self, trainer: TrainerView) -> None:
        """Before the first update, after a resume."""

    def on_train_end(self, trainer: TrainerView) -> None:
        """After the last update; also when the run fails or is interrupted."""

    def on_epoch_begin(self, trainer: TrainerView) -> None:
        """Before the first update of an epoch."""

    def on_epoch_end(self, trainer: TrainerView) -> None:
        """After an epoch's validation, before its checkpoint."""

    def on_batch_begin(self, trainer: TrainerView) -> None:
        """Before the forward pass of each batch; with accumulation several make one update."""

    def on_batch_end(self, trainer: TrainerView) -> None:
        """After the backward pass of each batch."""

    def on_schedule(self, trainer: TrainerView, changes: Sequence[Change]) -> None:
        """When the curriculum has changed something, before the update it is for."""

    def on_step(self, trainer: TrainerView) -> None:
        """After each optimizer update, with its row in ``trainer.last_row``; the clock is still that of the update."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume gives back to :meth:`load_state_dict`: tensors and plain values; by default nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up, before :meth:`on_train_begin`, what :meth:`state_dict` returned when the checkpoint was written."""


class Named(NamedTuple):
    """A callback that a config names; its state is kept under that name."""

    name: str
    callback: Callback


class Callbacks:
    """Calls each callback in turn; an exception in one stops the run."""

    def __init__(self, callbacks: Sequence[Callback | Named]) -> None:
        self.named = {one.name: one.callback for one in callbacks if isinstance(one, Named)}
        self.callbacks = [one.callback if isinstance(one, Named) else one for one in callbacks]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of those that have a name and something to keep."""
        states = {name: callback.state_dict() for name, callback in self.named.items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Give each callback its state back; one that came since keeps the state that it has.

        Raises:
            CallbackError: one raised.
        """
        for name, state in states.items():
            if name not in self.named:
                continue
            try:
                self.named[name].load_state_dict(state)
            except AptError:
                raise
            except Exception as error:
                raise CallbackError(
                    f"callback {name}: its load_state_dict failed: {type(error).__name__}: {error}"
                ) from error

    def notify(self, event: Event, trainer: TrainerView, *details: object) -> None:
        """Call ``event`` of every callback.

        Raises:
            CallbackError: one raised; the message has its name and the clock.
        """
        for callback in self.callbacks:
            try:
                getattr(callback, event)(trainer, *details)
            except AptError:
                raise
            except Exception as error:
                raise CallbackError(
                    f"callback {type(callback).__name__}.{event} failed at {trainer.clock}: {type(error).__name__}: {error}"
                ) from error
