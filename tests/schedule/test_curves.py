from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_model.schedule.curves import SHAPES, anneal

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


def test_a_linear_anneal_over_five_epochs_has_the_values_worked_out_by_hand() -> None:
    values = [anneal(k, length=5, warmup=0, start=1.5, end=0.8, shape="linear") for k in range(5)]
    assert values == pytest.approx([1.5, 1.325, 1.15, 0.975, 0.8])


def test_a_cosine_anneal_is_slow_at_both_ends() -> None:
    values = [anneal(k, length=5, warmup=0, start=0.0, end=1.0, shape="cosine") for k in range(5)]
    assert values == pytest.approx([0.0, 0.5 - 2**0.5 / 4, 0.5, 0.5 + 2**0.5 / 4, 1.0])


def test_warmup_ramps_from_zero_to_start_and_the_rest_goes_to_end() -> None:
    values = [anneal(k, length=9, warmup=4, start=0.8, end=0.4, shape="linear") for k in range(9)]
    assert values == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.7, 0.6, 0.5, 0.4])


def test_a_range_of_one_point_has_the_end_value() -> None:
    assert anneal(0, length=1, warmup=0, start=1.5, end=0.8, shape="linear") == 0.8
    assert anneal(3, length=4, warmup=3, start=1.5, end=0.8, shape="cosine") == 0.8


@given(start=finite, end=finite, length=st.integers(2, 1000), shape=st.sampled_from(sorted(SHAPES)), data=st.data())
def test_both_ends_are_reached_exactly_and_held_after_the_run(start, end, length, shape, data) -> None:
    warmup = data.draw(st.integers(0, length - 2))
    value = {k: anneal(k, length=length, warmup=warmup, start=start, end=end, shape=shape) for k in range(length + 2)}
    assert value[warmup] == start
    assert value[length - 1] == value[length] == value[length + 1] == end
    assert all(min(start, end, 0.0) - 1e-6 * abs(start) <= v for v in value.values())
