from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from apt_launch.tracking import Record, Tracking, read_rows
from apt_launch.tracking.tensorboard import TensorBoardTracker
from tests.conftest import environment, wandb_records, wandb_rows


def test_the_record_has_a_line_a_row_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = Record(path)
    record.log({"step": 0, "train/loss": 1.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 0, "train/loss": 1.5}]
    record.close()


def test_a_resume_keeps_as_many_rows_as_the_checkpoint_knew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = Record(path)
    for step in range(5):
        record.log({"step": step})
    record.close()
    with path.open("a") as file:
        file.write('{"step": 5, "tor')
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3, 4]
    again = Record(path, keep_rows=3)
    again.log({"step": 3})
    again.close()
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, row: dict[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("gone")

    def close(self, state: str) -> None:
        raise ConnectionError("still gone")


class Listens:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.state = ""

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def close(self, state: str) -> None:
        self.state = state


def test_a_tracker_that_fails_is_left_out_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, listens = Broken(), Listens()
    tracking = Tracking(Record(tmp_path / "metrics.jsonl"), [broken, listens])
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracking.log({"step": step})
        tracking.close("done")
    assert broken.calls == 1
    assert [row["step"] for row in listens.rows] == [0, 1, 2]
    assert listens.state == "done"
    assert len(caplog.records) == 1
    assert "Broken failed at step 0" in caplog.text
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_tensorboard_has_every_value_at_its_step(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(mode="offline", folder=tmp_path)
    for step in (0, 10):
        tracker.log({"step": step, "train/loss": 2.0 - step / 10})
    tracker.close("done")
    program = (
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        f"events = EventAccumulator({str(tmp_path / 'tensorboard')!r}); events.Reload()\n"
        "print([(e.step, e.value) for e in events.Scalars('train/loss')])"
    )
    read = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert read.stdout.strip() == "[(0, 2.0), (10, 1.0)]"


def test_the_wandb_client_keeps_every_row_offline(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from apt_launch.tracking.wandb import WandbTracker\n"
        "tracker = WandbTracker(mode='online', project='p', entity=None, name=None, tags=['t'],\n"
        f"    folder=Path({str(tmp_path)!r}), run_id='abc', config={{'seed': 3}})\n"
        "for step in (0, 3, 9): tracker.log({'step': step, 'train/loss': step / 2})\n"
        "tracker.close('done')\n"
    )
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment() | home, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "no API key here, so this run is kept offline" in run.stderr
    records = wandb_records(next((tmp_path / "wandb").glob("offline-run-*-abc")))
    assert wandb_rows(records) == [{"step": step, "train/loss": step / 2, "trainer/step": step} for step in (0, 3, 9)]
    run_record = next(record["run"] for record in records if record["type"] == "run")
    assert (run_record["run_id"], run_record["project"], run_record["tags"]) == ("abc", "p", ["t"])
    assert run_record["config"]["update"]["seed"] == 3
