from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt_launch import record
from apt_launch.record import TAIL, Record, RecordReader, read_rows, read_tail
from apt_model.errors import ConfigError


def test_a_damaged_line_hides_no_other_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0}', '{"step": 1, "tr', "", "[2]", '{"step": "3"}', '{"train/loss": 1}', '{"step": 6}', '{"ste']
    path.write_bytes("\n".join(lines).encode())
    assert [row["step"] for row in read_rows(path)] == [0, 6]
    assert "line 2 (and 4 more) is damaged" in caplog.text
    reader = RecordReader(path)
    assert [row["step"] for row in reader.rows()] == [0, 6]
    assert reader.damaged == [2, 3, 4, 5, 6]
    assert read_tail(path) == ({"step": 6}, 7, 5)


def test_a_record_names_its_version_once_and_a_later_one_is_refused_also_where_its_end_alone_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    written = Record(path)
    for step in (0, 1):
        written.log({"step": step, "loss": 0.5})
    written.close()
    whole = '{"$version": 1, "step": 0, "loss": 0.5}\n{"step": 1, "loss": 0.5}\n'
    assert path.read_text() == whole
    assert read_rows(path) == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.5}]
    assert read_tail(path).row == {"step": 1, "loss": 0.5}
    for keep in (1, 0):  # a resume has the same bytes, whatever it keeps
        resumed = Record(path, keep_rows=keep)
        for step in range(keep, 2):
            resumed.log({"step": step, "loss": 0.5})
        resumed.close()
        assert path.read_text() == whole
    path.write_text(whole.replace(": 1,", ": 2,", 1) + '{"step": 2}\n' * 9)
    monkeypatch.setattr(record, "TAIL", 60)
    newer = r"metrics\.jsonl: its format is of version 2, and this program reads version 1"
    for read in (read_rows, read_tail, lambda path: Record(path, keep_rows=1)):
        with pytest.raises(ConfigError, match=newer):
            read(path)
    reader = RecordReader(path)
    for _ in range(2):
        assert list(reader.rows()) == []
        assert "version 2" in str(reader.problem)


def test_a_record_that_is_not_there_has_no_last_row_and_cannot_be_read(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "metrics.jsonl") == ({}, 0, 0)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "metrics.jsonl")


def test_the_last_row_has_the_newest_values_also_where_rows_are_longer_than_what_is_read_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long = {"step": 1, "val/loss": 2.5, **{f"moe/layer_{layer:05}": 0.5 for layer in range(TAIL // 20)}}
    rows = [{"step": 0, "train/loss": 3.5}, long]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert path.stat().st_size > TAIL
    found = read_tail(path).row
    assert (found["step"], found["val/loss"]) == (1, 2.5)
    path.write_text('{"step": 0, "train/loss": 3.5}\n{"step": 1, "val/loss": 2.5}\n{"step": 2, "trai')
    assert read_tail(path).row == {"step": 1, "train/loss": 3.5, "val/loss": 2.5}


def test_a_line_without_an_end_is_damage_and_is_not_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "LONGEST_LINE", 100)
    monkeypatch.setattr(record, "CHUNK", 64)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + b"x" * 1000 + b'\n{"step": 1}\n{"step": 2}\n' + b"y" * 1000)
    reader = RecordReader(path)
    assert [row["step"] for row in reader.rows()] == [0, 1, 2]
    assert (reader.damaged, reader.lines) == ([2], 4)
    with path.open("ab") as file:
        file.write(b'\n{"step": 3}\n')
    assert [row["step"] for row in reader.rows()] == [3]
    assert (reader.damaged, reader.lines) == ([2, 5], 6)
    assert reader.restarts == 0
    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr(record, "TAIL", 50)
    assert read_tail(path) == ({}, 0, 0)
    Record(path, keep_rows=2).close()
    assert path.stat().st_size == 0
