"""Sweeps on this machine: real processes, which fail, die, are interrupted and go on."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apt_launch.lease import LOST, read_holder
from apt_launch.planning import gather
from apt_launch.sweep.control.send import prepare
from apt_launch.values import from_yaml
from tests.conftest import SMALL, until, wandb_records, wandb_rows
from tests.forks import HANGS, Fork, environment, run_module
from tests.hold import Hold

Start = Callable[..., Fork]
LONG = ("trainer.max_epochs=12", "trainer.log_every=1", "schedule=none", "trainer.checkpoint_every_epochs=2")
"""Overrides of 48 updates, the first checkpoint after the eighth."""


@pytest.fixture
def base(text_file: Path) -> list[str]:
    # jobs of a few thousand parameters: more threads would only wait for each other
    return [*SMALL, "launch.cpus=1", "data=text", f"data.path={text_file}"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Where the sweep under test goes."""
    return tmp_path / "sweep"


@pytest.fixture
def start(base: list[str], sweep: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a sweep in the background; whatever of it is left at the end is cancelled."""
    started: list[Fork] = []

    def start(*arguments: str, hold: Hold | None = None, **more: Any) -> Fork:
        command = ["apt_launch", "--multirun", *base, f"hydra.sweep.dir={sweep}", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | more
        env = environment(**(hold.environment if hold else {}))
        started.append(Fork(command, cwd=tmp_path, env=env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
    if (sweep / "plan.yaml").exists():
        after(sweep, "cancel")
    for process in started:  # jobs hold what they print into
        process.communicate()


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    """Where a job of ``LONG`` holds that has a checkpoint and is in the middle of an epoch."""
    return Hold(tmp_path / "hold", at=11)


def after(sweep: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Call ``python -m apt_launch.sweep`` as from another terminal."""
    name, *rest = command
    return run_module("apt_launch.sweep", name, str(sweep), *rest, cwd=Path("/"))


def states(sweep: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in after(sweep, "status", "--json").stdout.splitlines()]
    return {row["number"]: row for row in rows}


def state_file(sweep: Path, number: int) -> dict[str, Any]:
    paths = list(sweep.glob(f"{number}-*/state.json"))
    return json.loads(paths[0].read_text()) if paths else {"state": "planned"}


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows for name in ("train/loss", "val/loss") if name in row]


def folder(sweep: Path, number: int) -> Path:
    return next(sweep.glob(f"{number}-*"))


def holds(sweep: Path, number: int, hold: Hold) -> bool:
    """Whether the job holds, and its rows and its checkpoint are written."""
    holder = read_holder(folder(sweep, number) / "lease.json") if list(sweep.glob(f"{number}-*")) else None
    if holder is None or holder.pid not in hold.holding():
        return False
    return bool(list(folder(sweep, number).glob("checkpoints/step-*"))) and len(losses(folder(sweep, number))) >= 9


def test_a_sweep_runs_each_different_job_once_and_leaves_the_folder_that_was_promised(
    start: Start, sweep: Path, tmp_path: Path
) -> None:
    output, _ = start("schedule.route_temp.end=0.6,0.60,0.8").communicate()
    assert "3 asked, 2 unique" in output
    assert sorted(path.name[:2] for path in sweep.glob("[0-9]*")) == ["0-", "1-"]
    for number, end in ((0, 0.6), (1, 0.8)):
        own = folder(sweep, number)
        assert {path.name for path in own.iterdir()} >= {
            *("config.yaml", ".hydra", "metrics.jsonl", "summary.json", "schedule.png", "checkpoints"),
            *("train.log", "log.txt", "provenance.json", "state.json"),
        }
        summary = json.loads((own / "summary.json").read_text())
        assert own.name == f"{number}-{summary['identity'][:8]}"
        assert summary["state"] == "done"
        assert summary["anneals"]["route_temp"]["last"] == pytest.approx(end)
        assert state_file(sweep, number)["loss"] == summary["final"]["val/loss"]
    assert {row["state"] for row in states(sweep).values()} == {"done"}
    table = after(sweep, "status").stdout
    assert "moe+align+voter" in table
    assert "24/24" in table
    assert "2 done" in table

    again = start("schedule.route_temp.end=0.6")
    told, _ = again.communicate()
    assert again.returncode == 2
    assert f"apt_launch.sweep resume {sweep}" in told
    assert "Nothing to send" in after(sweep, "resume").stdout


