from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apt_launch.record import Record, read_rows
from apt_launch.tracking.csv import CsvTracker
from apt_launch.tracking.projection import Tracking
from apt_launch.tracking.tensorboard import TensorBoardTracker
from apt_launch.tracking.wandb import mode_of
from tests.conftest import wandb_records, wandb_rows
from tests.forks import HANGS, environment


def test_the_record_has_a_line_a_row_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = Record(path)
    record.log({"step": 0, "train/loss": 1.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"$version": 1, "step": 0, "train/loss": 1.5}
    ]
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


class Fragile:
    """A tracker that fails at the row of step 1."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, row: dict[str, float]) -> None:
        if row["step"] == 1:
            raise ConnectionError("gone")
        self.rows.append(row)

    def close(self, state: str) -> None:
        raise AssertionError("it was given up")


class Slow:
    """A service that takes nothing before it is told to."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.rows: list[dict[str, float]] = []
        self.state = ""

    def log(self, row: dict[str, float]) -> None:
        assert self.answers.wait(HANGS)
        self.rows.append(row)

    def close(self, state: str) -> None:
        self.state = state


def test_a_tracker_that_fails_is_left_out_and_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fragile = Fragile()
    tracking = Tracking(Record(tmp_path / "metrics.jsonl"))
    tracking.project(lambda: fragile, name="Fragile", remedy="Do this.")
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            tracking.log({"step": step})
        tracking.close("done")
    assert [row["step"] for row in fragile.rows] == [0]
    assert len(caplog.records) == 1
    assert "Fragile failed after step 0" in caplog.text
    assert "Do this." in caplog.text
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_the_run_does_not_wait_for_a_slow_service_and_it_gets_every_row(tmp_path: Path) -> None:
    slow = Slow()
    tracking = Tracking(Record(tmp_path / "metrics.jsonl"))
    tracking.project(lambda: slow, name="slow")
    for step in range(500):
        tracking.log({"step": step})
    assert slow.rows == []
    slow.answers.set()
    tracking.close("done")
    assert slow.rows == [{"step": step} for step in range(500)]
    assert slow.state == "done"


def test_what_joins_late_is_shown_the_rows_from_before(tmp_path: Path) -> None:
    record = Record(tmp_path / "metrics.jsonl")
    for step in range(3):
        record.log({"step": step})
    record.close()
    listens = Slow()
    listens.answers.set()
    tracking = Tracking(Record(tmp_path / "metrics.jsonl", keep_rows=2))
    tracking.project(lambda: listens, name="listens")
    tracking.log({"step": 2, "again": 1})
    tracking.close("interrupted")
    assert listens.rows == [{"step": 0}, {"step": 1}, {"step": 2, "again": 1}]
    assert listens.state == "interrupted"


def test_rows_outlive_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """A limit on the size of files is a full disk that needs no privilege."""
    program = f"""
import json, resource
from pathlib import Path
from apt_launch.record import Record, read_rows
path = Path({str(tmp_path / "metrics.jsonl")!r})
record = Record(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for step in range(20):
    record.log({{"step": step}})
on_disk = len(path.read_bytes())
try:
    record.sync()
    synced = True
except OSError:
    synced = False
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
record.log({{"step": 20}})
record.close()
print(json.dumps([on_disk, synced, [row["step"] for row in read_rows(path)]]))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=HANGS)
    assert json.loads(told.stdout) == [100, False, list(range(21))]
    assert told.stderr.count("cannot be written") == 1


def test_csv_has_a_column_for_each_metric_however_late_it_comes(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [{"step": 0, "a": 1.5}, {"step": 1, "a": 2.5, "b": 3.0}, {"step": 2, "b": 4.0}]
    for _ in range(2):  # the second time as a resume does it: from the first row on
        tracker = CsvTracker(mode="offline", folder=tmp_path)
        for row in rows:
            tracker.log(row)
        tracker.close("done")
        assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,a,b", "0,1.5,", "1,2.5,3.0", "2,,4.0"]


def test_tensorboard_has_every_value_once_at_its_step_also_after_a_resume(tmp_path: Path) -> None:
    for rows in (1, 2):
        tracker = TensorBoardTracker(mode="offline", folder=tmp_path)
        for step in range(rows):
            tracker.log({"step": 10 * step, "train/loss": 2.0 - step})
        tracker.close("done")
    program = (
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        f"events = EventAccumulator({str(tmp_path / 'tensorboard')!r}); events.Reload()\n"
        "print([(e.step, e.value) for e in events.Scalars('train/loss')])"
    )
    read = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=HANGS)
    assert read.stdout.strip() == "[(0, 2.0), (10, 1.0)]"


def test_the_wandb_client_keeps_every_row_offline(tmp_path: Path) -> None:
    program = (
        "import threading\n"
        "from pathlib import Path\n"
        "from apt_launch.tracking.wandb import WandbTracker\n"
        "before = threading.excepthook\n"
        "tracker = WandbTracker(mode='online', project='p', entity=None, name=None, tags=['t'],\n"
        f"    folder=Path({str(tmp_path)!r}), run_id='abc', config={{'seed': 3}}, updates_per_epoch=10)\n"
        "for step in (0, 3, 9): tracker.log({'step': step, 'train/loss': step / 2})\n"
        "tracker.log({'step': 9, 'val/loss': 7.0})\n"
        "assert threading.excepthook is not before\n"
        "tracker.close('done')\n"
        "assert threading.excepthook is before\n"
    )
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment() | home, capture_output=True, text=True, timeout=HANGS
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("there is no API key here") == 1
    assert f"python -m apt_launch.sync {tmp_path}" in run.stderr
    records = wandb_records(next((tmp_path / "wandb").glob("offline-run-*-abc")))
    rows = [{"step": step, "train/loss": step / 2, "trainer/step": step} for step in (0, 3, 9)]
    assert wandb_rows(records) == [*rows[:2], rows[2] | {"val/loss": 7.0}]
    run_record = next(record["run"] for record in records if record["type"] == "run")
    assert (run_record["run_id"], run_record["project"], run_record["tags"]) == ("abc", "p", ["t"])
    assert run_record["config"]["update"]["seed"] == 3


@pytest.mark.parametrize(
    ("asked", "variables", "mode", "variable"),
    [
        ("online", {}, "online", None),
        ("online", {"WANDB_MODE": "disabled"}, "disabled", "WANDB_MODE=disabled"),
        ("offline", {"WANDB_MODE": "disabled"}, "disabled", "WANDB_MODE=disabled"),
        ("online", {"WANDB_MODE": "offline"}, "offline", "WANDB_MODE=offline"),
        ("offline", {"WANDB_MODE": "offline"}, "offline", None),
        ("offline", {"WANDB_MODE": "online"}, "offline", None),  # a variable only takes away
        ("online", {"WANDB_DISABLED": "true"}, "disabled", "WANDB_DISABLED=true"),
        ("online", {"WANDB_DISABLED": "false"}, "online", None),
        ("disabled", {"WANDB_MODE": "offline"}, "disabled", None),
    ],
)
def test_variables_of_wandb_take_away(asked: str, variables: dict[str, str], mode: str, variable: str | None) -> None:
    assert mode_of(asked, variables) == (mode, variable)
