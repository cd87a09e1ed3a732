"""Programs of other people on a real cluster: one by one, several in a task, from a copy of their code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import until
from tests.forks import HANGS
from tests.slurm.cluster import Cluster
from tests.sweep.programs import LOOPS, MODEL, PACKAGE, of_users, write

Run = Callable[..., subprocess.CompletedProcess[str]]
OURS = ("hydra/sweeper=apt", "hydra/launcher=apt_slurm", "hydra.launcher.gpus=0", "hydra.sweep.dir=sweep")


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Run:
    """Start what a user starts, in a git checkout with two programs."""
    write(
        tmp_path,
        {
            **{"lab/__init__.py": "", "lab/train.py": PACKAGE, "lab/model.py": MODEL, ".gitignore": "sweep/\n"},
            **{"lab/conf/config.yaml": "lr: 0.1\ncores: 1\n", "loops.py": LOOPS},
        },
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=of_users(SLURM_CONF=cluster.environment()["SLURM_CONF"]),
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )

    return run


def log(folder: Path, number: int) -> str:
    return "".join(path.read_text() for path in folder.glob(f"sweep/{number}-*/log.txt"))


def states(folder: Path) -> dict[int, dict[str, Any]]:
    return {
        int(path.parent.name.split("-")[0]): json.loads(path.read_text())
        for path in folder.glob("sweep/[0-9]*-*/state.json")
    }


def reports(folder: Path, number: int) -> int:
    paths = list(folder.glob(f"sweep/{number}-*/metrics.jsonl"))
    return len(paths[0].read_text().splitlines()) if paths else 0


def test_resources_differ_within_a_sweep_which_is_left_waited_for_and_resumed(run: Run, tmp_path: Path) -> None:
    sent = run("-m", "lab.train", "-m", "lr=0.1,5", "cores=1,2", "hydra.launcher.cpus=${cores}", *OURS)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert "It continues without this command" in sent.stdout
    assert "2 jobs, 1 cores a task" in sent.stdout
    assert "2 jobs, 2 cores a task" in sent.stdout
    waited = run("-m", "apt_launch.sweep", "wait", "sweep")
    assert waited.returncode == 1
    assert "2 done, 2 failed" in waited.stdout
    assert "job 2 (lr=5 cores=1) failed: ValueError: lr=5 is too large" in waited.stdout
    assert log(tmp_path, 2).count("Traceback") == 1
    assert json.loads((tmp_path / "sweep/snapshot.json").read_text())["checkout"] == str(tmp_path)
    assert "1 job, " in run("-m", "apt_launch.sweep", "resume", "sweep", "3").stdout
    assert run("-m", "apt_launch.sweep", "wait", "sweep").returncode == 1
    assert [one["state"] for _, one in sorted(states(tmp_path).items())] == ["done", "done", "failed", "failed"]
    assert log(tmp_path, 3).count("Traceback") == 2


def test_jobs_in_one_task_are_cancelled_alone_and_requeued_together_and_run_the_code_of_the_launch(
    run: Run, cluster: Cluster, tmp_path: Path
) -> None:
    sent = run("loops.py", "-m", "+holds=true", "+seed=0,1,2", "hydra.launcher.pack=3", *OURS)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert len({one["job_id"] for one in states(tmp_path).values()}) == 1
    (tmp_path / "loops.py").write_text("raise SystemExit('edited while jobs queue')\n")
    until(lambda: all(reports(tmp_path, number) > 5 for number in range(3)), "all three to be in their loops")
    cancelled = run("-m", "apt_launch.sweep", "cancel", "sweep", "1")
    assert "1 cancelled" in cancelled.stdout, cancelled.stdout + cancelled.stderr
    assert states(tmp_path)[0]["state"] == "running"
    number = states(tmp_path)[0]["job_id"]
    cluster.run("scancel", "--signal=USR2", number)
    waited = run("-m", "apt_launch.sweep", "wait", "sweep")
    assert "2 done, 1 cancelled" in waited.stdout, waited.stdout + log(tmp_path, 0)
    for other in (0, 2):
        assert states(tmp_path)[other]["restarts"] == 1
        assert "begins at 3" in log(tmp_path, other)
    assert states(tmp_path)[1]["restarts"] == 0