def test_a_loser_is_stopped_at_its_rung_and_goes_on_when_it_is_resumed(start: Start, sweep: Path) -> None:
    rungs = ("launch.stop.rungs=[25%]", "hydra.launcher.max_parallel=1")
    process = start("optimizer.lr=0.01,1e-9", "schedule=none", "trainer.lr_schedule=null", *rungs)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert "losers: all settings judged by val/loss after update 6; the best 1/2 go on" in output
    assert {number: row["state"] for number, row in states(sweep).items()} == {0: "done", 1: "stopped"}
    last = losses(folder(sweep, 1))[-1]
    assert last == (7, state_file(sweep, 1)["loss"])  # it validates after each four updates
    assert "at update 6 is number 2 of 2, of which 1 goes on" in state_file(sweep, 1)["cause"]
    assert list(folder(sweep, 1).glob("checkpoints/step-*8"))
    assert json.loads((folder(sweep, 1) / "summary.json").read_text())["state"] == "stopped"

    assert "Nothing to send" in after(sweep, "resume").stdout
    again = after(sweep, "resume", "1")
    assert again.returncode == 0
    assert {row["state"] for row in states(sweep).values()} == {"done"}
    steps = [step for step, _ in losses(folder(sweep, 1))]
    assert (steps[0], steps[-1]) == (0, 23)
    assert steps == [step for step, _ in losses(folder(sweep, 0))]
    replayed = after(sweep, "replay", "--rungs", "25%", "--at-once", "1").stdout
    assert "updates asked: 48; trained: " in replayed
    assert "the winner, optimizer.lr=0.01, would have been stopped in 0 of 200 orders" in replayed


def test_pickles_hold_no_config(start: Start, sweep: Path) -> None:
    start("seed=0,1").communicate()
    pickles = list((sweep / ".submitit").glob("*.pkl"))
    assert pickles
    assert all(b"d_model" not in path.read_bytes() for path in pickles)
    assert (sweep / ".submitit").stat().st_mode & 0o077 == 0


def test_a_job_that_fails_loses_only_itself_and_says_why(start: Start, sweep: Path, tmp_path: Path) -> None:
    process = start("optimizer.lr=0.001,1e30", "schedule=none", "optimizer.weight_decay=0", "trainer.lr_schedule=null")
    output, _ = process.communicate()
    assert process.returncode == 1
    told = states(sweep)
    assert told[0]["state"] == "done"
    assert told[1]["state"] == "failed"
    assert "loss is" in told[1]["cause"] or "norm is" in told[1]["cause"]
    assert "optimizer.lr=1e+30" in output or "optimizer.lr=1e30" in output
    assert "Traceback" in (folder(sweep, 1) / "log.txt").read_text()
    assert "Traceback" not in output
    assert after(sweep, "status").returncode == 1


def test_a_job_that_is_killed_loses_only_itself_and_resume_makes_it_whole(
    start: Start, sweep: Path, hold: Hold
) -> None:
    process = start("seed=0,1", *LONG, hold=hold)
    until(lambda: holds(sweep, 1, hold), "job 1 to hold")
    holder = read_holder(folder(sweep, 1) / "lease.json")
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    hold.let_go()
    process.communicate()
    assert process.returncode == 1
    told = states(sweep)
    assert told[0]["state"] == "done"
    assert told[1]["state"] == "failed"
    assert "SIGKILL" in told[1]["cause"]

    resumed = after(sweep, "resume")
    assert resumed.returncode == 0
    assert states(sweep)[1]["state"] == "done"
    assert "resuming" in (folder(sweep, 1) / "log.txt").read_text()
    assert len(losses(folder(sweep, 1))) == len(losses(folder(sweep, 0))) == 4 * 12 + 12
    assert len(set(losses(folder(sweep, 1)))) == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_job_that_is_preempted_continues_exactly_in_its_folder(
    start: Start, sweep: Path, hold: Hold, number: int
) -> None:
    process = start(
        "schedule.route_temp.end=0.6,0.8",
        "trainer.max_epochs=8",
        "trainer.log_every=1",
        "trainer.checkpoint_every_epochs=2",
        "hydra.launcher.max_parallel=1",
        hold=hold,
    )
    until(lambda: holds(sweep, 0, hold), "job 0 to hold")
    hold.let_go(*hold.holding())
    until(lambda: holds(sweep, 1, hold), "job 1 to hold")
    holder = read_holder(folder(sweep, 1) / "lease.json")
    assert holder is not None
    os.kill(holder.pid, number)
    until(lambda: state_file(sweep, 1)["restarts"], "its second attempt")
    hold.let_go()
    process.communicate()
    assert process.returncode == 0
    assert states(sweep)[1]["restarts"] == 1
    rows = losses(folder(sweep, 1))
    assert rows[-1][0] == 31
    assert len(rows) == 32 + 8


