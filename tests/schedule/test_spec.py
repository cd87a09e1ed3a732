from __future__ import annotations

import pytest

from apt_model.errors import ConfigError
from apt_model.schedule import Anneal, Clock, Curriculum, Horizon, Program

HORIZON = Horizon(epochs=8, updates_per_epoch=25)


def program(**curriculum) -> Program:
    return Program(Curriculum.read(curriculum), HORIZON)


def test_planned_updates_are_epochs_times_batches_over_accumulation_rounded_up() -> None:
    assert Horizon.plan(epochs=3, batches_per_epoch=10, accumulate=4).steps == 9
    assert Horizon.plan(epochs=3, batches_per_epoch=8, accumulate=4).steps == 6


def test_by_epoch_moves_with_the_epoch_and_by_step_with_the_step() -> None:
    bound = program(
        route_temp={"start": 1.0, "end": 8.0, "by": "epoch"}, align_weight={"start": 0.0, "end": 199.0, "by": "step"}
    )
    state = bound.at(Clock(epoch=3, step=80))
    assert state["route_temp"] == 4.0
    assert state["align_weight"] == pytest.approx(80.0)


@pytest.mark.parametrize(("warmup", "count"), [(0, 0), (5, 5), ("10%", 20), ("0.2%", 0), ("0.25%", 1), ("99.9%", 200)])
def test_a_warmup_is_a_count_or_a_share_of_the_run_rounded_to_the_nearest(warmup: int | str, count: int) -> None:
    assert Anneal(start=0.0, end=1.0, by="step").length(warmup, 200, HORIZON) == count


def test_a_warmup_as_long_as_the_run_names_both_numbers_and_the_remedy() -> None:
    anneal = {"start": 0.0, "end": 0.3, "by": "step"}
    with pytest.raises(
        ConfigError, match=r"schedule\.align_weight\.warmup is 200 .*only 200 steps.*trainer\.max_epochs"
    ):
        program(align_weight=anneal | {"warmup": 200})
    program(align_weight=anneal | {"warmup": 199})


@pytest.mark.parametrize("key", ["enable_moe_at_epoch", "enable_align_at_step", "enable_voter_at_epoch"])
def test_a_switch_after_the_end_is_refused_with_both_numbers(key: str) -> None:
    length = HORIZON.length("epoch" if key.endswith("epoch") else "step")
    program(**{key: length - 1})
    with pytest.raises(ConfigError, match=rf"schedule\.{key} = {length} would never happen: the run has {length} "):
        program(**{key: length})


