"""Who only looks changes nothing: ``status``, ``watch`` and ``report`` leave every file of a sweep as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from apt_launch.lease import Holder
from apt_launch.planning import gather
from apt_launch.sweep.control.ledger import Ledger, record_ends
from apt_launch.sweep.control.send import prepare
from apt_launch.sweep.jobs.state import read_state, transition
from apt_launch.sweep.report.report import write_report
from apt_launch.sweep.watch.live import Watch
from tests.conftest import SMALL
from tests.forks import run_module


@pytest.fixture
def sweep(text_file: Path, tmp_path: Path) -> Iterator[Path]:
    """A sweep in every state: done, dead without a word, failed, requeued by a worker that is gone, cancelled, planned."""
    folder = tmp_path / "sweep"
    plan = gather([*SMALL, "data=text", f"data.path={text_file}", "seed=range(0,6)"])
    folder.mkdir()
    plan.write(folder)
    prepare(plan, folder, plan.jobs)
    (folder / ".submitit").mkdir()
    worker = {**asdict(Holder.this_process()), "began": "1"}  # of a process that has ended
    (folder / ".submitit" / "worker-0.json").write_text(json.dumps(worker))
    for job, state in zip(plan.jobs, ("done", "running", "failed", "requeued", "cancelled"), strict=False):
        own = folder / job.folder
        transition(own, "submitted", job_id="worker-0")
        transition(own, "running")
        if state != "running":
            transition(own, state)  # type: ignore[arg-type]
        rows = [{"step": 0, "epoch": 0, "tokens": 32, "time": 1.0, "train/loss": 5.0, "val/loss": 4.0}]
        (own / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1, "tok')
    (folder / plan.jobs[1].folder / "lease.json").write_text(json.dumps(worker))
    yield folder
    GlobalHydra.instance().clear()


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Names, times and bytes of all that lies in ``folder``, but for a report."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        if "report" not in path.parts:
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            # a new entry changes its folder's time: here that is the report's alone
            found[str(path)] = (0 if path == folder else path.stat().st_mtime_ns, digest)
    return found


def by_status(folder: Path) -> None:
    run_module("apt_launch.sweep", "status", str(folder))
    run_module("apt_launch.sweep", "status", str(folder), "--json")


def by_watching(folder: Path) -> None:
    live = Watch(folder)
    live.news(0)
    live.picture()
    result = run_module("apt_launch.sweep", "watch", str(folder), "--terminal")  # no terminal: it follows, line by line
    assert result.returncode == 1


def by_report(folder: Path) -> None:
    assert run_module("apt_launch.sweep", "report", str(folder)).returncode == 0
    write_report(folder, {status.job.folder: status.state for status in Ledger(folder).statuses()})


@pytest.mark.parametrize("look", [by_status, by_watching, by_report])
def test_looking_changes_no_file(sweep: Path, look: Callable[[Path], None]) -> None:
    before = contents(sweep)
    states = {status.job.number: status.state for status in Ledger(sweep).statuses()}
    assert states == {0: "done", 1: "failed", 2: "failed", 3: "failed", 4: "cancelled", 5: "planned"}
    look(sweep)
    assert contents(sweep) == before


def test_whoever_waits_for_a_sweep_writes_the_ends_that_jobs_could_not(sweep: Path) -> None:
    statuses = Ledger(sweep).statuses()
    assert [read_state(status.folder).state for status in statuses][:4] == ["done", "running", "failed", "requeued"]
    record_ends(statuses)
    after = [read_state(status.folder) for status in statuses]
    assert [state.state for state in after] == ["done", "failed", "failed", "failed", "cancelled", "planned"]
    gone = "the worker that ran it is gone"
    assert [state.cause for state in after] == [None, gone, None, gone, None, None]
