"""Sweeps that version 0.1.0 made before this package had rooms: they are read, watched, reported and resumed as ever.

``tests/fixtures/earlier_sweeps`` has one that is done, and one that was cancelled after its first checkpoint.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import apt_launch.job
import apt_launch.local
from apt_launch.application import Trainer
from apt_launch.record import read_rows
from apt_launch.sweep.application import TRAINER, load
from apt_launch.sweep.control.ledger import Ledger
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.watch.live import Watch
from apt_model.errors import ConfigError
from tests.forks import HANGS, REPOSITORY, environment, run_module

Sweep = Callable[[str], Path]


@pytest.fixture
def earlier(tmp_path: Path, text_file: Path) -> Sweep:
    """Copy a sweep of the earlier version to a place where its paths are right."""

    def earlier(name: str) -> Path:
        (tmp_path / "text.txt").write_bytes(text_file.read_bytes())
        folder = tmp_path / name
        shutil.copytree(REPOSITORY / "tests" / "fixtures" / "earlier_sweeps" / name, folder)
        for path in [folder / "plan.yaml", *folder.glob("*/job.json")]:
            path.write_text(path.read_text().replace("CWD", str(tmp_path)))
        return folder

    return earlier


def jobs(folder: Path) -> dict[int, dict[str, Any]]:
    result = run_module("apt_launch.sweep", "status", str(folder), "--json")
    return {row["number"]: row for row in map(json.loads, result.stdout.splitlines())}


def test_its_plan_means_the_trainer(earlier: Sweep) -> None:
    folder = earlier("finished")
    assert "application" not in (folder / "plan.yaml").read_text()
    assert Plan.read(folder).application == TRAINER
    assert isinstance(Ledger(folder).application, Trainer)


def test_status_report_and_watch_show_it(earlier: Sweep) -> None:
    folder = earlier("finished")
    assert {number: (job["state"], job["phase"]) for number, job in jobs(folder).items()} == {
        0: ("done", "moe+align+voter"),
        1: ("done", "moe+align+voter"),
    }
    table = run_module("apt_launch.sweep", "status", str(folder)).stdout
    assert "24/24" in table
    report = run_module("apt_launch.sweep", "report", str(folder))
    assert report.returncode == 0, report.stderr
    assert "Best of 2: job 1 (route_temp.end=0.8), val/loss 5.3416." in (folder / "report" / "report.md").read_text()
    news = Watch(folder).news(0)
    # moe is enabled at epoch 2, align at 3, voter at 5: with updates 8, 12 and 20, which end at 9, 13 and 21 times 32 tokens
    assert [job["switches"] for job in news["jobs"]] == [{"moe": 288, "align": 416, "voter": 672}] * 2
    assert news["ended"]


def test_it_is_resumed_from_its_checkpoint(earlier: Sweep) -> None:
    folder = earlier("interrupted")
    assert {job["state"] for job in jobs(folder).values()} == {"cancelled"}
    before = read_rows(next(folder.glob("0-*")) / "metrics.jsonl")
    resumed = run_module("apt_launch.sweep", "resume", str(folder), cwd=folder.parent)  # data.path is relative
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert {job["state"] for job in jobs(folder).values()} == {"done"}
    (first,) = folder.glob("0-*")
    (second,) = folder.glob("1-*")
    assert "resuming" in (first / "log.txt").read_text()
    assert "resuming" not in (second / "log.txt").read_text()
    rows = read_rows(first / "metrics.jsonl")
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows if "val/loss" in row] == list(range(3, 40, 4))


def test_what_its_pickles_name_is_still_there() -> None:
    for named in (b"capt_launch.local\nwork\n.", b"capt_launch.local\nMachine\n.", b"capt_launch.job\nrun_on_slurm\n."):
        assert callable(pickle.loads(named))
    assert apt_launch.local.work.__module__ == "apt_launch.sweep.backends.local_worker"
    assert apt_launch.job.perform.__module__ == "apt_launch.sweep.jobs.process"


@pytest.mark.parametrize(
    "name", ["os:system", "apt_launch.application:os", "apt_launch.application", "apt_launch.application:Trainer:x", ""]
)
def test_only_known_applications_are_loaded(name: str) -> None:
    with pytest.raises(ConfigError, match=r"application: .* is not known here"):
        load(name)


def test_a_folder_cannot_name_code(earlier: Sweep) -> None:
    folder, name = earlier("finished"), "os:system"
    plan = folder / "plan.yaml"
    plan.write_text(plan.read_text().replace("asked: 2", f"asked: 2\napplication: '{name}'"))
    for command in ("status", "resume", "cancel"):
        result = run_module("apt_launch.sweep", command, str(folder))
        assert (result.returncode, "application:" in result.stderr) == (2, True), result
        assert "Traceback" not in result.stderr
    own = next(folder.glob("0-*"))
    about = json.loads((own / "job.json").read_text())
    (own / "job.json").write_text(json.dumps({**about, "application": name}))
    code = f"from apt_launch.job import perform; from pathlib import Path; perform(Path({str(own)!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=HANGS, check=False)
    assert done.returncode == 1
    assert "is not known here" in (own / "log.txt").read_text()
