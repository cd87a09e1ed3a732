from __future__ import annotations

import pytest
import torch
from torch import nn

from apt_model.schedule import Clock, Horizon, ScheduleRunner
from apt_model.training.schedule_driver import ScheduleDriver, numbers, sizes


def driver(layer: nn.Module, optimizer: torch.optim.Optimizer, **curriculum) -> ScheduleDriver:
    made = ScheduleDriver(ScheduleRunner(horizon=Horizon(epochs=2, updates_per_epoch=3), **curriculum))
    made.connect(layer, optimizer)
    return made


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_mixed_precision_skips_has_not_happened(fused: bool) -> None:
    layer = nn.Linear(2, 1)
    loop = driver(layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused))
    stop = loop.watch()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False):
        loop.begin_update()
        loop.count(samples=1, tokens=2)
        before = layer.weight.clone()
        scaler.scale(layer(torch.full((1, 2), torch.inf if bad else 1.0)).sum()).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        assert loop.happened is not bad
        assert torch.equal(before, layer.weight) is bad
        if bad:
            loop.skip_update()
        else:
            loop.end_update({})
    assert loop.clock == Clock(step=2, sample=2, token=4)
    stop()
    loop.optimizer.step()
    assert not loop.happened


def test_state_goes_through_plain_values_and_latches_stay() -> None:
    layer = nn.Linear(2, 1)
    latch = {"x": {"enable": "align", "when": {"metric": "m", "above": 1.0}}}
    loops = [driver(layer, torch.optim.SGD(layer.parameters()), events=latch) for _ in range(2)]
    on: list[bool] = []
    loops[1].schedule.bind(values={}, switches={"align": on.append})
    loops[0].begin_update()
    loops[0].count(samples=3, tokens=3)
    loops[0].end_update({"m": 2.0})
    loops[0].begin_update()
    loops[1].load_state_dict(loops[0].state_dict())
    assert loops[1].clock == Clock(step=1, sample=3, token=3)
    loops[1].reconcile()
    assert on == [True]


def test_sizes_are_those_of_the_first_tensor() -> None:
    ids, x = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(4, 3)
    assert sizes(ids) == sizes([ids, x]) == sizes({"x": x, "input_ids": ids}) == (2, 10)
    assert sizes({"name": "a", "x": x, "ids": ids}) == sizes([[torch.zeros(())], x]) == (4, 4)
    assert sizes("text") == sizes(torch.zeros(())) == (0, 0)


def test_numbers_leave_out_what_is_none() -> None:
    assert numbers({"a": torch.tensor([2.0]), "b": 3, "c": torch.zeros(2), "d": "x"}) == {"a": 2.0, "b": 3.0}


def test_the_names_that_loops_were_written_with_mean_the_same() -> None:
    from apt_model.training import follower, schedule_driver

    assert follower.Follower is schedule_driver.ScheduleDriver
    assert follower.bind is schedule_driver.bind
