from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt_launch.record import TAIL, RecordReader, last_row, read_rows


def test_a_damaged_line_hides_no_other_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0}', '{"step": 1, "tr', "", "[2]", '{"step": "3"}', '{"train/loss": 1}', '{"step": 6}', '{"ste']
    path.write_bytes("\n".join(lines).encode())
    assert [row["step"] for row in read_rows(path)] == [0, 6]
    assert "line 2 (and 4 more) is damaged" in caplog.text
    reader = RecordReader(path)
    assert [row["step"] for row in reader.rows()] == [0, 6]
    assert reader.damaged == [2, 3, 4, 5, 6]
    assert last_row(path) == {"step": 6}


def test_a_record_that_is_not_there_has_no_last_row_and_cannot_be_read(tmp_path: Path) -> None:
    assert last_row(tmp_path / "metrics.jsonl") == {}
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "metrics.jsonl")


def test_the_last_row_has_the_newest_values_also_where_rows_are_longer_than_what_is_read_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long = {"step": 1, "val/loss": 2.5, **{f"moe/layer_{layer:05}": 0.5 for layer in range(TAIL // 20)}}
    rows = [{"step": 0, "train/loss": 3.5}, long]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert path.stat().st_size > TAIL
    found = last_row(path)
    assert (found["step"], found["val/loss"]) == (1, 2.5)
    path.write_text('{"step": 0, "train/loss": 3.5}\n{"step": 1, "val/loss": 2.5}\n{"step": 2, "trai')
    assert last_row(path) == {"step": 1, "train/loss": 3.5, "val/loss": 2.5}
