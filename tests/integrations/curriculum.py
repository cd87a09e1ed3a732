"""The curriculum that tests run in trainers of other libraries."""

from __future__ import annotations

from typing import Any

from apt_model.schedule import Horizon, ScheduleRunner

CURRICULUM = {
    "enable_moe_at_epoch": 1,
    "enable_align_at_step": 5,
    "route_temp": {"start": 2.0, "end": 0.5, "by": "epoch"},
    "align_weight": {"start": 0.0, "end": 0.8, "by": "step"},
}


def runner(**curriculum: Any) -> ScheduleRunner:
    """Return a runner of 4 epochs of 3 updates."""
    return ScheduleRunner(horizon=Horizon(epochs=4, updates_per_epoch=3), **(curriculum or CURRICULUM))
