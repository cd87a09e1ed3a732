from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_model.errors import ConfigError
from apt_model.schedule import Anneal, Horizon
from apt_model.schedule.anneal import Segment, ShapeName
from apt_model.schedule.curves import SHAPES

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


def values(length: int, **spec) -> list[float]:
    """The values over a run of ``length`` updates, one an epoch."""
    curve = Anneal.model_validate({"by": "step"} | spec).curve(Horizon(epochs=length, updates_per_epoch=1))
    return [curve(k) for k in range(length)]


def test_a_linear_anneal_over_five_indices_has_the_values_worked_out_by_hand() -> None:
    assert values(5, start=1.5, end=0.8) == pytest.approx([1.5, 1.325, 1.15, 0.975, 0.8])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"type": "cosine", "start": 0.0, "end": 1.0}, [0.0, 0.5 - 2**0.5 / 4, 0.5, 0.5 + 2**0.5 / 4, 1.0]),
        ({"type": "exponential", "start": 1.0, "end": 16.0}, [1.0, 2.0, 4.0, 8.0, 16.0]),
        ({"type": "sqrt", "start": 0.0, "end": 2.0}, [0.0, 1.0, 2 * 0.5**0.5, 3**0.5, 2.0]),
        ({"type": "inverse_sqrt", "start": 1.0, "end": 0.5}, [1.0, 1.75**-0.5, 2.5**-0.5, 3.25**-0.5, 0.5]),
        ({"type": "inverse_sqrt", "start": 2.0, "warmup": 1}, [0.0, 2.0, 2 * 2**-0.5, 2 * 3**-0.5, 1.0]),
        ({"type": "inverse_sqrt", "start": 2.0, "warmup": 1, "cooldown": 2}, [0.0, 2.0, 2**0.5, 2**-0.5, 0.0]),
        ({"type": "polynomial", "power": 2, "start": 1.0, "end": 0.0}, [1.0, 0.5625, 0.25, 0.0625, 0.0]),
        ({"type": "step", "steps": 1, "start": 1.0, "end": 0.0}, [1.0, 1.0, 0.0, 0.0, 0.0]),
        ({"type": "step", "steps": 3, "start": 3.0, "end": 0.0}, [3.0, 2.0, 1.0, 0.0, 0.0]),
        ({"type": "one_cycle", "peak": 1.0, "peak_at": 2, "start": 0.5, "end": 0.0}, [0.5, 0.75, 1.0, 0.5, 0.0]),
        ({"warmup": 2, "start": 1.0, "end": 3.0}, [0.0, 0.5, 1.0, 2.0, 3.0]),
        ({"cooldown": 2, "start": 1.0, "end": 2.0}, [1.0, 1.5, 2.0, 1.0, 0.0]),
        ({"from": 1, "until": 4, "start": 1.0, "end": 2.0}, [1.0, 1.0, 1.5, 2.0, 2.0]),
        ({"from": 2, "over": 2, "start": 1.0, "end": 2.0}, [1.0, 1.0, 1.0, 2.0, 2.0]),
        ({"points": {"0st": 1.0, "2st": 3.0, "100%": 0.0}}, [1.0, 2.0, 3.0, 1.5, 0.0]),
        ({"points": {1: 1.0, 3: 3.0}}, [1.0, 1.0, 2.0, 3.0, 3.0]),
    ],
)
def test_every_shape_has_the_values_worked_out_by_hand(spec: dict, expected: list[float]) -> None:
    assert values(5, **spec) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {"segments": [{"ramp": 2.0, "over": 2}, {"hold": 2}, {"jump": 5.0}, {"ramp": 1.0}]},
            [0, 1, 2, 2, 5, 11 / 3, 7 / 3, 1],
        ),
        ({"segments": [{"ramp": 4.0}], "repeat": 2}, [0, 1, 2, 3, 0, 4 / 3, 8 / 3, 4]),
        ({"segments": [{"hold": "50%"}, {"ramp": 4.0}], "start": 1.0}, [1, 1, 1, 1, 1, 2, 3, 4]),
        ({"segments": [{"ramp": 3.0, "over": 3}]}, [0, 1, 2, 3, 3, 3, 3, 3]),
    ],
)
def test_segments_are_joined_and_repeated(spec: dict, expected: list[float]) -> None:
    assert values(8, **({"start": 0.0} | spec)) == pytest.approx(expected)


def test_an_inverse_sqrt_without_an_end_has_the_same_bits_however_long_the_run_is() -> None:
    short, long = (values(length, type="inverse_sqrt", start=0.7, warmup=3, by="step") for length in (20, 77))
    assert short == long[:20]
    with pytest.raises(ConfigError, match=r"^x\.end: missing\. .* Or give x\.warmup: it goes as start x sqrt"):
        raise ConfigError(*Anneal.model_validate({"type": "inverse_sqrt", "start": 0.7}).contradictions("x"))


def test_a_range_of_one_point_has_the_end_value() -> None:
    assert values(1, start=1.5, end=0.8) == [0.8]
    assert values(4, start=1.5, end=0.8, warmup=3, type="cosine")[-1] == 0.8


@pytest.mark.parametrize("by", ["sample", "token"])
def test_by_samples_or_tokens_both_ends_are_met_by_real_updates(by: str) -> None:
    horizon = Horizon.plan(epochs=2, batches_per_epoch=5, accumulate=2, batch_size=4, tokens_per_sample=8)
    assert horizon.steps == 6  # the third update of an epoch takes one batch: 4 samples
    clocks = [horizon.clock_at(step) for step in range(6)]
    assert [clock.sample for clock in clocks] == [0, 8, 16, 20, 28, 36]
    curve = Anneal(start=0.0, end=36.0, by=by).curve(horizon)
    assert [curve(getattr(clock, by)) for clock in clocks] == pytest.approx([0, 8, 16, 20, 28, 36])


SIMPLE = ["linear", "cosine", "sqrt"]


@given(start=finite, end=finite, length=st.integers(2, 1000), shape=st.sampled_from(SIMPLE), data=st.data())
def test_both_ends_are_reached_exactly_and_held_after_the_run(start, end, length, shape, data) -> None:
    warmup = data.draw(st.integers(0, length - 2))
    curve = Anneal(start=start, end=end, by="step", type=shape, warmup=warmup).curve(
        Horizon(epochs=1, updates_per_epoch=length)
    )
    assert curve(warmup) == start
    assert curve(length - 1) == curve(length) == curve(length + 1) == end
    low, high = min(start, end, 0.0), max(start, end, 0.0)
    slack = 1e-6 * max(abs(low), abs(high), 1e-30)
    assert all(low - slack <= curve(k) <= high + slack for k in range(length))


@given(start=st.floats(0.01, 100), end=st.floats(0.01, 100), shape=st.sampled_from(["exponential", "inverse_sqrt"]))
def test_shapes_by_factors_meet_their_ends_and_stay_between_them(start: float, end: float, shape: str) -> None:
    curve = Anneal(start=start, end=end, by="step", type=shape).curve(Horizon(epochs=1, updates_per_epoch=50))
    drawn = [curve(k) for k in range(50)]
    assert (drawn[0], drawn[-1]) == (start, end)
    assert drawn == sorted(drawn, reverse=start > end) or math.isclose(start, end, rel_tol=1e-9)


def test_every_shape_can_be_named_in_yaml() -> None:
    of_segments = set(get_args(Segment.model_fields["type"].annotation))
    assert of_segments == set(SHAPES)
    assert set(get_args(ShapeName)) == of_segments | {"polynomial", "step", "one_cycle"}
