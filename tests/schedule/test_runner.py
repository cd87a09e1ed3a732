from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_model.errors import ConfigError
from apt_model.schedule import Change, Clock, Horizon, ScheduleRunner

CURRICULUM = {
    "enable_moe_at_epoch": 1,
    "enable_align_at_step": 7,
    "route_temp": {"start": 1.5, "end": 0.5, "by": "epoch"},
    "align_weight": {"start": 0.0, "end": 0.3, "by": "step", "warmup": 4},
}


class Board:
    """Remembers every write in order."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, float | bool]] = []

    def setter(self, name: str):
        return lambda value: self.writes.append((name, value))

    def connect(self, runner: ScheduleRunner) -> ScheduleRunner:
        names = ("router.temperature", "moe.capacity_factor", "align.weight", "voter.threshold")
        runner.bind(
            values={name: self.setter(name) for name in names},
            switches={name: self.setter(name) for name in ("moe", "align", "voter")},
        )
        return runner


def runner(epochs: int = 3, updates: int = 4, **changes) -> ScheduleRunner:
    return ScheduleRunner(horizon=Horizon(epochs=epochs, updates_per_epoch=updates), **(CURRICULUM | changes))


def clocks(epochs: int = 3, updates: int = 4) -> list[Clock]:
    return [Clock(epoch=step // updates, step=step) for step in range(epochs * updates)]


def test_the_first_apply_writes_everything_switches_first_and_later_ones_only_what_changed() -> None:
    board = Board()
    schedule = board.connect(runner())
    first = schedule.apply(Clock())
    assert board.writes == [
        ("moe", False),
        ("align", False),
        ("voter", False),
        ("router.temperature", 1.5),
        ("align.weight", 0.0),
    ]
    assert [change.name for change in first] == [
        "moe_enabled",
        "align_enabled",
        "voter_enabled",
        "route_temp",
        "align_weight",
    ]

    board.writes.clear()
    history = {clock.step: schedule.apply(clock) for clock in clocks()[1:]}
    assert history[4] == [Change("moe_enabled", True), Change("route_temp", 1.0)]
    assert history[8] == [Change("route_temp", 0.5), Change("align_weight", pytest.approx(0.3 * 4 / 7))]
    assert history[7] == [Change("align_enabled", True), Change("align_weight", pytest.approx(0.3 * 3 / 7))]
    assert history[2] == []  # the warmup of a start at 0 stays 0
    assert board.writes.count(("moe", True)) == 1


def test_metrics_are_the_scheduled_values() -> None:
    schedule = Board().connect(runner())
    schedule.apply(Clock(epoch=2, step=11))
    assert schedule.metrics() == {
        "schedule/moe_enabled": 1.0,
        "schedule/align_enabled": 1.0,
        "schedule/voter_enabled": 0.0,
        "schedule/route_temp": 0.5,
        "schedule/align_weight": 0.3,
    }


@given(stop=st.integers(0, 11))
def test_a_resume_at_any_step_delivers_what_the_run_without_interruption_does(stop: int) -> None:
    whole = Board().connect(runner())
    expected = [(whole.apply(clock), whole.metrics()) for clock in clocks()]

    before = Board().connect(runner())
    for clock in clocks()[:stop]:
        before.apply(clock)
    after = Board().connect(runner())
    state = before.state_dict()
    after.load_state_dict(state)
    after.reconcile()
    assert [(after.apply(clock), after.metrics()) for clock in clocks()[stop:]] == expected[stop:]


def test_loaded_state_does_not_override_an_edited_curriculum() -> None:
    old = Board().connect(runner())
    old.apply(Clock(epoch=1, step=4))
    board = Board()
    new = board.connect(runner(enable_moe_at_epoch=2))
    new.load_state_dict(old.state_dict())
    new.apply(Clock(epoch=1, step=5))
    assert ("moe", False) in board.writes


def test_a_changed_horizon_needs_a_word() -> None:
    state = Board().connect(runner()).state_dict()
    at = Clock(epoch=2, step=8)

    with pytest.raises(ConfigError, match=r"3 epochs x 4 updates.*5 epochs x 4 updates.*on_horizon_change=rescale"):
        runner(epochs=5).load_state_dict(state)

    rescaled = runner(epochs=5, on_horizon_change="rescale")
    rescaled.load_state_dict(state)
    assert rescaled.at(at)["route_temp"] == pytest.approx(1.0)

    kept = runner(epochs=5, on_horizon_change="keep_absolute")
    kept.load_state_dict(state)
    assert kept.at(at)["route_temp"] == 0.5
    assert kept.at(Clock(epoch=4, step=16))["route_temp"] == 0.5
    assert kept.state_dict()["horizon"]["epochs"] == 3


def test_what_the_model_does_not_have_is_named_with_the_nearest() -> None:
    schedule = runner()
    with pytest.raises(ConfigError) as caught:
        schedule.bind(values={"router.temprature": print, "align.weight": print}, switches={"align": print})
    assert "schedule.route_temp.target: the model has no router temperature: " in str(caught.value)
    assert "Did you mean 'router.temprature'" in str(caught.value)
    with pytest.raises(ConfigError, match=r"schedule\.enable_moe_at_epoch: the model has no module 'moe'"):
        schedule.bind(values={"router.temperature": print, "align.weight": print}, switches={"align": print})


def test_modules_of_somebody_elses_model_are_switched_under_their_own_names() -> None:
    events = {"on": {"enable": "gate", "at": "5st"}, "off": {"disable": "gate", "at": "gate.enabled + 2st"}}
    schedule = ScheduleRunner(horizon=Horizon(epochs=3, updates_per_epoch=4), modules=["gate"], events=events)
    writes: list[bool] = []
    schedule.bind(values={}, switches={"gate": writes.append})
    assert schedule.at(Clock()) == {"gate_enabled": False}
    assert [clock.step for clock in clocks() if schedule.apply(clock)] == [0, 5, 7]
    assert writes == [False, True, False]
    with pytest.raises(ConfigError, match=r"schedule\.events\.on: there is no module 'gate'\. Valid names: align, moe"):
        ScheduleRunner(horizon=Horizon(epochs=3, updates_per_epoch=4), events=events)
