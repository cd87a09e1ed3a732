from __future__ import annotations

import numpy as np
import pytest

from apt_model.data import Sampler
from apt_model.data.batches import Batches
from apt_model.data.tokens import Tokens
from apt_model.errors import ConfigError


def sampler(**options) -> Sampler:
    return Sampler(**({"num_tokens": 101, "seq_len": 10, "batch_size": 3, "seed": 5} | options))


def test_an_epoch_has_each_window_at_most_once_and_leaves_out_what_fills_no_batch() -> None:
    begins = sampler().windows(0)
    assert begins.shape == (3, 3)  # ten windows
    assert len(set(begins.ravel())) == 9
    assert set(begins.ravel()) <= set(range(0, 100, 10))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert np.array_equal(sampler().windows(4), sampler().windows(4))
    assert not np.array_equal(sampler().windows(4), sampler().windows(5))
    assert not np.array_equal(sampler(seed=6).windows(4), sampler().windows(4))


def test_a_limit_shortens_the_epoch_and_not_the_choice() -> None:
    assert np.array_equal(sampler(limit=2).windows(1), sampler().windows(1)[:2])
    assert sampler(limit=99).num_batches == 3


def test_the_last_target_of_the_last_window_is_there() -> None:
    assert sampler(num_tokens=31).num_windows == 3
    assert sampler(num_tokens=40).num_windows == 3
    with pytest.raises(ConfigError, match=r"the train split has 30 tokens, less than one batch: .* = 31"):
        sampler(num_tokens=30)


def test_targets_are_the_tokens_that_follow_and_an_epoch_can_be_entered_anywhere() -> None:
    batches = Batches(Tokens([np.arange(101, dtype=np.uint8)]), sampler())
    whole = list(batches.epoch(2))
    assert len(whole) == len(batches) == 3
    for x, y in whole:
        assert x.shape == y.shape == (3, 10)
        assert (y == x + 1).all()
        assert (x[:, 0] % 10 == 0).all()
    late = list(batches.epoch(2, start=2))
    assert len(late) == 1
    assert (late[0][0] == whole[2][0]).all()
