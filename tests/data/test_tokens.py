from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_model.data import Sampler
from apt_model.data.batches import Batches
from apt_model.data.tokens import Tokens


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_windows_are_those_of_one_array_wherever_its_parts_end(lengths: list[int], data: st.DataObject) -> None:
    whole = np.random.default_rng(0).integers(0, 60000, sum(lengths), dtype=np.uint16)
    tokens = Tokens(np.split(whole, np.cumsum(lengths)[:-1]))
    assert len(tokens) == len(whole)
    assert (tokens.array() == whole).all()
    length = data.draw(st.integers(1, len(whole)))
    begins = data.draw(st.lists(st.integers(0, len(whole) - length), max_size=5))
    windows = tokens.windows(np.array(begins, dtype=np.int64), length)
    assert windows.dtype == np.int64
    assert windows.tolist() == [whole[begin : begin + length].tolist() for begin in begins]


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
def test_batches_are_the_same_from_memory_and_from_mapped_files(tmp_path: Path, dtype: str) -> None:
    whole = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 101, dtype=dtype, endpoint=True)
    parts, maps = [], []
    for number, part in enumerate(np.split(whole, [7, 60])):
        path = tmp_path / f"{number}.bin"
        part.tofile(path)
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        parts.append(np.frombuffer(maps[-1], dtype=dtype))
    sampler = Sampler(num_tokens=101, seq_len=10, batch_size=3, seed=5)
    mapped, held = (list(Batches(tokens, sampler).epoch(1)) for tokens in (Tokens(parts, maps), Tokens([whole])))
    assert len(mapped) == len(held) == 3
    for (x, y), (held_x, held_y) in zip(mapped, held, strict=True):
        assert x.max() <= np.iinfo(dtype).max
        assert (x == held_x).all()
        assert (y == held_y).all()