def test_a_drill_proves_that_jobs_continue_exactly(start: Start, sweep: Path) -> None:
    start("seed=0,1", "launch.drill=true").communicate()
    for number in (0, 1):
        assert state_file(sweep, number)["state"] == "done"
        assert state_file(sweep, number)["restarts"] == 1
        drill = json.loads((folder(sweep, number) / "drill.json").read_text())
        assert drill["verified"] is True
        assert drill["step"] == 12
        assert "bit for bit" in (folder(sweep, number) / "log.txt").read_text()


def test_a_drill_notices_the_smallest_difference(start: Start, sweep: Path) -> None:
    process = start("seed=0", "launch.drill=true", "trainer.keep_last=100")
    process.communicate()
    path = folder(sweep, 0) / "drill.json"
    drill = json.loads(path.read_text())
    drill["verified"] = False
    drill["rows"][3]["train/loss"] += 1e-7
    path.write_text(json.dumps(drill))
    for checkpoint in sorted((folder(sweep, 0) / "checkpoints").glob("step-*")):
        if int(checkpoint.name[5:]) > drill["step"]:
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    (folder(sweep, 0) / "state.json").write_text(json.dumps({"state": "failed"}))
    after(sweep, "resume")
    assert state_file(sweep, 0)["state"] == "failed"
    assert "drill: step" in state_file(sweep, 0)["cause"]


def test_a_job_stops_when_its_hours_are_spent_and_continues_with_more(
    start: Start, sweep: Path, hold: Hold, tmp_path: Path
) -> None:
    process = start("seed=0", *LONG, "launch.hours=0.0008", hold=hold)
    process.communicate()
    assert process.returncode == 1
    assert "launch.hours=" in state_file(sweep, 0)["cause"]
    before = len(losses(folder(sweep, 0)))
    assert before > 0
    again = Hold(tmp_path / "again", at=1)
    command = ["apt_launch.sweep", "resume", str(sweep), "launch.hours=1"]
    resume = Fork(command, env=environment(**again.environment))
    until(again.holding, "the next attempt to hold")
    assert "resuming" in (folder(sweep, 0) / "log.txt").read_text()
    assert after(sweep, "cancel").returncode == 0
    resume.wait()
    assert len(losses(folder(sweep, 0))) > before


def test_cancel_from_another_terminal_leaves_no_process_and_every_checkpoint(
    start: Start, sweep: Path, hold: Hold
) -> None:
    process = start("seed=0,1,2", *LONG, hold=hold)
    until(lambda: holds(sweep, 0, hold) and holds(sweep, 1, hold), "two jobs to hold")
    holders = [read_holder(folder(sweep, number) / "lease.json") for number in (0, 1)]
    worker = read_holder(next((sweep / ".submitit").glob("worker-*.json")))
    told = after(sweep, "cancel")
    assert told.returncode == 0
    assert not any(holder.alive for holder in [*holders, worker] if holder)
    process.communicate()
    assert {row["state"] for row in states(sweep).values()} == {"cancelled"}
    for number in (0, 1):
        assert list(folder(sweep, number).glob("checkpoints/step-*"))


def test_ctrl_c_asks_and_the_jobs_continue_when_one_leaves(sweep: Path, start: Start, hold: Hold) -> None:
    main, terminal = pty.openpty()
    process = start("seed=0", *LONG, hold=hold, stdin=terminal)
    until(lambda: holds(sweep, 0, hold), "the job to hold")
    process.send_signal(signal.SIGINT)
    os.write(main, b"leave\n")
    assert process.wait() == 130
    os.close(main)
    os.close(terminal)
    assert states(sweep)[0]["state"] == "running"
    hold.let_go()
    output, _ = process.communicate()
    assert f"apt_launch.sweep status {sweep}" in output
    assert after(sweep, "wait").returncode == 0
    assert states(sweep)[0]["state"] == "done"


