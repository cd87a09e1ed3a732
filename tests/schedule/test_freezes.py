from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.errors import ConfigError
from apt_model.schedule import Curriculum, Horizon, Program, ScheduleRunner
from apt_model.schedule.targets import common, covers, matching
from apt_model.schedule.timeline import timeline

HORIZON = Horizon(epochs=6, updates_per_epoch=4)
PARAMETERS = ("embedding", *(f"blocks.{layer}.{part}" for layer in (0, 1) for part in ("attention", "ffn")))


class Model:
    """Parameters by name, and which of them are frozen; enabling the mixture of experts puts new ones in place of old."""

    def __init__(self) -> None:
        self.frozen = dict.fromkeys(PARAMETERS, False)

    def freeze(self, pattern: str, on: bool) -> None:
        for name in PARAMETERS:
            path = name.split(".")
            if matching(pattern, [".".join(path[: end + 1]) for end in range(len(path))]):
                self.frozen[name] = on

    def enable(self, on: bool) -> None:
        self.frozen |= {name: False for name in PARAMETERS if name.endswith("ffn")}


def bound(**curriculum) -> tuple[ScheduleRunner, Model]:
    model = Model()
    runner = ScheduleRunner(horizon=HORIZON, **curriculum)
    switches = {name: model.enable if name == "moe" else lambda on: None for name in ("moe", "align", "voter")}
    runner.bind(values={}, switches=switches, freeze=model.freeze)
    return runner, model


def frozen_by_update(runner: ScheduleRunner, model: Model, begin: int = 0) -> list[tuple[list[str], dict[str, float]]]:
    """What is frozen at each update, and what rows say."""
    found = []
    for step in range(begin, HORIZON.steps):
        runner.apply(HORIZON.clock_at(step))
        found.append(([name for name, on in model.frozen.items() if on], runner.metrics()))
    return found


def updates_frozen(parameter: str, **curriculum) -> list[int]:
    return [step for step, (frozen, _) in enumerate(frozen_by_update(*bound(**curriculum))) if parameter in frozen]


WHOLE_AND_PART = {
    "a": {"freeze": "blocks", "at": "1ep"},
    "b": {"freeze": "blocks.1", "at": "1ep"},
    "c": {"unfreeze": "blocks.1", "at": "2ep"},
}


def test_a_part_of_a_frozen_whole_trains_again_from_its_own_time_on_and_the_rest_stays() -> None:
    assert updates_frozen("blocks.1.ffn", events=WHOLE_AND_PART) == [4, 5, 6, 7]
    assert updates_frozen("blocks.0.ffn", events=WHOLE_AND_PART) == [*range(4, 24)]
    assert updates_frozen("embedding", events=WHOLE_AND_PART) == []
    rows = [row for _, row in frozen_by_update(*bound(events=WHOLE_AND_PART))]
    assert [step for step, row in enumerate(rows) if row["schedule/blocks.1_frozen"]] == [4, 5, 6, 7]
    assert [step for step, row in enumerate(rows) if row["schedule/blocks_frozen"]] == [*range(4, 24)]


def test_a_part_needs_no_freeze_of_its_own_to_train_again_and_the_preview_is_right() -> None:
    events = {"a": {"freeze": "blocks", "at": "1ep"}, "b": {"unfreeze": "blocks.1", "at": "3ep"}}
    assert updates_frozen("blocks.1.attention", events=events) == [*range(4, 12)]
    assert updates_frozen("blocks.0.attention", events=events) == [*range(4, 24)]
    program = Program(Curriculum.read({"events": events}), HORIZON)
    told = {moment.clock.step: moment.what for moment in timeline(program)}
    assert told[4] == ("blocks frozen",)
    assert told[12] == ("blocks.1 trained again",)
    assert program.notes() == []


def test_a_whole_that_trains_again_takes_its_frozen_parts_with_it() -> None:
    events = {
        "a": {"freeze": "blocks.*.attention", "at": "1ep"},
        "b": {"freeze": "blocks.0.attention", "at": "2ep"},
        "c": {"unfreeze": "blocks.*.attention", "at": "3ep"},
    }
    assert updates_frozen("blocks.0.attention", events=events) == [*range(4, 12)]
    rows = [row for _, row in frozen_by_update(*bound(events=events))]
    assert [step for step, row in enumerate(rows) if row["schedule/blocks.0.attention_frozen"]] == [*range(4, 12)]


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_at_one_update_the_part_decides_wherever_it_stands(names: str) -> None:
    whole, part = names
    events = {whole: {"freeze": "blocks", "at": "1ep"}, part: {"unfreeze": "blocks.1", "at": "4st"}}
    events = dict(sorted(events.items()))
    assert updates_frozen("blocks.1.ffn", events=events) == []
    assert updates_frozen("blocks.0.ffn", events=events) == [*range(4, 24)]


@pytest.mark.parametrize("module", ["moe", "align", "voter"])
def test_enabling_a_module_freezes_nothing_that_trains_and_trains_nothing_that_is_frozen(module: str) -> None:
    curriculum = {f"enable_{module}_at_step": 10, "events": WHOLE_AND_PART}
    assert updates_frozen("blocks.1.ffn", **curriculum) == [4, 5, 6, 7]
    assert updates_frozen("blocks.0.ffn", **curriculum) == [*range(4, 24)]


