"""Whether the run that another library's loop is about to make is the one that the curriculum was planned for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from apt_model.errors import ConfigError, HorizonError
from apt_model.schedule import Anneal, Clock, ScheduleRunner
from apt_model.schedule.spec import Curriculum
from apt_model.schedule.times import Time

logger = logging.getLogger(__name__)


class HostRun:
    """The run of another library's loop, compared with the horizon before it begins and, where that takes it, meanwhile.

    Args:
        schedule: whose horizon it shall fit.
        steps: updates of the whole run at the most; None: the loop has no end of its own.
        updates_per_epoch: None: unknown before the epoch is over.
        set_by: the library's names of what decides these numbers.
        stream: the data do not say how long an epoch is.

    Raises:
        ConfigError: the run is longer than planned, or its epochs have another number of updates. One that is shorter is a
            part of the whole: a warning says where it ends.
    """

    def __init__(
        self,
        schedule: ScheduleRunner,
        *,
        steps: int | None,
        updates_per_epoch: int | None,
        set_by: str,
        stream: bool = False,
    ) -> None:
        self.planned = planned = schedule.planned
        self.stream = stream
        by_epoch = goes_by_epoch(schedule.curriculum)
        self._watched = by_epoch and updates_per_epoch is None
        self._updates: int | None = None  # tried in this epoch; None: its begin was not seen
        if steps is None:
            raise ConfigError(f"horizon: {planned} were planned, and this run has no end. Set {set_by}.")
        same_length = steps == planned.steps and not by_epoch
        if updates_per_epoch not in (None, planned.updates_per_epoch) and not same_length:
            raise ConfigError(
                f"horizon: {planned} were planned, and this run makes {updates_per_epoch} updates an epoch: what goes by "
                f"epochs and steps would be off. Give the runner Horizon(epochs={-(-steps // (updates_per_epoch or 1))}, "
                f"updates_per_epoch={updates_per_epoch}), or change {set_by}."
            )
        if steps > planned.steps:
            raise ConfigError(
                f"horizon: {planned} were planned, and this run makes {steps} steps: the curriculum would be over before it. "
                f"Give the runner a horizon of {steps} steps, or change {set_by}."
            )
        if steps < planned.steps:
            logger.warning(
                "%s were planned, and this run ends after %d steps: the curriculum goes on where a resume does.",
                planned,
                steps,
            )

    def begin_epoch(self, epoch: int) -> None:
        """Compare the epoch before with the plan, where that was not possible before.

        Raises:
            HorizonError: a stream gave fewer updates, or more epochs, and the curriculum goes by epochs.
        """
        if not self._watched:
            return
        planned, updates, self._updates = self.planned, self._updates, 0
        if updates is not None and updates < planned.updates_per_epoch:
            self._differs(f"epoch {epoch - 1} had {updates} updates")
        if self.stream and epoch >= planned.epochs:
            self._differs(f"epoch {epoch} begins")

    def _differs(self, what: str) -> None:
        message = f"{what}, and {self.planned} were planned: times in steps and in epochs do not go together."
        if self.stream:
            raise HorizonError(f"{message} Give the runner a horizon with as many as there are.")
        logger.warning("%s", message)

    def before_update(self) -> None:
        """Look whether an update that is about to be made fits the epoch.

        Raises:
            ConfigError: an epoch of a stream goes on past its planned end, and the curriculum goes by epochs.
        """
        if self.stream and self._updates is not None and self._updates >= self.planned.updates_per_epoch:
            raise ConfigError(
                f"horizon: an epoch goes on past the {self.planned.updates_per_epoch} updates that were planned for it, and a "
                "stream does not say where it ends: the curriculum's times in epochs cannot be known. Give times and anneals "
                "by step, sample or token, give the data a length, or plan Horizon(epochs=1, updates_per_epoch=N) for a "
                "stream that never ends."
            )

    def end_update(self) -> None:
        """Count an update that was tried."""
        if self._updates is not None:
            self._updates += 1


def goes_by_epoch(curriculum: Curriculum) -> bool:
    """Return whether some time or anneal of ``curriculum`` counts epochs."""

    def counts(value: Any) -> bool:
        if isinstance(value, Anneal) and value.by == "epoch":
            return True
        if isinstance(value, BaseModel):
            written = {name: getattr(value, name) for name in value.model_fields_set}
            return any(
                part is not None and (name.endswith("_at_epoch") or counts(part)) for name, part in written.items()
            )
        if isinstance(value, Mapping):
            return any(map(counts, value.values()))
        if isinstance(value, list | tuple):
            return any(map(counts, value))
        if isinstance(value, str):
            try:
                value = Time.parse(value, by="step")
            except ValueError:
                return False
        return isinstance(value, Time) and value.unit == "epoch"

    return counts(curriculum)


def anew(schedule: ScheduleRunner) -> dict[str, Any]:
    """Return the state that a ``ScheduleDriver`` of ``schedule`` has before the first update."""
    begin = {"horizon": asdict(schedule.planned), "applied": None, "on": {}, "latches": {}}
    return {"clock": asdict(Clock()), "schedule": begin}
