from __future__ import annotations

from fractions import Fraction

import pytest

from apt_model.errors import ConfigError
from apt_model.schedule import Anneal, Clock, Curriculum, Horizon, Program, Time

HORIZON = Horizon.plan(epochs=4, batches_per_epoch=5, accumulate=2, batch_size=3, tokens_per_sample=10)
# updates of an epoch take 6, 6 and 3 samples: 3 updates, 15 samples, 150 tokens an epoch


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("2ep", 2, "epoch"),
        ("1.5 epochs", Fraction(3, 2), "epoch"),
        ("500st", 500, "step"),
        ("2ksteps", 2000, "step"),
        ("32ksa", 32000, "sample"),
        ("10Mtok", 10**7, "token"),
        ("0.5Gtok", 5 * 10**8, "token"),
        ("10%", Fraction(1, 10), "run"),
        ("0.25%", Fraction(1, 400), "run"),
        (7, 7, "step"),
    ],
)
def test_a_time_is_a_number_and_a_unit(text: str | int, amount: Fraction, unit: str) -> None:
    time = Time.parse(text, by="step")
    assert (time.amount, time.unit, time.anchor) == (amount, unit, None)


def test_a_time_after_an_event_names_it() -> None:
    time = Time.parse("moe.enabled + 500st", by="step")
    assert (time.amount, time.unit, time.anchor) == (500, "step", "moe.enabled")
    assert Time.parse("blocks.*.ffn.frozen", by="step").anchor == "blocks.*.ffn.frozen"
    assert str(time) == "moe.enabled + 500st"


@pytest.mark.parametrize(
    "text",
    ["2", "ep", "2 parsecs", "-3st", "10Mep%", "1e3st", "101%", "", None, 1.5, True, -1, "a.enabled + b.enabled"],
)
def test_what_is_no_time_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"is not|negative|more than|names two"):
        Time.parse(text, by="step")


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("0ep", 0),
        ("2ep", 6),
        ("1.5ep", 5),
        ("7st", 7),
        ("25%", 3),
        ("30%", 4),
        ("12sa", 2),
        ("13sa", 3),
        ("16sa", 4),
        ("150tok", 3),
        ("151tok", 4),
    ],
)
def test_the_first_update_at_a_time_is_the_one_counted_by_hand(text: str, step: int) -> None:
    time = Time.parse(text, by="step")
    assert time.step(HORIZON, {}) == step
    reached = [s for s in range(HORIZON.steps) if time.reached(HORIZON.clock_at(s), HORIZON, {})]
    assert reached[0] == step


def test_a_time_after_an_event_counts_from_it() -> None:
    fired = {"moe.enabled": HORIZON.clock_at(4)}
    for text, step in (
        ("moe.enabled", 4),
        ("moe.enabled + 3st", 7),
        ("moe.enabled + 1ep", 7),
        ("moe.enabled + 50%", 10),
    ):
        time = Time.parse(text, by="step")
        assert time.step(HORIZON, fired) == step
        assert [s for s in range(12) if time.reached(HORIZON.clock_at(s), HORIZON, fired)][0] == step  # noqa: RUF015
        assert time.step(HORIZON, {}) is None
        assert not time.reached(Clock(step=99), HORIZON, {})


def test_units_that_cannot_be_ordered_are_refused() -> None:
    bare = Horizon(epochs=4, updates_per_epoch=3)
    with pytest.raises(ConfigError, match=r"a time in tokens cannot be ordered here"):
        Program(Curriculum.read({"events": {"a": {"enable": "moe", "at": "100tok"}}}), bare)
    with pytest.raises(ConfigError, match=r"schedule\.route_temp: a time in samples cannot be ordered"):
        Program(Curriculum.read({"route_temp": {"start": 1.0, "end": 2.0, "by": "sample"}}), bare)
    with pytest.raises(ConfigError, match=r"warmup = 2st is no whole number of epochs"):
        Program(Curriculum.read({"align_weight": {"start": 1.0, "end": 2.0, "warmup": "2st"}}), bare)


def test_units_are_mixed_where_they_can_be_ordered() -> None:
    spec = Anneal.model_validate({"start": 1.0, "end": 0.0, "by": "step", "warmup": "1ep", "until": "300tok"})
    curve = spec.curve(HORIZON)  # 300 tokens are two epochs: updates 0 to 5
    assert [curve(k) for k in range(8)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1 / 2, 0, 0, 0])