def test_a_part_may_wait_for_what_a_latch_decides() -> None:
    events = {
        "v": {"enable": "voter", "when": {"metric": "loss", "below": 1.0}},
        "a": {"freeze": "blocks", "at": "1ep"},
        "b": {"unfreeze": "blocks.1", "at": "voter.enabled + 2st"},
        "c": {"freeze": "blocks", "at": "voter.enabled + 4st"},
    }
    runner, model = bound(events=events)
    found = []
    for step in range(HORIZON.steps):
        runner.apply(HORIZON.clock_at(step))
        found.append(model.frozen["blocks.1.ffn"])
        assert runner.metrics()["schedule/blocks.1_frozen"] == model.frozen["blocks.1.ffn"]
        runner.observe({"loss": 0.5 if step == 9 else 2.0})  # the voter is enabled at 10
    assert [step for step, on in enumerate(found) if on] == [*range(4, 12), *range(14, 24)]


PATTERNS = ("*", "blocks", "blocks.*", "blocks.*.attention", "blocks.0.attention", "blocks.1.ffn", "embedding")
"""Of each two of them that meet, the later one is a part of the other."""

events_of = st.lists(
    st.tuples(st.sampled_from(PATTERNS), st.booleans(), st.integers(1, 23)),
    max_size=6,
    unique_by=lambda e: (e[0], e[2]),
)


@settings(deadline=None)
@given(drawn=events_of, stop=st.integers(1, 23), moe=st.integers(0, 23))
def test_what_is_frozen_follows_from_the_clock_alone_so_that_a_resume_is_exact(drawn, stop: int, moe: int) -> None:
    drawn = [("*", True, 0), *drawn]
    events = {
        f"e{number}": {"freeze" if on else "unfreeze": pattern, "at": f"{step}st"}
        for number, (pattern, on, step) in enumerate(drawn)
    }
    curriculum = {"enable_moe_at_step": moe, "events": events}
    runner, model = bound(**curriculum)
    whole = frozen_by_update(runner, model)
    for step, (frozen, rows) in enumerate(whole):
        for name in PARAMETERS:
            happened = [
                (at, PATTERNS.index(pattern), on) for pattern, on, at in drawn if at <= step and covers(pattern, name)
            ]
            assert (name in frozen) == max(happened)[2]
            if f"schedule/{name}_frozen" in rows:
                assert rows[f"schedule/{name}_frozen"] == (name in frozen)

    first, _ = bound(**curriculum)
    for step in range(stop):
        first.apply(HORIZON.clock_at(step))
    second, resumed = bound(**curriculum)
    second.load_state_dict(first.state_dict())
    second.reconcile()
    assert [name for name, on in resumed.frozen.items() if on] == whole[stop - 1][0]
    assert frozen_by_update(second, resumed, begin=stop) == whole[stop:]


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("blocks", "blocks.1", "blocks.1"),
        ("blocks.*", "blocks.0.attention", "blocks.0.attention"),
        ("blocks.*.attention", "blocks.0", "blocks.0.attention"),
        ("blocks.*.att*", "blocks.*.*ion", "blocks.*.att*ion"),
        ("blocks.*.attention", "blocks.*.ffn", None),
        ("blocks.1", "blocks.10", None),
        ("a*", "b*", None),
        ("*a", "*b", None),
    ],
)
def test_what_two_patterns_have_in_common(one: str, other: str, shared: str | None) -> None:
    assert common(one, other) == common(other, one) == shared
    assert covers(one, other) == (shared == other)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (
            {"a": {"freeze": "blocks.*.attention", "at": "1ep"}, "b": {"freeze": "blocks.0", "at": "2ep"}},
            r"schedule\.events\.b: blocks\.0 and blocks\.\*\.attention \(schedule\.events\.a\) have blocks\.0\.attention in "
            r"common, and neither is a part of the other\. In place of one of them name its parts without blocks\.0\.att",
        ),
        (
            {"a": {"freeze": "blocks", "when": {"metric": "x", "above": 1}}, "b": {"freeze": "blocks.1", "at": "2ep"}},
            r"schedule\.events\.b: .* \(schedule\.events\.a\) .* a latch shares parameters with nothing\. Remove one",
        ),
        (
            {"a": {"unfreeze": "blocks.1", "at": "3ep"}},
            r"schedule\.events\.a: nothing freezes blocks\.1 before step 12, so it cannot train again\. Freeze it earlier, "
            r"such as with \{freeze: blocks\.1, at: 0st\}, or remove this",
        ),
        (
            {"a": {"unfreeze": "blocks.1", "at": "1ep"}, "b": {"freeze": "blocks", "at": "2ep"}},
            r"schedule\.events\.a: nothing freezes blocks\.1 before step 4",
        ),
        (
            {
                "a": {"unfreeze": "blocks.1", "at": "voter.enabled"},
                "v": {"enable": "voter", "when": {"metric": "x", "above": 1}},
            },
            r"schedule\.events\.a: nothing freezes blocks\.1, so it cannot train again",
        ),
    ],
)
def test_freezes_that_have_no_clear_meaning_are_refused_with_both_keys(events: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Program(Curriculum.read({"events": events}), HORIZON)