def test_enabled_is_a_pure_function_of_the_clock() -> None:
    bound = program(enable_moe_at_epoch=2, enable_voter_at_step=30)
    assert [bound.at(Clock(epoch=e))["moe_enabled"] for e in (0, 1, 2, 3)] == [False, False, True, True]
    assert [bound.at(Clock(step=s))["voter_enabled"] for s in (29, 30, 31)] == [False, True, True]
    assert not bound.at(Clock(epoch=7, step=199))["align_enabled"]
    assert bound.first_step("moe") == 50


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rout_temp": {}}, r"schedule\.rout_temp: unknown key\. Did you mean 'route_temp'"),
        ({"route_temp": {"start": 1, "end": 1, "strat": 2}}, r"schedule\.route_temp\.strat: unknown key.*'start'"),
        ({"route_temp": {"start": 1}}, r"schedule\.route_temp\.end: missing"),
        ({"route_temp": {"start": "hot", "end": 1}}, r"schedule\.route_temp\.start: 'hot' is not valid"),
        ({"route_temp": {"start": float("nan"), "end": 1}}, r"schedule\.route_temp\.start: nan"),
        ({"route_temp": {"start": 1, "end": 1, "by": "epochs"}}, r"schedule\.route_temp\.by: .*Did you mean 'epoch'"),
        ({"route_temp": {"start": 1, "end": 1, "type": "cosin"}}, r"schedule\.route_temp\.type: .*'cosine'"),
        (
            {"route_temp": {"start": 1, "end": 1, "warmup": 1.5}},
            r"schedule\.route_temp\.warmup: 1\.5 is not a whole number",
        ),
        (
            {"route_temp": {"start": 1, "end": 1, "warmup": "10"}},
            r"schedule\.route_temp\.warmup: '10' is not a whole number",
        ),
        ({"route_temp": {"start": 1, "end": 1, "warmup": -1}}, r"schedule\.route_temp\.warmup: -1 is negative"),
        *(
            (
                {"anneals": {name: {"target": "label_smoothing", "start": 0.1, "end": 0.2}}},
                rf"schedule\.anneals\.{name}: names that end in {end} are those of switches, .* such as "
                rf"schedule\.anneals\.{name.removesuffix(end)}_value\.",
            )
            for name, end in (
                ("moe_enabled", "_enabled"),
                ("embedding_frozen", "_frozen"),
                ("moe_grown8", "_grown8"),
            )
        ),
        (
            {"anneals": {"lr": {"target": "label_smoothing", "start": 0.1, "end": 0.2}}},
            r"schedule\.anneals\.lr: lr is the learning rate, .* writes label_smoothing\. Call it by that",
        ),
        *(
            (
                {kind: {"late\nenabled": {}}},
                rf"schedule\.{kind}: 'late\\nenabled' cannot be a name\. Call it by letters, digits, _, - and \. alone",
            )
            for kind in ("anneals", "events")
        ),
        ({"anneals": {"train/loss": {}}}, r"schedule\.anneals: 'train/loss' cannot be a name"),
        ({"enable_moe_at_epoch": -1}, r"schedule\.enable_moe_at_epoch: -1 is not valid"),
        ({"enable_moe_at_epoch": 1.5}, r"schedule\.enable_moe_at_epoch: 1\.5 is not valid"),
        ({"enable_moe_at_epoch": True}, r"schedule\.enable_moe_at_epoch: True is not valid"),
        (
            {"enable_moe_at_epoch": 1, "enable_moe_at_step": 1},
            r"enable_moe_at_epoch and .*enable_moe_at_step are both set",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_full_key(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Curriculum.read(values)


@pytest.mark.parametrize("name", ["late_2", "enabled", "moe-rate", "Größe", "grown", "lr_factor"])
def test_an_anneal_may_have_any_other_name(name: str) -> None:
    curriculum = Curriculum.read({"anneals": {name: {"target": "label_smoothing", "start": 0.1, "end": 0.2}}})
    assert list(curriculum.all_anneals) == [name]


def test_an_anneal_of_the_learning_rate_may_have_its_name() -> None:
    Curriculum.read({"anneals": {"lr": {"target": "optimizer.lr", "start": 0.1, "end": 0.2}}})


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        (
            "route_temp",
            {"start": 1.5, "end": 0.0},
            r"route_temp\.end = 0 is outside its domain: it must be greater than 0",
        ),
        ("moe_capacity", {"start": -1.0, "end": 1.0}, r"moe_capacity\.start = -1 is outside"),
        (
            "route_temp",
            {"start": 1.0, "end": 2.0, "type": "one_cycle", "peak": 3.0, "peak_at": "100%"},
            r"peak_at is 100% = 8",
        ),
        (
            "route_temp",
            {"start": 1.0, "end": 2.0, "type": "one_cycle", "peak": -3.0},
            r"route_temp\.peak = -3 is outside",
        ),
        ("route_temp", {"start": 1.0, "end": 2.0, "type": "step"}, r"route_temp\.steps: missing; type: step needs it"),
        ("route_temp", {"start": 1.0, "end": 2.0, "power": 2}, r"route_temp\.power: only type: polynomial reads it"),
        ("align_weight", {"start": 1.0, "end": 0.0, "type": "exponential"}, r"both must be of one sign and not 0"),
        ("align_weight", {"points": {"2ep": 1.0, "1ep": 0.0}}, r"points: 2ep, 1ep are not in the order of time"),
        ("align_weight", {"points": {"9ep": 1.0}}, r"points: 9ep is after the end"),
        (
            "align_weight",
            {"start": 0.0, "segments": [{"ramp": 1.0, "over": 9}]},
            r"segments take 9 epochs, .* only 8 for one",
        ),
        (
            "align_weight",
            {"start": 0.0, "segments": [{"ramp": 1.0, "hold": 2}]},
            r"segments\[0\]: give one of ramp, hold",
        ),
        (
            "align_weight",
            {"start": 0.0, "end": 1.0, "from": "9ep"},
            r"its window ends before it begins, or begins after",
        ),
        ("align_weight", {"start": 0.0, "end": 1.0, "until": 2, "over": 2}, r"until and .*over are both set"),
        ("align_weight", {"start": 0.0, "end": 1.0, "cooldown": 5, "warmup": 4}, r"warmup and cooldown take 9 epochs"),
        (
            "align_weight",
            {"start": 0.0, "end": 1.0, "warmup": "moe.enabled"},
            r"warmup: 'moe\.enabled' is a time after",
        ),
        (
            "align_weight",
            {"points": {"moe.enabled + 1ep": 1.0}},
            r"points: 'moe\.enabled \+ 1ep' is a time after an event",
        ),
        ("align_weight", {"points": {}}, r"points: empty"),
        ("align_weight", {"start": 0.0, "end": 1.0, "from": "50%", "over": "90%"}, r"over = 90% ends after the run"),
        ("align_weight", {"start": 0.0, "end": -0.1}, r"align_weight\.end = -0\.1 is outside.*at least 0"),
        (
            "route_temp",
            {"start": 1.5, "end": 0.8, "warmup": 2},
            r"route_temp\.warmup = 2 ramps up from 0, which is outside",
        ),
    ],
)
def test_a_value_outside_its_domain_is_found_before_launch(name: str, spec: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        program(**{name: spec})


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        program(enable_moe_at_epoch=8, route_temp={"start": 0, "end": -1})
    assert len(caught.value.problems) == 3
