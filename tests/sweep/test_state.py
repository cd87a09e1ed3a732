"""The state of a job: which changes are possible, and what they keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from apt_launch.sweep.jobs.state import ENDED, TRANSITIONS, Name, State, is_allowed, read_state, transition

ACTIVE = {"submitted", "running", "preempted", "requeued"}

ALLOWED = {
    "planned": {"submitted", "running", "preempted", "failed", "cancelled", "dropped"},
    "submitted": {"planned", "submitted", "running", "preempted", "failed", "cancelled"},
    "running": {*ACTIVE, "failed", "cancelled", "done", "stopped"},
    "preempted": {"planned", *ACTIVE, "failed", "cancelled"},
    "requeued": {"planned", *ACTIVE, "failed", "cancelled"},
    "failed": {"submitted", "running", "dropped"},
    "cancelled": {"submitted", "running", "dropped"},
    "done": {"running", "dropped"},
    "stopped": {"submitted", "running", "dropped"},
    "dropped": {"submitted"},
    "pending": set(),
    "unknown": set(),
}


def at(folder: Path, state: str, **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"state": state, **more}))
    return folder


@pytest.mark.parametrize("before", get_args(Name))
@pytest.mark.parametrize("after", get_args(Name))
def test_each_change_is_made_or_refused_as_the_table_says(tmp_path: Path, before: Name, after: Name) -> None:
    folder = at(tmp_path / "job", before)
    assert is_allowed(before, after) == (after in ALLOWED[before])
    if after in ALLOWED[before]:
        assert transition(folder, after).state == read_state(folder).state == after
    elif before in ENDED:  # the first word counts
        assert transition(folder, after).state == read_state(folder).state == before
    else:
        with pytest.raises(ValueError, match=f"cannot change from {before} to {after}"):
            transition(folder, after)
        assert read_state(folder).state == before


def test_the_table_names_every_state_that_is_ever_written() -> None:
    assert set(TRANSITIONS) == set(get_args(Name)) - {"pending", "unknown"}
    assert {after for states in TRANSITIONS.values() for after in states} == set(TRANSITIONS)


def test_a_folder_without_a_state_is_planned_and_its_first_change_makes_it(tmp_path: Path) -> None:
    assert read_state(tmp_path / "job") == State("planned")
    transition(tmp_path / "job", "submitted", job_id="worker-0")
    assert json.loads((tmp_path / "job" / "state.json").read_text()) == {
        **{"state": "submitted", "job_id": "worker-0", "restarts": 0, "seconds": 0.0, "cause": None, "loss": None},
        "since": read_state(tmp_path / "job").since,
    }


def test_a_change_keeps_number_attempts_and_time_and_drops_cause_and_loss(tmp_path: Path) -> None:
    folder = at(tmp_path / "job", "failed", job_id="12_3", restarts=2, seconds=7.5, cause="it broke", loss=1.0)
    again = transition(folder, "submitted", job_id="")
    assert (again.job_id, again.restarts, again.seconds, again.cause, again.loss) == (None, 2, 7.5, None, None)
    running = transition(folder, "running", job_id="13_0", restarts=0)
    assert (running.job_id, running.restarts, running.seconds) == ("13_0", 0, 7.5)
    done = transition(folder, "done", loss=0.5, seconds=9.0)
    assert (done.job_id, done.restarts, done.seconds, done.loss) == ("13_0", 0, 9.0, 0.5)


def test_a_job_that_has_started_keeps_the_number_that_it_wrote_itself(tmp_path: Path) -> None:
    folder = at(tmp_path / "job", "submitted")
    assert transition(folder, "submitted", expected="submitted", job_id="12_3").job_id == "12_3"
    transition(folder, "running", job_id="12_4")
    assert transition(folder, "submitted", expected="submitted", job_id="12_3") == read_state(folder)
    assert (read_state(folder).state, read_state(folder).job_id) == ("running", "12_4")
