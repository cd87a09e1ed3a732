"""A curriculum, a model and its optimizer, taken from update to update; whose loop that is does not matter here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.errors import ConfigError
from apt_model.layers import balance, scheduled
from apt_model.layers.in_place import layers_in_place, moe_layers
from apt_model.layers.moe import MoE
from apt_model.layers.voter import EntropyVoter
from apt_model.schedule import Change, Clock, ScheduleRunner
from apt_model.schedule.program import Subject, grown_to
from apt_model.schedule.targets import Domain
from apt_model.training import subject
from apt_model.training.distributed import sum_of
from apt_model.training.optimizer import follow_model
from apt_model.training.sharding import shared_as

logger = logging.getLogger(__name__)

Values = Mapping[str, Callable[[float], None]]
Switches = Mapping[str, Callable[[bool], None]]


def bind(
    schedule: ScheduleRunner,
    model: nn.Module,
    *,
    values: Values | None = None,
    switches: Switches | None = None,
    resize: Callable[..., None] | None = None,
    more: Values | None = None,
    domains: Mapping[str, Domain] | None = None,
) -> None:
    """Bind ``schedule`` to ``model``, and announce to its modules which values will move.

    Args:
        values: targets and their setters; None: every value that a module of ``model`` declares as scheduled.
        switches: modules and what switches them; None: those of ``model.switches()``, if it has them.
        resize: see :meth:`ScheduleRunner.bind`; None: that of the model's own layers of experts.
        more: targets beside ``values``.
        domains: of ``more``.

    Raises:
        ConfigError: the curriculum names something that is not there.
    """
    own = scheduled.targets(model)
    if switches is None:
        switches = subject.switches(model)
    schedule.bind(
        values={**(scheduled.setters(model) if values is None else values), **(more or {})},
        switches=switches,
        freeze=subject.freezer(model),
        resize=resize or (partial(subject.resize, model) if moe_layers(model) else None),
        domains={**own, **(domains or {})},
    )
    scheduled.expect(model, (name for name in schedule.targets if name in own))
    for module in model.modules():
        if isinstance(module, EntropyVoter):
            module.watched = "voter/entropy" in schedule.program.watched


def restore_model(
    model: nn.Module,
    schedule: ScheduleRunner,
    state: Mapping[str, Any],
    *,
    switches: Switches | None = None,
    resize: Callable[..., None] | None = None,
) -> None:
    """Give ``model`` the modules and weights of a checkpoint's state; ``schedule`` can be reconciled then.

    Args:
        switches, resize: see :func:`bind`.

    Raises:
        ConfigError: the state is of another model, or of another length of the run.
    """
    schedule.load_state_dict(state["schedule"])
    restore_weights(model, state, switches=switches, resize=resize)


def restore_weights(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    switches: Switches | None = None,
    resize: Callable[..., None] | None = None,
) -> None:
    """Give ``model`` the modules and weights of a checkpoint's state.

    Args:
        switches, resize: see :func:`bind`.

    Raises:
        ConfigError: the state is of another model.
    """
    resize = resize or partial(subject.resize, model)
    resize()
    for module, switch in (subject.switches(model) if switches is None else switches).items():
        switch(state["schedule"]["on"].get(f"{module}_enabled", False))
    resize(at_least=grown_to(Subject.of(label) for label, on in state["schedule"]["on"].items() if on))
    subject.take_lineage(model)
    own = model.state_dict()
    weights = {name: shared_as(value, own[name]) if name in own else value for name, value in state["model"].items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint was made for another model. {error}") from None


class ScheduleDriver:
    """Drives a curriculum: before an update it sets the model to the clock, after it the clock advances.

    ``clock`` is that of the current update, or of the next one. A loop calls :meth:`begin_update`, then
    :meth:`count` for each batch, then :meth:`end_update` if the optimizer has changed the weights, :meth:`skip_update` if
    mixed precision kept it from that. Where the optimizer is stepped by somebody else, :meth:`watch` it: ``happened`` then
    says which of the two to call.
    """

    schedule: ScheduleRunner
    model: nn.Module
    optimizer: torch.optim.Optimizer
    over_ranks: Callable[[Tensor], Tensor] = staticmethod(sum_of)  # of counts of one update

    def __init__(self, schedule: ScheduleRunner) -> None:
        self.schedule = schedule
        self.clock = Clock()
        self.samples = 0  # of the current update
        self.tokens = 0
        self.happened = False
        self._begun: Clock | None = None  # the clock of the current update
        self._left_out: frozenset[nn.Parameter] = frozenset()

    def connect(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take up a model and its optimizer; parameters that it leaves out now stay out."""
        self.model = model
        self.__dict__.pop("moe_layers", None)  # of a model before
        self.optimizer = optimizer
        self._note_left_out()

    def _note_left_out(self) -> None:
        held = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        self._left_out = frozenset(parameter for parameter in self.model.parameters() if parameter not in held)

    def watch(self) -> Callable[[], None]:
        """Notice from now on whether the optimizer really steps; return what ends that."""

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            # a fused optimizer is called also with gradients that overflowed, and leaves the weights alone
            self.happened = not bool(getattr(optimizer, "found_inf", None) or 0.0)

        remove: Callable[[], None] = self.optimizer.register_step_post_hook(stepped).remove
        return remove

    @property
    def begun(self) -> bool:
        """Whether the update of the clock is in progress."""
        return self._begun == self.clock

    def begin_update(self) -> list[Change]:
        """Set the model and the optimizer to the clock; return what changed."""
        self._begun = self.clock
        self.samples = self.tokens = 0
        self.happened = False
        changes = self.schedule.apply(self.clock)
        if changes:
            self.follow()
        balance.begin_update(self.moe_layers, self.over_ranks)
        return changes

    @cached_property
    def moe_layers(self) -> list[MoE]:
        """The model's layers that are, or may become, mixtures of experts."""
        return moe_layers(self.model) if hasattr(self, "model") else []

    def follow(self) -> None:
        """Give the optimizer the parameters that the model has now, if the model says where they came from."""
        if callable(getattr(self.model, "take_lineage", None)) or layers_in_place(self.model):
            follow_model(self.optimizer, self.model, subject.take_lineage(self.model), left_out=self._left_out)
            self._note_left_out()

    def count(self, *, samples: int, tokens: int) -> None:
        """Count a batch of the current update."""
        self.samples += samples
        self.tokens += tokens

    def end_update(self, metrics: Mapping[str, float]) -> None:
        """Show latches the update's metrics, and advance the clock."""
        balance.end_update(self.moe_layers)
        self.schedule.observe(metrics)
        self.clock = self.clock.after_update(samples=self.samples, tokens=self.tokens)
        self.happened = False

    def skip_update(self) -> None:
        """Forget the current update: the weights are those from before."""
        balance.skip_update(self.moe_layers)
        self._begun = None

    def state_dict(self) -> dict[str, Any]:
        """Return the clock and the runner's state, as plain values."""
        return {"clock": asdict(self.clock), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned; :meth:`reconcile` then sets a model to it.

        Raises:
            ConfigError: the horizon has changed and ``on_horizon_change`` is ``error``.
        """
        self.schedule.load_state_dict(state["schedule"])
        self.clock = Clock(**state["clock"])
        self._begun = None

    def reconcile(self) -> None:
        """Bring model and optimizer to what the last update had, whatever they hold."""
        if self.schedule.reconcile():
            self.follow()


def sizes(batch: Any) -> tuple[int, int]:
    """Return the samples and tokens of ``batch``, by the shape of its first tensor; ``input_ids`` is preferred.

    Integers (batch, seq, ...) are batch x seq tokens; anything else has one token a sample.
    """
    if isinstance(batch, Tensor):
        if batch.dim() == 0:
            return 0, 0
        of_tokens = batch.dim() > 1 and not batch.is_floating_point()
        return batch.shape[0], batch.shape[0] * (batch.shape[1] if of_tokens else 1)
    parts: list[Any] = []
    if isinstance(batch, Mapping):
        parts = [batch["input_ids"]] if "input_ids" in batch else list(batch.values())
    elif isinstance(batch, list | tuple):
        parts = list(batch)
    return next((found for found in map(sizes, parts) if found[0]), (0, 0))


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those of ``metrics`` that are numbers or tensors of one element."""
    single = {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in metrics.items()
        if not isinstance(value, Tensor) or value.numel() == 1
    }
    return {name: float(value) for name, value in single.items() if isinstance(value, int | float)}


def subject_of(model: nn.Module) -> nn.Module:
    """Return the part of ``model`` that a curriculum is about: the first that has ``switches()``, else all of it."""
    return next((module for module in model.modules() if callable(getattr(module, "switches", None))), model)
