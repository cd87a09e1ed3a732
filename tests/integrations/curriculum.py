"""The curriculum that tests run in trainers of other libraries."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from apt_model.gpt import GPT
from apt_model.layers.moe import MoE
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


def net() -> GPT:
    """Return the small model that the models of other people are made of; its weights are always the same."""
    torch.manual_seed(0)
    return GPT(vocab_size=20, d_model=8, num_heads=2, num_layers=2, d_ff=16, seq_len=6, moe=partial(MoE, num_experts=4))
