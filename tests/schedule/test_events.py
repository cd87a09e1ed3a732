from __future__ import annotations

import math
import random
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.errors import ConfigError
from apt_model.schedule import Clock, Curriculum, Horizon, Program, ScheduleRunner
from apt_model.schedule.program import LatchState
from apt_model.schedule.timeline import timeline

HORIZON = Horizon.plan(epochs=5, batches_per_epoch=4, batch_size=2, tokens_per_sample=8)


def program(**curriculum) -> Program:
    return Program(Curriculum.read(curriculum), HORIZON)


def on_at(bound: Program, label: str) -> list[int]:
    return [step for step in range(HORIZON.steps) if bound.at(HORIZON.clock_at(step))[label]]


def run(values, **curriculum) -> tuple[list[bool], ScheduleRunner]:
    """Whether the voter is on at each update, with ``values`` as the metric after each."""
    runner = ScheduleRunner(horizon=HORIZON, **curriculum)
    on = []
    for step, value in enumerate(values):
        runner.apply(HORIZON.clock_at(step))
        on.append(bool(runner.metrics()["schedule/voter_enabled"]))
        runner.observe({"entropy": value})
    return on, runner


def latch(**when) -> dict:
    return {"events": {"vote": {"enable": "voter", "when": {"metric": "entropy", **when}}}}


def test_events_switch_on_and_off_in_the_order_of_time() -> None:
    bound = program(
        events={
            "c": {"disable": "moe", "at": "3ep"},
            "a": {"enable": "moe", "at": "5st"},
            "d": {"enable": "moe", "at": "90%"},
            "f": {"freeze": "embedding", "at": "moe.enabled + 1st"},
            "u": {"unfreeze": "embedding", "at": "embedding.frozen + 1ep"},
        }
    )
    assert on_at(bound, "moe_enabled") == [*range(5, 12), 18, 19]
    assert on_at(bound, "embedding_frozen") == [6, 7, 8, 9]
    assert bound.first_step("moe") == 5


