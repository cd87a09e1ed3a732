"""Disks that are full, folders that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt_launch.record import read_rows
from tests.conftest import SMALL
from tests.forks import HANGS, environment, run_module


def command(text_file: Path, *more: str) -> list[str]:
    return ["apt_launch", *SMALL, "data=text", f"data.path={text_file}", "hydra.run.dir=run", *more]


def test_training_continues_while_no_checkpoint_can_be_written(text_file: Path, tmp_path: Path) -> None:
    """No file may grow beyond 100 kB, which every checkpoint would: a full disk that needs no privilege."""
    larger = command(text_file, "schedule=none", "model.d_model=64", "model.d_ff=256")
    ended = run_module(*larger, cwd=tmp_path, largest_file=100_000)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.count("Training goes on without it. There is none yet.") == 5
    assert "error: the checkpoint of step 24 could not be written" in ended.stderr
    assert "Traceback" not in ended.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len([row for row in rows if "val/loss" in row]) == 6
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["state"] == "failed"
    assert "could not be written" in summary["cause"]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_disk_that_takes_nothing_at_all_is_named(text_file: Path, tmp_path: Path) -> None:
    ended = run_module(*command(text_file, "schedule=none"), cwd=tmp_path, largest_file=10)
    assert ended.returncode == 1, ended.stderr
    assert "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("place", ["run", "outputs/somewhere/deep"])
def test_a_folder_that_may_not_be_written_is_refused(text_file: Path, tmp_path: Path, place: str) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    as_anybody = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    ended = subprocess.run(
        [*as_anybody, sys.executable, "-m", *command(text_file, f"hydra.run.dir=closed/{place}")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "hydra.run.dir" in ended.stderr
    assert "may not be written to" in ended.stderr
    assert list(closed.iterdir()) == []