def test_gpus_are_handed_out_and_never_shared(start: Start, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    start("launch.gpus=1,2", "seed=0,1").communicate()
    given = {}
    for row in states(sweep).values():
        provenance = json.loads((Path(row["folder"]) / "provenance.json").read_text())
        given[tuple(row["overrides"])] = provenance["visible_gpus"]
    assert {gpus for names, gpus in given.items() if "launch.gpus=1" in names} <= {"4", "7"}
    assert {gpus for names, gpus in given.items() if "launch.gpus=2" in names} <= {"4,7", "7,4"}
    assert len(given) == 4


def test_what_can_never_run_here_is_refused_before_anything_is_sent(start: Start, sweep: Path) -> None:
    process = start("seed=0,1", "launch.cpus=1000")
    output, _ = process.communicate()
    assert process.returncode == 2
    assert "job 0 (seed=0) wants 1000 cores a task" in output
    assert not sweep.exists()


def attempt(own: Path, restart: int | None = None, hold: Hold | None = None) -> Fork:
    r"""Perform the job with the folder ``own`` in a process of its own, as the ``restart``\ th of a cluster's job, if given."""
    more = [] if restart is None else ["7", str(restart)]
    return Fork(["tests.attempt", str(own), *more], env=environment(**(hold.environment if hold else {})))


def test_a_folder_in_use_takes_no_second_writer(start: Start, sweep: Path, hold: Hold) -> None:
    start("seed=0", *LONG, hold=hold)
    until(lambda: holds(sweep, 0, hold), "the job to hold")
    own = folder(sweep, 0)
    config = (own / "config.yaml").read_text()
    assert attempt(own).wait() == 1
    assert (own / "config.yaml").read_text() == config
    assert "is writing here" in (own / "log.txt").read_text()


def test_a_later_attempt_of_a_cluster_job_takes_the_folder_and_the_earlier_one_leaves(
    base: list[str], sweep: Path, hold: Hold
) -> None:
    plan = gather([*base, *LONG, "seed=0"])
    sweep.mkdir()
    plan.write(sweep)
    prepare(plan, sweep, plan.jobs)
    own = folder(sweep, 0)

    first = attempt(own, 0, hold)
    until(lambda: holds(sweep, 0, hold), "the first attempt to hold")
    second = attempt(own, 1)
    assert first.wait() == LOST
    assert second.wait() == 0
    assert "lost the lease" in (own / "log.txt").read_text()
    assert [step for step, _ in losses(own)] == [step for step, _ in sorted(losses(own), key=lambda row: row[0])]
    assert len(losses(own)) == len({step for step, _ in losses(own)}) + 12 == 60


def test_a_resume_says_which_keys_differ(start: Start, sweep: Path) -> None:
    start(
        "seed=0", "optimizer.lr=1e30", "schedule=none", "optimizer.weight_decay=0", "trainer.lr_schedule=null"
    ).communicate()
    told = after(sweep, "resume", "optimizer.lr=0.001")
    assert told.returncode == 2
    assert "optimizer.lr: a resume cannot change it" in told.stderr
    config = folder(sweep, 0) / "config.yaml"
    config.write_text(config.read_text().replace("num_layers: 2", "num_layers: 3"))
    told = after(sweep, "resume")
    assert told.returncode == 2
    assert "model.num_layers" in told.stderr


def test_wandb_shows_the_sweep_as_a_group_and_of_each_job_all_rows(start: Start, sweep: Path) -> None:
    output, _ = start("schedule.route_temp.end=0.6,0.8", "launch.share=true", "logger.mode=offline").communicate()
    (offline,) = folder(sweep, 0).glob("wandb/offline-run-*/*.wandb")
    run = next(record["run"] for record in wandb_records(offline.parent) if record["type"] == "run")
    assert f"sweep {run['run_group']}:" in output
    assert run["job_type"] == "sweep"
    assert "schedule.route_temp.end=0.6" in run["tags"]
    assert run["run_id"].startswith(json.loads((folder(sweep, 0) / "summary.json").read_text())["identity"][:8])
    assert json.loads((folder(sweep, 1) / "graft.json").read_text())["update"] > 1
    (offline,) = folder(sweep, 1).glob("wandb/offline-run-*/*.wandb")
    lines = (folder(sweep, 1) / "metrics.jsonl").read_text().splitlines()
    steps = sorted({json.loads(line)["step"] for line in lines})  # those of shared rows, too
    assert [row["step"] for row in wandb_rows(wandb_records(offline.parent))] == steps


STUDY = ("seed=0", "+sweeps/study=dense,experts_only,curriculum")
KEPT = {"route_temp": (), "moe_capacity": (), "align_weight": (), "vote_threshold": (), "all_anneals": ()}
KEPT |= {"study": STUDY, "study_gpu": (*STUDY, "launch.gpus=0")}


@pytest.mark.parametrize("name", KEPT)
def test_every_kept_sweep_runs_with_the_tiny_profile(start: Start, sweep: Path, name: str) -> None:
    tiny = ("profile=tiny_debug", "schedule=gpt5_moe", "trainer.max_epochs=6", "trainer.max_batches_per_epoch=1")
    process = start(f"+sweeps={name}", *tiny, *KEPT[name], "trainer.checkpoint_every_epochs=6")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    jobs = states(sweep)
    assert {row["state"] for row in jobs.values()} == {"done"}
    assert len(jobs) == {"moe_capacity": 4, "all_anneals": 16}.get(name, 3)
    written = after(sweep, "report").stdout.split()
    assert all(Path(path).stat().st_size > 0 for path in written)
    assert {Path(path).name for path in written} >= {"report.csv", "report.md", "report.html", "metric.png"}


def test_optuna_chooses_by_true_results(start: Start, sweep: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs apt-launch[optuna]")
    trials = ("hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=1")
    start("hydra/sweeper=optuna", *trials, "optimizer.lr=interval(0.001,0.01)").communicate(timeout=HANGS)
    best = from_yaml((sweep / "optimization_results.yaml").read_text())
    losses_found = {row["loss"] for row in states(sweep).values()}
    assert len(losses_found) == 4
    assert best["best_value"] == min(losses_found)
    assert "optimizer.lr=" in states(sweep)[3]["overrides"][0]


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("launch.gpu=1,2", "launch.gpu: unknown key. Did you mean 'launch.gpus'"),
        ("hydra/launcher=slrm", "hydra/launcher: there is no option 'slrm'. Did you mean 'slurm'?"),
        ("hydra.launcher.max_parallel=zero", "hydra.launcher.max_parallel: 'zero' is not valid"),
        ("schedule.route_temp.end=0.6,0", "job 1 (schedule.route_temp.end=0): schedule.route_temp.end = 0 is outside"),
        ("+sweeps=routetemp", "sweeps: there is no option 'routetemp'. Did you mean 'route_temp'?"),
        ("hydra/launcher=basic", "hydra/launcher: hydra/sweeper=plan sends through local or slurm"),
        ("launch.nodes=2", "launch.tasks_per_node: job 0"),
        (
            "trainer.parallel=fsdp trainer.expert_parallel=2",
            "trainer.expert_parallel = 2 needs as many ranks, and job 0 has 1",
        ),
    ],
)
def test_a_mistake_is_reported_before_anything_is_sent(start: Start, sweep: Path, mistake: str, told: str) -> None:
    process = start(*mistake.split())
    output, _ = process.communicate()
    assert process.returncode == 2
    assert told in output
    assert "Traceback" not in output
    assert not sweep.exists()


def test_a_dry_run_shows_the_plan_and_sends_nothing(start: Start, sweep: Path) -> None:
    process = start("schedule.route_temp.end=0.6,0.60,0.8", "launch.gpus=2", "launch.hours=3", "--dry-run")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "3 asked, 2 unique" in output
    assert "at most 12 GPU-hours" in output
    assert not sweep.exists()


@pytest.mark.parametrize("command", ["status", "wait", "resume", "cancel", "report"])
def test_a_folder_without_a_sweep_is_reported(tmp_path: Path, command: str) -> None:
    result = after(tmp_path, command)
    assert result.returncode == 2
    assert "there is no sweep here" in result.stderr
    assert "Traceback" not in result.stderr