def test_names_of_the_profile_and_events_share_one_arbiter() -> None:
    bound = program(enable_moe_at_epoch=1, events={"off": {"disable": "moe", "at": "3ep"}})
    assert on_at(bound, "moe_enabled") == list(range(4, 12))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ({"a": {"enable": "moe"}}, r"events\.a: give one of at and when"),
        ({"a": {"at": "1ep"}}, r"events\.a: give one of enable, disable, freeze, unfreeze, grow, not none"),
        ({"a": {"enable": "moe", "disable": "voter", "at": "1ep"}}, r"not enable and disable"),
        ({"a": {"enable": "moe", "at": 2}}, r"events\.a\.at: 2 of what\? Write 2ep for epochs, 2st for steps"),
        (
            {"a": {"enable": "moe", "at": "2parsecs"}},
            r"events\.a\.at: '2parsecs' is not a whole number, or a time such as",
        ),
        ({"a": {"enable": "moe", "att": "2ep"}}, r"events\.a\.att: unknown key\. Did you mean 'at'"),
        ({"a": {"enable": "mo", "at": "2ep"}}, r"events\.a: there is no module 'mo'\. Did you mean 'moe'"),
        (
            {"a": {"enable": "moe", "at": "5ep"}},
            r"events\.a = 5ep \(step 20\) would never happen: the run has 5 epochs",
        ),
        (
            {"a": {"enable": "moe", "at": "1ep"}, "b": {"disable": "moe", "at": "4st"}},
            r"events\.b: moe is switched at step 4 by schedule\.events\.a, too",
        ),
        (
            {"a": {"enable": "moe", "at": "voter.enabled + 1st"}},
            r"events\.a: waits for voter\.enabled, which nothing brings",
        ),
        (
            {"a": {"enable": "moe", "at": "1ep"}, "b": {"enable": "moe", "when": {"metric": "x", "above": 1}}},
            r"events\.b: moe is switched by schedule\.events\.a already, and a latch shares a module with nothing",
        ),
        (
            {"a": {"grow": "moe", "at": "1ep"}},
            r"events\.a: grow and to go together, such as \{grow: moe, to: 16, at: 6ep\}",
        ),
        ({"a": {"grow": "align", "to": 8, "at": "1ep"}}, r"events\.a\.grow: 'align' is not .* Valid names: moe"),
        (
            {"a": {"grow": "moe", "to": 8, "when": {"metric": "x", "above": 1}}},
            r"events\.a\.when: experts grow at a time",
        ),
        ({"a": {"grow": "moe", "to": 8, "at": "1ep"}}, r"events\.a: moe is never enabled, so it cannot grow"),
        (
            {"a": {"enable": "moe", "at": "1ep"}, "b": {"grow": "moe", "to": 8, "at": "1ep"}},
            r"events\.b: moe would grow to 8 experts at step 4, and not after step 4, at which moe is enabled",
        ),
        (
            {
                "a": {"enable": "moe", "at": "0ep"},
                "b": {"grow": "moe", "to": 8, "at": "2ep"},
                "c": {"grow": "moe", "to": 16, "at": "1ep"},
            },
            r"events\.c: moe would grow to 16 experts at step 4, and not after step 8, at which it grows to 8",
        ),
        ({"b": {"enable": "moe", "when": {"metric": "x"}}}, r"events\.b\.when: give one of above and below"),
        (
            {"b": {"enable": "moe", "when": {"metric": "x", "above": 1.0, "release": 2.0}}},
            r"events\.b\.when\.release = 2 must be at most above = 1",
        ),
        ({"b": {"disable": "moe", "when": {"metric": "x", "above": 1}}}, r"a latch enables or freezes"),
        (
            {"b": {"enable": "moe", "when": {"metric": "x", "above": 1, "not_before": "2ep", "deadline": "1ep"}}},
            r"the latch of moe has its deadline at 1ep = step 4, before 2ep = step 8",
        ),
        (
            {"b": {"enable": "moe", "when": {"metric": "x", "above": 1, "hold": "voter.enabled"}}},
            r"hold: voter\.enabled is a time after an event; a length",
        ),
        (
            {"b": {"enable": "moe", "when": {"metric": "x", "above": 1, "not_before": "9ep"}}},
            r"latch of moe may act from 9ep = step 36 on",
        ),
    ],
)
def test_what_cannot_be_is_named_with_its_full_key(events: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        program(events=events)


def test_a_latch_turns_on_after_the_update_whose_metric_passed_its_threshold() -> None:
    on, _ = run([1, 1, 3, 1, 1], **latch(above=2.0))
    assert on == [False, False, False, True, True]


def test_a_latch_below_a_threshold_and_its_release_make_a_band() -> None:
    on, _ = run([5, 1, 2.5, 3.5, 2.5, 1, 1], **latch(below=2.0, release=3.0))
    assert on == [False, False, True, True, False, False, True]


def test_nothing_happens_before_its_time_and_the_deadline_turns_on_whatever_the_metric_says() -> None:
    on, _ = run([9] * 20, **latch(above=2.0, not_before="2ep"))
    assert on.index(True) == 8
    on, _ = run([0] * 20, **latch(above=2.0, deadline="3ep"))
    assert on.index(True) == 12
    assert all(on[12:])


def test_a_flip_holds_for_the_shortest_time_between_two() -> None:
    on, _ = run([3, 0] * 10, **latch(above=2.0, release=1.0, hold="4st"))
    flips = [step for step in range(1, 20) if on[step] != on[step - 1]]
    assert flips
    assert all(later - earlier >= 4 for earlier, later in pairwise(flips))


def test_a_metric_is_smoothed_as_worked_out_by_hand() -> None:
    _, runner = run([1.0, 2.0, 4.0], **latch(above=9.0, smooth=0.5))
    (state,) = runner.state_dict()["latches"].values()
    assert state["smoothed"] == pytest.approx(0.5 * (0.5 * 1.0 + 0.5 * 2.0) + 0.5 * 4.0)


def test_smoothing_a_band_and_a_hold_stop_the_flipping_of_a_noisy_metric() -> None:
    noise = random.Random(0)
    horizon = Horizon(epochs=1, updates_per_epoch=2000)
    values = [2.2 + noise.gauss(0, 0.3) for _ in range(2000)]

    def flips(**when) -> int:
        runner = ScheduleRunner(horizon=horizon, **latch(above=2.2, **when))
        count = 0
        for step, value in enumerate(values):
            count += sum(change.name == "voter_enabled" for change in runner.apply(Clock(step=step))) * (step > 0)
            runner.observe({"entropy": value})
        return count

    assert flips(release=2.2) > 500
    assert flips(release=2.0, smooth=0.98, hold="100st") <= 1


def test_experts_grow_once_and_values_can_wait_for_it() -> None:
    planned = program(
        events={
            "a": {"enable": "moe", "at": "1ep"},
            "b": {"grow": "moe", "to": 8, "at": "moe.enabled + 2st"},
            "c": {"freeze": "embedding", "at": "moe.grown8 + 1ep"},
        }
    )
    assert on_at(planned, "moe_grown8") == [*range(6, 20)]
    assert on_at(planned, "embedding_frozen") == [*range(10, 20)]
    assert "moe grown to 8 experts" in {what for moment in timeline(planned) for what in moment.what}


def test_values_can_wait_for_a_latch() -> None:
    curriculum = latch(above=2.0) | {
        "vote_threshold": {"start": 3.0, "end": 2.0, "by": "step", "from": "voter.enabled", "over": 4}
    }
    runner = ScheduleRunner(horizon=HORIZON, **curriculum)
    seen = []
    for step in range(10):
        runner.apply(HORIZON.clock_at(step))
        seen.append(runner.metrics()["schedule/vote_threshold"])
        runner.observe({"entropy": 3.0 if step == 2 else 0.0})
    assert seen == pytest.approx([3, 3, 3, 3, 3 - 1 / 3, 3 - 2 / 3, 2, 2, 2, 2])


def test_values_at_a_clock_do_not_depend_on_what_was_asked_before() -> None:
    bound = program(
        **latch(above=2.0),
        vote_threshold={"start": 3.0, "end": 2.0, "by": "step", "from": "voter.enabled", "over": 4},
    )
    (voter,) = bound.latches

    def value(step: int, on_since: int | None) -> float:
        since = None if on_since is None else HORIZON.clock_at(on_since)
        state = LatchState(on=since is not None, flipped=since, first_on=since)
        return bound.at(HORIZON.clock_at(step), {voter: state})["vote_threshold"]

    asked = {(5, None): 3.0, (5, 3): 3 - 2 / 3, (5, 5): 3.0, (7, 6): 3 - 1 / 3, (7, 3): 2.0}
    for order in permutations(asked):
        assert [value(*question) for question in order] == pytest.approx([asked[question] for question in order])
    assert [bound.at(HORIZON.clock_at(step))["vote_threshold"] for step in range(9)] == [3.0] * 9


def test_all_ranks_decide_by_the_metric_of_one() -> None:
    chosen = iter([3.0, 0.0, 3.0])  # what rank 0 has seen
    runner = ScheduleRunner(horizon=HORIZON, broadcast=lambda mine: next(chosen), **latch(above=2.0))
    runner.apply(HORIZON.clock_at(0))
    runner.observe({"entropy": 0.0, "other": 5.0})
    runner.apply(HORIZON.clock_at(1))
    assert runner.metrics()["schedule/voter_enabled"] == 1.0


def test_parameters_that_appear_later_are_frozen_too() -> None:
    calls: list[tuple[str, bool]] = []
    runner = ScheduleRunner(
        horizon=HORIZON,
        enable_moe_at_epoch=2,
        events={"f": {"freeze": "blocks.*.ffn", "at": "1ep"}},
    )
    runner.bind(
        values={},
        switches={name: lambda on: None for name in ("moe", "align", "voter")},
        freeze=lambda pattern, on: calls.append((pattern, on)),
    )
    for step in range(12):
        runner.apply(HORIZON.clock_at(step))
    assert calls == [("blocks.*.ffn", False), ("blocks.*.ffn", True), ("blocks.*.ffn", True)]


units = st.sampled_from(["1ep", "2ep", "7st", "30%", "20sa", "100tok"])
metrics = st.lists(st.floats(0, 5), min_size=20, max_size=20)


@settings(deadline=None)
@given(data=st.data(), stop=st.integers(0, 19), seen=metrics)
def test_a_resume_at_any_step_equals_the_run_without_interruption(data, stop: int, seen: list[float]) -> None:
    by = data.draw(st.sampled_from(["epoch", "step", "sample", "token"]))
    shape = data.draw(st.sampled_from(["linear", "cosine", "sqrt"]))
    curriculum = {
        "enable_moe_at_step": data.draw(st.integers(0, 19)),
        "route_temp": {"start": 1.5, "end": 0.8, "by": by, "type": shape},
        "vote_threshold": {"start": 3.0, "end": 2.0, "by": "step", "from": "voter.enabled + 1st", "until": "100%"},
        "anneals": {"d": {"target": "x", "start": 0.0, "end": 0.5, "by": by, "warmup": data.draw(units)}},
        "events": {
            "vote": {
                "enable": "voter",
                "when": {
                    "metric": "entropy",
                    "above": 2.5,
                    "release": data.draw(st.one_of(st.none(), st.floats(0, 2.5))),
                    "smooth": data.draw(st.floats(0, 0.9)),
                    "hold": data.draw(units),
                    "not_before": data.draw(units),
                    "deadline": data.draw(st.one_of(st.none(), units)),
                },
            },
            "f": {"freeze": "embedding", "at": "voter.enabled + 3st"},
        },
    }
    when = curriculum["events"]["vote"]["when"]
    if when["deadline"] is not None:
        when["not_before"] = "0st"  # a deadline before it would be refused
    if by == "epoch" and curriculum["anneals"]["d"]["warmup"] in ("7st", "20sa", "100tok"):
        curriculum["anneals"]["d"]["warmup"] = 0  # no whole number of epochs: refused

    def steps(runner: ScheduleRunner, begin: int, end: int) -> list:
        told = []
        for step in range(begin, end):
            changes = runner.apply(HORIZON.clock_at(step))
            told.append((changes, runner.metrics()))
            runner.observe({"entropy": seen[step]})
        return told

    whole = steps(ScheduleRunner(horizon=HORIZON, **curriculum), 0, 20)
    first = ScheduleRunner(horizon=HORIZON, **curriculum)
    steps(first, 0, stop)
    second = ScheduleRunner(horizon=HORIZON, **curriculum)
    second.load_state_dict(first.state_dict())
    second.reconcile()
    assert steps(second, stop, 20) == whole[stop:]
    assert all(math.isfinite(value) for _, metrics in whole for value in metrics.values())
