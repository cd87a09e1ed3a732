"""Losers of a sweep that end early: the rule by hand-computed values, on records as jobs would have written them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from apt_launch.sweep.application import Program
from apt_launch.sweep.control.rungs import rungs
from apt_launch.sweep.jobs.halving import (
    DECISIONS,
    RULE,
    Decision,
    Halving,
    Member,
    Point,
    Rule,
    Setting,
    judge,
    overrule,
)
from apt_launch.sweep.options import StopConfig, updates_of
from apt_launch.sweep.programs.application import HydraMain
from apt_launch.sweep.report.replay import run
from apt_model.errors import ConfigError, validated

A, B, C = (Setting(name, (f"{place}-a", f"{place + 1}-b"), (10, 20)) for name, place in (("a", 0), ("b", 2), ("c", 4)))


def rule(*settings: Setting, direction: str = "minimize", keep: str = "1/2") -> Rule:
    return Rule("val/loss", direction, "tokens", keep, settings)


def member(*values: float, ended: bool = False, every: int = 10) -> Member:
    """A job with a value after each ``every`` updates of two tokens."""
    return Member([Point(every * n, 2.0 * every * n, value) for n, value in enumerate(values, start=1)], ended)


def decided(setting: Setting, members: dict[str, Member], **more: Any) -> tuple[bool, int, int, int] | None:
    found = judge(rule(A, B, C, **more), setting, 10, members)
    return None if found is None else (found.stop, found.place, found.of, found.kept)


def test_a_setting_is_judged_by_the_mean_of_its_seeds_once_all_are_there() -> None:
    members = {"0-a": member(3.0), "1-b": member(3.4), "2-a": member(3.1), "3-b": member()}
    assert decided(B, members) is None
    members["3-b"] = member(3.5)  # 3.3 on average, and a has 3.2
    assert decided(B, members) == (True, 2, 2, 1)
    assert decided(A, members) == (False, 1, 2, 1)
    assert decided(B, members, direction="maximize") == (False, 1, 2, 1)


def test_of_three_settings_the_best_two_go_on() -> None:
    members = {f"{n}-{'ab'[n % 2]}": member(value) for n, value in enumerate((1.0, 1.0, 2.0, 2.0, 3.0, 3.0))}
    assert [decided(one, members) for one in (A, B, C)] == [(False, 1, 3, 2), (False, 2, 3, 2), (True, 3, 3, 2)]
    assert [decided(one, members, keep="1/3") for one in (A, B)] == [(False, 1, 3, 1), (True, 2, 3, 1)]


def test_the_first_that_comes_and_equals_go_on() -> None:
    members = {"0-a": member(3.0), "1-b": member(3.0)}
    assert decided(A, members) == (False, 1, 1, 1)
    assert decided(B, {**members, "2-a": member(3.0), "3-b": member(3.0)}) == (False, 1, 2, 1)


def test_what_is_no_number_is_worst() -> None:
    members = {"0-a": member(9.0), "1-b": member(9.0), "2-a": member(float("nan")), "3-b": member(1.0)}
    found = decided(B, members)
    assert found == (True, 2, 2, 1)


def test_settings_are_compared_at_equal_tokens_whatever_came_later() -> None:
    later = {"0-a": member(5.0, 1.0), "1-b": member(5.0, 1.0)}
    assert decided(B, {**later, "2-a": member(4.0), "3-b": member(4.0)}) == (False, 1, 2, 1)
    # it validates in other updates: the last value before counts, and only once it has come that far
    often = Member([Point(4, 8.0, 6.0), Point(8, 16.0, 3.0)])
    own = {"2-a": member(4.0), "3-b": member(4.0)}
    assert decided(B, {**own, "0-a": often, "1-b": often}) == (False, 1, 1, 1)
    often = Member([*often.points, Point(12, 24.0, 2.0)])
    assert decided(B, {**own, "0-a": often, "1-b": often}) == (True, 2, 2, 1)


def test_nobody_waits_for_a_seed_that_has_failed_or_was_dropped() -> None:
    best = {"0-a": member(1.0), "1-b": member(1.0), "2-a": member(2.0)}
    assert decided(B, {**best, "3-b": member(ended=True)}) == (True, 2, 2, 1)
    assert decided(B, best | {"3-b": member()}) is None
    assert decided(B, best) == (True, 2, 2, 1)  # dropped: it is not among the jobs


def test_rungs_come_after_what_settings_share_and_before_the_end() -> None:
    stop = StopConfig(rungs=["25%", "50%", "90st"], grace="5%")
    assert rungs(stop, 100, shared=0) == (25, 50, 90)
    assert rungs(stop, 100, shared=40) == (45, 50, 90)
    assert rungs(stop, 100, shared=60) == (65, 90)
    assert rungs(stop, 100, shared=96) == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rungs": [500]}, r"launch\.stop\.rungs\.0.*500 of what\? Write 500st"),
        ({"rungs": ["2ep"]}, r"launch\.stop\.rungs\.0.*'2ep' is no length that a sweep can count.*500st"),
        ({"rungs": ["120%"]}, r"launch\.stop\.rungs\.0.*120% is more than the run"),
        ({"keep": "3/2"}, r"launch\.stop\.keep.*3/2 has to be above 0 and below 1"),
        ({"keep": "half"}, r"launch\.stop\.keep.*'half' is no share"),
        ({"group": "seed"}, r"launch\.stop\.group"),
        ({"rung": ["25%"]}, r"launch\.stop\.rung.*rungs"),
    ],
)
def test_a_wrong_key_or_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(StopConfig, values, key="launch.stop")


def test_of_programs_steps_and_a_metric_that_they_report_are_asked_for() -> None:
    program = HydraMain(Program(script="a.py"))
    with pytest.raises(ConfigError) as caught:
        program.check({"hydra": {"launcher": {"stop": {"rungs": ["25%"]}}}})
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        "hydra.launcher.stop.rungs",
        "hydra.launcher.stop.metric",
    ]
    stop = program.check({"hydra": {"launcher": {"stop": {"rungs": ["30st", "5st"], "metric": "loss"}}}}).stop
    assert stop is not None
    assert (stop.metric, rungs(stop, 0, shared=0)) == ("loss", (5, 30))


def test_a_share_is_of_a_jobs_own_updates() -> None:
    assert [updates_of(text, 64) for text in ("25%", "12.5%", "1%", "500st")] == [16, 8, 1, 500]


def record(sweep: Path, job: str, *values: float, state: str = "running") -> list[dict[str, float]]:
    """Write what a job records that validates after each 10 updates; return the rows."""
    rows = [{"step": 10 * n - 1, "tokens": 20 * n, "val/loss": value} for n, value in enumerate(values, start=1)]
    (sweep / job).mkdir(exist_ok=True)
    (sweep / job / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (sweep / job / "state.json").write_text(json.dumps({"state": state}))
    return rows


def sweep_of(folder: Path, *settings: Setting) -> Path:
    content = {"metric": "val/loss", "direction": "minimize", "axis": "tokens", "keep": "1/2"}
    parts = [{"name": s.name, "jobs": s.jobs, "rungs": s.rungs, "shared": s.shared} for s in settings]
    (folder / RULE).write_text(json.dumps(content | {"settings": parts}))
    return folder


def halving(sweep: Path, job: str) -> Halving:
    found = Halving.of(sweep / job)
    assert found is not None
    return found


def feed(judge: Halving, rows: Sequence[dict[str, float]]) -> list[bool]:
    return [judge(row) for row in rows]


def test_all_seeds_of_a_loser_end_by_the_decision_of_the_last(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, A, B)
    record(sweep, "0-a", 1.0, 0.9)
    record(sweep, "1-b", 1.0, 0.9)
    first, last = halving(sweep, "2-a"), halving(sweep, "3-b")
    assert feed(first, record(sweep, "2-a", 2.0)) == [False]  # the other seed is not there
    assert not list(sweep.glob(f"{DECISIONS}/*"))
    assert feed(last, record(sweep, "3-b", 3.0)) == [True]
    assert str(last.stopped) == "its setting's val/loss 2.5000 at update 10 is number 2 of 2, of which 1 goes on"
    assert first({"step": 11, "tokens": 24, "train/loss": 9.0})  # its next row, of whatever
    assert first.stopped == last.stopped


def test_a_decision_stands_even_where_others_have_come_since(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, A, B)
    assert feed(halving(sweep, "0-a"), record(sweep, "0-a", 2.0)) == [False]
    assert feed(halving(sweep, "1-b"), record(sweep, "1-b", 2.0)) == [False]  # the first setting goes on
    for job in B.jobs:
        assert feed(halving(sweep, job), record(sweep, job, 1.0)) == [False]
    assert feed(halving(sweep, "0-a"), record(sweep, "0-a", 2.0)) == [False]  # it is started again
    assert feed(halving(sweep, "1-b"), record(sweep, "1-b", 2.0, 2.0)) == [False, False]
    assert len(list(sweep.glob(f"{DECISIONS}/*"))) == 2


def test_a_loser_that_is_resumed_goes_on_to_the_next_rung(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, A, B)
    for job, values in zip((*A.jobs, *B.jobs), ([1.0, 0.9], [1.0, 0.9], [2.0], [2.0]), strict=True):
        rows = record(sweep, job, *values)
    assert feed(halving(sweep, "3-b"), rows) == [True]
    assert feed(halving(sweep, "3-b"), rows) == [True]  # a cluster starts it again
    overrule(sweep, "2-a")
    assert feed(halving(sweep, "3-b"), rows) == [False]
    record(sweep, "2-a", 2.0, 1.9)
    again = halving(sweep, "3-b")
    assert feed(again, record(sweep, "3-b", 2.0, 1.9)) == [False, True]
    assert again.stopped is not None
    assert again.stopped.rung == 20


def test_a_damaged_rule_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sweep = sweep_of(tmp_path, Setting("a", ("../x",), (10,)))
    assert Halving.of(sweep / "0-a") is None
    assert "a job's folder is named by its number and its identity" in caplog.text
    (sweep / RULE).unlink()
    assert Halving.of(sweep / "0-a") is None


def test_a_decision_of_what_is_no_number_can_be_read(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, A, B)
    for job, value in zip((*A.jobs, *B.jobs), (1.0, 1.0, 2.0, float("nan")), strict=True):
        rows = record(sweep, job, value)
    assert feed(halving(sweep, "3-b"), rows) == [True]
    assert feed(halving(sweep, "2-a"), rows) == [True]


def test_a_replay_counts_what_would_have_been_trained() -> None:
    one, other = Setting("a", ("0-a",), (10,)), Setting("b", ("1-b",), (10,))
    crossing = {"0-a": member(2.0, 1.0).points, "1-b": member(1.0, 2.0).points}  # the winner begins badly
    steps = {"0-a": 20, "1-b": 20}
    found = {
        (order, at_once): run(rule(one, other), crossing, steps, order, at_once)
        for order in (("0-a", "1-b"), ("1-b", "0-a"))
        for at_once in (1, 2)
    }
    # who comes first goes on; a comes second and is stopped after 10 of 20 updates
    assert found == {
        (("0-a", "1-b"), 1): (40, set()),
        (("0-a", "1-b"), 2): (40, set()),
        (("1-b", "0-a"), 1): (30, {"a"}),
        (("1-b", "0-a"), 2): (30, {"a"}),
    }


def test_a_replay_ends_all_seeds_and_starts_what_waits() -> None:
    a, b, c = (Setting(name, jobs, (10,)) for name, jobs in (("a", A.jobs), ("b", B.jobs), ("c", C.jobs)))
    records = {job: member(value, value).points for s, value in ((a, 1.0), (b, 2.0), (c, 3.0)) for job in s.jobs}
    steps = dict.fromkeys(records, 20)
    # a: 40 updates; seeds of b end together after 10, of c as well: 3 of 3, of which 2 go on
    assert run(rule(a, b, c), records, steps, list(records), 2) == (80, {"b", "c"})


def test_decisions_are_words() -> None:
    found = Decision(True, "a", 10, "val/loss", 20.0, 2.0, 3, 4, 2)
    assert str(found) == "its setting's val/loss 2.0000 at update 10 is number 3 of 4, of which 2 go on"
