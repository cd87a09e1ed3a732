"""Programs of other people, swept without a change: real processes, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apt_launch.lease import read_holder
from apt_launch.values import from_yaml
from tests.conftest import until
from tests.forks import HANGS
from tests.sweep.programs import (
    BARE,
    FOLDERS,
    LOOPS,
    MODEL,
    PACKAGE,
    SEES,
    SEES_CONFIG,
    SQUARE,
    before_1_4,
    of_users,
    write,
)

OURS = ("hydra/sweeper=apt", "hydra/launcher=apt_local")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Start a program as its user does; ``after``: a command for the sweep in ``sweep``."""
    write(
        tmp_path,
        {
            **{"see.py": SEES, "conf/config.yaml": SEES_CONFIG, "conf/db/mysql.yaml": "driver: mysql\nport: 3306\n"},
            **{"lab/__init__.py": "", "lab/train.py": PACKAGE, "lab/model.py": MODEL},
            **{
                "lab/conf/config.yaml": "lr: 0.1\nseed: 0\nnotes: none\n",
                "bare.py": BARE,
                "folders.py": FOLDERS,
                "loops.py": LOOPS,
                "square.py": SQUARE,
            },
        },
    )

    def run(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=of_users(**more),
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )

    return run


@pytest.fixture
def sweep(run: Run, tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Send a program's sweep to the folder ``sweep``; what is left of it in the end is cancelled."""

    def sweep(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return run(*command, "hydra.sweep.dir=sweep", *OURS, **more)

    yield sweep
    if any(json.loads(path.read_text())["state"] == "running" for path in tmp_path.glob("sweep/*/state.json")):
        run("-m", "apt_launch.sweep", "cancel", "sweep")


def own(folder: Path, number: int) -> Path:
    return next(folder.glob(f"sweep/{number}-*"))


def state(folder: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((own(folder, number) / "state.json").read_text())
    return found


def test_a_job_sees_what_it_sees_under_hydras_own_launcher(run: Run, sweep: Run, tmp_path: Path) -> None:
    asked = ("see.py", "-m", "lr=0.1,0.2", "db@rig.db=mysql,postgres")
    theirs = run(*asked, "hydra.sweep.dir=theirs", "hydra/launcher=basic")
    assert theirs.returncode == 0, theirs.stderr
    ours = sweep(*asked)
    assert ours.returncode == 0, ours.stdout + ours.stderr
    for number, rate in enumerate(("0.1", "0.1", "0.2", "0.2")):
        before, after = (tmp_path / name / f"run-{number}" for name in ("theirs", "sweep"))
        seen = [
            json.loads((folder / "seen.json").read_text().replace(str(folder), "HERE")) for folder in (before, after)
        ]
        assert seen[0] == seen[1]
        assert sorted(path.name for path in before.iterdir()) == sorted(path.name for path in after.iterdir())
        assert (after / "callbacks.txt").read_text() == f"lr {rate} start {number}\nlr {rate} end COMPLETED {number}\n"
        assert f"a line of the log with lr {rate}" in (after / "see.log").read_text()
        assert f"a line of the log with lr {rate}" in (own(tmp_path, number) / "log.txt").read_text()
        assert state(tmp_path, number)["loss"] == float(rate)
    assert (tmp_path / "sweep/run-0/seen.json").stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert own(tmp_path, 0).stat().st_mode & 0o077 == 0
    plan = from_yaml((tmp_path / "sweep/plan.yaml").read_text())
    assert plan["version"] == 1
    assert plan["program"]["script"] == str(tmp_path / "see.py")
    assert plan["shared"]["where"] == "${hydra:runtime.output_dir}"  # the job's own
    assert plan["shared"]["login"]["password"] == "${apt.secret:0}"
    assert plan["shared"]["login"]["url"] == "https://me:${login.password}@host"
    kept = {path for path in (tmp_path / "sweep").rglob("*") if path.is_file() and b"c4n4ry" in path.read_bytes()}
    secrets = tmp_path / "sweep/secrets.json"
    by_hydra = {
        tmp_path / f"sweep/run-{number}/{name}" for number in range(4) for name in ("seen.json", ".mine/config.yaml")
    }
    assert kept == {secrets, *by_hydra}
    assert secrets.stat().st_mode & 0o777 == 0o600


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def test_a_module_with_relative_imports_fails_with_its_own_traceback_and_the_others_go_on(
    run: Run, sweep: Run, tmp_path: Path
) -> None:
    result = sweep(
        *("-m", "lab.train", "-m", "lr=0.1,5,0.2,0.10", "notes=a,b"),
        *("hydra.sweeper.neutral=[notes]", "hydra.sweeper.objective=accuracy", "hydra.sweeper.direction=maximize"),
    )
    assert result.returncode == 1
    assert "8 asked, 3 unique" in result.stdout
    assert "lr=5 notes=a: ValueError: lr=5 is too large" in result.stdout
    log = (own(tmp_path, 1) / "log.txt").read_text()
    assert log.count("Traceback") == 1
    assert 'raise ValueError(f"lr={cfg.lr} is too large")' in log
    assert (own(tmp_path, 0) / "log.txt").read_text().startswith("the loss of 0.1\n")
    best = run("-m", "apt_launch.sweep", "best", "sweep").stdout.splitlines()
    assert best == [str(tmp_path / "sweep/0"), "python -m lab.train lr=0.1 notes=a"]
    assert "Best of 2: job 0" in run("-m", "apt_launch.sweep", "report", "sweep").stdout or (
        "accuracy 0.9000" in (tmp_path / "sweep/report/report.md").read_text()
    )
    dropped = run("-m", "apt_launch.sweep", "drop", "sweep", "1")
    assert "2 done, 1 dropped" in dropped.stdout
    assert run("-m", "apt_launch.sweep", "wait", "sweep").returncode == 0
    assert "Nothing to send" in run("-m", "apt_launch.sweep", "resume", "sweep").stdout
    assert "there is no job 9" in run("-m", "apt_launch.sweep", "resume", "sweep", "9").stderr
    (tmp_path / "sweep/plan.yaml").chmod(0o666)
    refused = run("-m", "apt_launch.sweep", "resume", "sweep", "1")
    assert refused.returncode == 2
    assert "may be written to by others" in refused.stderr


def test_a_wrapped_function_without_a_folder_of_configs_and_a_plan_that_is_only_shown(
    run: Run, sweep: Run, tmp_path: Path
) -> None:
    shown = run("-m", "apt_launch.sweep", "run", "bare.py", "x=1,2", "--dry-run", "hydra.sweep.dir=sweep")
    assert "2 asked, 2 unique" in shown.stdout
    assert "Nothing is sent" in shown.stdout
    assert not (tmp_path / "sweep").exists()
    refused = sweep("bare.py", "-m", "x=1,2", "+db.password=c4n4ry-0123,other")
    assert refused.returncode == 2
    assert "db.password: by its name it holds a secret" in refused.stderr
    assert "db.password='${oc.env:NAME}'" in refused.stderr
    assert "c4n4ry" not in refused.stdout + refused.stderr
    assert not (tmp_path / "sweep").exists()
    result = sweep("bare.py", "-m", "x=3,4,3", "hydra.launcher.mem_gb=0.1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [state(tmp_path, number)["loss"] for number in (0, 1)] == [1.5, 2.0]
    if not before_1_4():
        assert "Hydra15MigrationWarning" not in result.stderr


def test_a_sweeper_that_waits_gets_true_results_and_equal_jobs_run_once(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs apt-launch[optuna]")
    trials = ("hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=1", "+x=choice(1,2)")
    result = run(
        "square.py", "-m", "hydra/sweeper=optuna", "hydra/launcher=apt_local", *trials, "hydra.sweep.dir=sweep"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    ended = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/state.json")]
    assert {one["state"] for one in ended} == {"done"}
    assert len({one["loss"] for one in ended}) == len(ended) <= 2  # four trials, two configs
    found = from_yaml((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert found["best_value"] == min(one["loss"] for one in ended)
    assert (found["best_params"]["+x"] - 1) ** 2 + 0.5 == found["best_value"]


def test_a_program_that_saves_and_asks_goes_on_and_one_that_does_not_is_told_that_it_starts_anew(
    sweep: Run, run: Run, tmp_path: Path
) -> None:
    by_hand = run("loops.py", "hydra.run.dir=by_hand")
    assert by_hand.returncode == 0, by_hand.stderr
    assert (tmp_path / "by_hand/checkpoints").is_dir()
    command = ("loops.py", "-m", "+holds=true", "+asks=true,false", "hydra.launcher.max_parallel=2")
    with subprocess.Popen(
        [sys.executable, *command, "hydra.sweep.dir=sweep", *OURS],
        cwd=tmp_path,
        env=of_users(),
        stdout=subprocess.PIPE,
        text=True,
    ) as sent:
        for number in (0, 1):
            until(lambda n=number: len(_rows(tmp_path, n)) > 5, "the program to be in its loop")
            holder = read_holder(own(tmp_path, number) / "lease.json")
            assert holder is not None
            os.kill(holder.pid, signal.SIGTERM)
        until(lambda: state(tmp_path, 0)["state"] == "done", "the first to end")
        until(lambda: state(tmp_path, 1)["restarts"] == 1 and len(_rows(tmp_path, 1)) > 5, "the second to loop again")
        cancelled = run("-m", "apt_launch.sweep", "cancel", "sweep", "1")
        assert "1 done, 1 cancelled" in cancelled.stdout
        assert sent.wait(HANGS) == 1
    first, second = ((own(tmp_path, number) / "log.txt").read_text() for number in (0, 1))
    assert "it will continue from what it has written into job.checkpoints" in first
    assert "begins at 3" in first
    assert "it has written nothing into job.checkpoints, and will start anew" in second
    assert second.count("begins at 0") == 2
    assert [row["step"] for row in _rows(tmp_path, 0)][-2:] == [4, 4]  # its last report, and what it returned
    assert _rows(tmp_path, 0)[-1]["result"] == 0.2


def test_a_jobs_folder_is_hydras_own_and_moves_with_the_sweep(run: Run, sweep: Run, tmp_path: Path) -> None:
    subdir = "hydra.sweep.subdir='${hydra.job.num}_${tidy:${hydra.job.override_dirname}}_${hydra:job.id}'"
    result = sweep("folders.py", "-m", "+x=1,2", subdir)
    assert result.returncode == 0, result.stdout + result.stderr
    names = ["0_+x-1_0", "1_+x-2_1"]
    for number, name in enumerate(names):
        output = tmp_path / "sweep" / name
        assert (own(tmp_path, number) / "log.txt").read_text().splitlines()[-1] == f"{output}|{output}|sweep"
        assert [(row["step"], row["val"]) for row in _rows(tmp_path, number)[:1]] == [(3, number + 1)]
    best = run("-m", "apt_launch.sweep", "best", "sweep")
    assert best.stdout.splitlines()[0] == str(tmp_path / "sweep" / names[0])

    moved = (tmp_path / "sweep").rename(tmp_path / "moved")
    best = run("-m", "apt_launch.sweep", "best", "moved")
    assert best.stdout.splitlines()[0] == str(moved / names[0])
    run("-m", "apt_launch.sweep", "drop", "moved", "0")
    again = run("-m", "apt_launch.sweep", "resume", "moved", "0")
    assert again.returncode == 0, again.stdout + again.stderr
    said = next(moved.glob("0-*/log.txt")).read_text().splitlines()
    assert said[-1] == f"{moved / names[0]}|{moved / names[0]}|{moved}"
    assert not (tmp_path / "sweep").exists()


def test_a_loser_is_stopped_where_it_asks_and_goes_on_when_it_is_resumed(sweep: Run, run: Run, tmp_path: Path) -> None:
    stop = ("hydra.launcher.stop.rungs=[3st]", "hydra.launcher.stop.metric=val/loss")
    result = sweep("loops.py", "-m", "+scale=1,2", "hydra.launcher.max_parallel=1", *stop)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "losers: all settings judged by val/loss after update 3" in result.stdout
    assert [state(tmp_path, number)["state"] for number in (0, 1)] == ["done", "stopped"]
    assert [row["step"] for row in _rows(tmp_path, 1)] == [0, 1, 2]
    assert state(tmp_path, 1)["loss"] == 2 / 3
    assert json.loads((own(tmp_path, 1) / "checkpoints/last.json").read_text()) == {"step": 3}
    again = run("-m", "apt_launch.sweep", "resume", "sweep", "1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert state(tmp_path, 1)["state"] == "done"
    assert [row["step"] for row in _rows(tmp_path, 1)] == [0, 1, 2, 3, 4, 4]


def _rows(folder: Path, number: int) -> list[dict[str, float]]:
    paths = list(folder.glob(f"sweep/{number}-*/metrics.jsonl"))
    return [json.loads(line) for line in paths[0].read_text().splitlines()] if paths else []
