"""Sweeps on a real cluster: everything that a cluster does to a job, and what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt_launch.lease import read_holder
from tests.conftest import SMALL, until
from tests.forks import Fork, environment
from tests.hold import Hold
from tests.launch.test_shared_updates import assert_as_if_alone
from tests.slurm.cluster import NODES, Cluster

LONG = (
    *("trainer.max_epochs=12", "trainer.log_every=1", "schedule=none", "trainer.validation_batches=1"),
    *("trainer.checkpoint_every_epochs=2", "trainer.keep_last=2"),
)
"""Overrides of a run of 48 updates, the first checkpoint after the eighth."""


class Sweep:
    """A sweep sent to ``cluster``, with what a user would call."""

    def __init__(self, cluster: Cluster, folder: Path, base: list[str]) -> None:
        self.cluster = cluster
        self.folder = folder
        self.base = base
        self.env = environment() | {"SLURM_CONF": cluster.environment()["SLURM_CONF"]}
        self.holding: Hold
        self.forked = False
        """Whether jobs are forked where libraries are loaded: for what becomes of jobs, not of their processes."""
        self.cwd: Path | None = None

    def hold(self, at: int = 11) -> None:
        r"""Have each process hold in its ``at``\ th update; those of ``LONG`` then have a checkpoint and are within an epoch."""
        self.holding = Hold(self.folder.with_name("hold"), at)
        self.env |= self.holding.environment | {"PYTHONPATH": str(Path(__file__).parent.parent / "hold_site")}

    def holds(self, number: int) -> bool:
        """Whether the job runs and holds, and, if it is to have one, its checkpoint is written."""
        if not list(self.folder.glob(f"{number}-*/lease.json")) or self.written(number)["state"] != "running":
            return False  # an attempt that has asked for another has left its lease
        own = self.own(number)
        holder = read_holder(own / "lease.json")
        if holder is None or holder.pid not in self.holding.holding():
            return False
        return not self.rows(number) or any((own / "checkpoints").glob("step-*"))

    def let_go_again(self, number: int) -> None:
        """Let the processes go on once the job has come to another attempt."""
        until(lambda: self.written(number)["restarts"], "another attempt")
        self.holding.let_go()

    def command(self, *overrides: str) -> list[str]:
        sent = ["--multirun", "hydra/launcher=slurm", "launch.gpus=0", *self.base, f"hydra.sweep.dir={self.folder}"]
        return ["apt_launch", *sent, *overrides]

    def send(self, *overrides: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        result = self.run(*self.command(*overrides))
        assert result.returncode == code, result.stdout + result.stderr
        return result

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with Fork(command, cwd=self.cwd, env=self.env, forks=self.forked, **pipes) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.wait(), out, err)

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        name, *rest = command
        return self.run("apt_launch.sweep", name, str(self.folder), *rest)

    def jobs(self) -> dict[int, dict[str, Any]]:
        return {row["number"]: row for row in map(json.loads, self.call("status", "--json").stdout.splitlines())}

    def own(self, number: int) -> Path:
        return next(self.folder.glob(f"{number}-*"))

    def written(self, number: int) -> dict[str, Any]:
        return json.loads((self.own(number) / "state.json").read_text())

    def log(self, number: int) -> str:
        path = self.own(number) / "log.txt"
        return path.read_text() if path.exists() else ""

    def rows(self, number: int) -> list[dict[str, Any]]:
        record = self.own(number) / "metrics.jsonl"
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    def steps(self, number: int) -> list[int]:
        return [row["step"] for row in self.rows(number) if "train/loss" in row]

    def finishes_whole(self, number: int, attempts: int = 2, updates: int = 48) -> None:
        """Check that the job comes to its end, each update once, after ``attempts`` at least."""
        assert self.call("wait").returncode == 0, self.log(number)
        assert self.steps(number) == list(range(updates))
        assert self.written(number)["restarts"] >= attempts - 1
        assert self.log(number).count("resuming") >= attempts - 1


@pytest.fixture
def at(text_file: Path, tmp_path: Path) -> Callable[[Cluster], Sweep]:
    return lambda cluster: Sweep(cluster, tmp_path / "sweep", [*SMALL, "data=text", f"data.path={text_file}"])


@pytest.fixture
def sweep(cluster: Cluster, at: Callable[[Cluster], Sweep]) -> Sweep:
    return at(cluster)


def test_an_array_of_eight_loses_only_the_job_that_fails_and_the_one_that_dies(sweep: Sweep) -> None:
    sweep.forked = True
    sweep.env["MY_SERVICE_TOKEN"] = secret = "c4n4ry-0123456789abcdef-c4n4ry"
    rates = ",".join(["0.001", "0.0011", "0.0012", "0.0013", "0.0014", "0.0015", "0.0016", "1e30"])
    sweep.hold(at=1)
    told = sweep.send(
        f"optimizer.lr={rates}", "optimizer.weight_decay=0", "schedule=none", "trainer.max_epochs=3"
    ).stdout
    assert "8 asked, 8 unique" in told
    assert f"apt_launch.sweep status {sweep.folder}" in told
    arrays = {row["job_id"].split("_")[0] for row in sweep.jobs().values()}
    assert len(arrays) == 1
    until(lambda: sweep.holds(0), "job 0 to hold")
    holder = read_holder(sweep.own(0) / "lease.json")
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    sweep.holding.let_go()
    assert sweep.call("wait").returncode == 1

    jobs = sweep.jobs()
    assert {number: row["state"] for number, row in jobs.items()} == {0: "failed", 7: "failed"} | dict.fromkeys(
        range(1, 7), "done"
    )
    sweep.cluster.wait_until(lambda: not sweep.cluster.run("squeue", "-h").stdout.strip(), "the queue to be empty")
    slurm = sweep.cluster.states()
    (array,) = arrays
    assert slurm[f"{array}_7"] == slurm[f"{array}_0"] == "FAILED"
    assert {slurm[f"{array}_{number}"] for number in range(1, 7)} == {"COMPLETED"}
    assert "loss is" in jobs[7]["cause"] or "norm is" in jobs[7]["cause"]
    assert "Traceback" in sweep.log(7)

    assert sweep.call("resume").returncode == 0
    assert sweep.call("wait").returncode == 1
    states = {number: row["state"] for number, row in sweep.jobs().items()}
    assert states == {7: "failed"} | dict.fromkeys(range(7), "done")

    files = [path for path in sweep.folder.rglob("*") if path.is_file()]
    assert {".sh", ".pkl", ".out"} <= {path.suffix for path in files}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert [path for path in (sweep.folder, *files) if path.stat().st_mode & 0o077] == []


@pytest.mark.slow
def test_a_time_limit_makes_a_checkpoint_and_another_attempt(sweep: Sweep) -> None:
    sweep.hold()
    sweep.send("seed=0", *LONG, "launch.time_limit_minutes=60", "hydra.launcher.signal_delay_s=15")
    until(lambda: sweep.holds(0), "the job to hold")
    # the limit comes to the job, however long that took to hold; in minutes, and SLURM may be 30 s early
    job = sweep.written(0)["job_id"]
    elapsed = sweep.cluster.run("squeue", "-h", "-j", job, "-o", "%M").stdout.strip().split(":")
    limit = int(elapsed[-2]) + (1 if int(elapsed[-1]) < 15 else 2)
    sweep.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    until(lambda: sweep.written(0)["restarts"], "another attempt")
    sweep.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    sweep.holding.let_go()
    sweep.finishes_whole(0)
    assert "SIGUSR2" in sweep.log(0)


INTERRUPTIONS = {name: ("scancel", f"--signal={name}") for name in ("USR1", "USR2", "TERM")}
INTERRUPTIONS["requeue"] = ("scontrol", "requeue")


def test_each_signal_and_a_requeue_make_a_checkpoint_and_another_attempt(sweep: Sweep) -> None:
    sweep.hold()
    sweep.send("seed=0", *LONG)
    for restarts, command in enumerate(INTERRUPTIONS.values()):
        until(lambda restarts=restarts: sweep.written(0)["restarts"] == restarts and sweep.holds(0), "the job to hold")
        sweep.cluster.run(*command, sweep.written(0)["job_id"])
    until(lambda: sweep.written(0)["restarts"] == len(INTERRUPTIONS), "the last attempt")
    sweep.holding.let_go()
    sweep.finishes_whole(0, attempts=len(INTERRUPTIONS) + 1)
    assert sweep.written(0)["restarts"] == len(INTERRUPTIONS)


@pytest.mark.parametrize("warned", [True, False])
def test_a_preempted_job_continues_whether_it_was_warned_or_not(
    make_cluster: Callable[..., Cluster], at: Callable[[Cluster], Sweep], warned: bool
) -> None:
    cluster = make_cluster(grace_seconds=10 if warned else 0, signal_on_preemption=warned)
    sweep = at(cluster)
    sweep.forked = True
    sweep.hold()
    sweep.send("seed=0", *LONG)
    until(lambda: sweep.holds(0), "the job to hold")
    cluster.run("sbatch", "-p", "high", "-N2", "--exclusive", "--mem=0", "-o/dev/null", "--wrap=sleep 1")
    sweep.let_go_again(0)
    sweep.finishes_whole(0)


@pytest.mark.slow
def test_a_node_that_dies_loses_no_job_and_comes_back(sweep: Sweep) -> None:
    sweep.hold()
    sweep.send("seed=0", *LONG)
    until(lambda: sweep.holds(0), "the job to hold")
    node = sweep.cluster.run("squeue", "-h", "-o", "%N").stdout.strip()
    assert node in NODES
    sweep.cluster.fail_node(node)
    sweep.let_go_again(0)
    sweep.finishes_whole(0)
    sweep.cluster.start_node(node)
    sweep.cluster.wait_until(lambda: sweep.cluster.node_is_idle(node), f"{node} to be idle")


def test_a_controller_that_is_away_at_submission_is_waited_for_and_a_loser_stops_itself(sweep: Sweep) -> None:
    sweep.forked = True
    sweep.cluster.stop_controller()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    stop = ("launch.stop.rungs=[25%]", "hydra.launcher.max_parallel=1", "schedule=none", "trainer.lr_schedule=null")
    command = sweep.command("optimizer.lr=0.01,1e-9", *stop)
    sending = Fork(command, env=sweep.env, forks=sweep.forked, **pipes)
    assert sending.stderr is not None
    try:
        assert "does not answer; trying again" in sending.stderr.readline()
    finally:
        sweep.cluster.start_controller()
    output, errors = sending.communicate()
    assert sending.returncode == 0, errors
    assert sweep.call("wait").returncode == 0
    (array,) = {row["job_id"].split("_")[0] for row in sweep.jobs().values()}
    sweep.cluster.wait_until(lambda: not sweep.cluster.run("squeue", "-h").stdout.strip(), "the queue to be empty")
    slurm = {name: state for name, state in sweep.cluster.states().items() if name.split("_")[0] == array}
    assert array in output
    assert slurm == {f"{array}_{number}": "COMPLETED" for number in (0, 1)}
    # the command that sent them has ended: the second has stopped itself
    assert {number: row["state"] for number, row in sweep.jobs().items()} == {0: "done", 1: "stopped"}
    assert max(sweep.steps(1)) < 12


def test_a_controller_that_stays_away_is_reported(sweep: Sweep) -> None:
    sweep.cluster.stop_controller()
    try:
        told = sweep.send("seed=0,1", "hydra.launcher.retry_minutes=0", code=2).stderr
    finally:
        sweep.cluster.start_controller()
    assert "hydra.launcher: SLURM's controller does not answer" in told
    assert "Traceback" not in told


def test_a_controller_that_goes_away_makes_states_unknown_and_kills_nothing(sweep: Sweep) -> None:
    sweep.forked = True
    sweep.hold()
    sweep.send("seed=0", *LONG)
    until(lambda: sweep.holds(0), "the job to hold")
    sweep.cluster.stop_controller()
    try:
        told = sweep.jobs()[0]
        assert told["state"] == "unknown"
        assert "SLURM does not answer" in told["cause"]
    finally:
        sweep.cluster.start_controller()
    assert sweep.jobs()[0]["state"] == "running"
    sweep.holding.let_go()
    assert sweep.call("wait").returncode == 0
    assert sweep.jobs()[0]["state"] == "done"


def test_cancel_leaves_nothing_on_the_cluster_and_resume_continues(sweep: Sweep) -> None:
    sweep.forked = True
    sweep.hold()
    sweep.send("seed=range(0,6)", *LONG)
    until(lambda: sweep.holds(0), "the first job to hold")
    assert sweep.call("cancel").returncode == 0
    assert not sweep.cluster.run("squeue", "-h").stdout.strip()
    assert {row["state"] for row in sweep.jobs().values()} == {"cancelled"}
    holder = read_holder(sweep.own(0) / "lease.json")
    assert holder is None or not holder.alive
    assert any((sweep.own(0) / "checkpoints").glob("step-*"))


def test_more_jobs_than_an_array_may_have_go_in_several(
    make_cluster: Callable[..., Cluster], at: Callable[[Cluster], Sweep]
) -> None:
    sweep = at(make_cluster(max_array_size=3))
    sweep.forked = True
    told = sweep.send("seed=range(0,5)", "trainer.max_epochs=1", "schedule=none").stdout
    assert [line.split(": ")[1].split(",")[0] for line in told.splitlines() if line.startswith("SLURM job")] == [
        "2 jobs",
        "2 jobs",
        "1 job",
    ]
    assert sweep.call("wait").returncode == 0
    assert {row["state"] for row in sweep.jobs().values()} == {"done"}


def test_jobs_of_different_resources_go_in_arrays_of_their_own_and_may_name_what_their_sender_allows(
    sweep: Sweep, tmp_path: Path
) -> None:
    sweep.forked = True
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "slurm_lab.py").write_text("import torch\n\n\nclass Mine(torch.optim.AdamW):\n    pass\n")
    sweep.cwd = tmp_path / "lab"
    own = ("optimizer=own", "optimizer._target_=slurm_lab.Mine", "optimizer.lr=0.001")
    few = ("launch.gpus=1,4", "seed=0,1", "trainer.max_epochs=1", "schedule=none")
    told = sweep.send("--allow", "slurm_lab", *own, *few).stdout
    assert told.count("SLURM job") == 2
    assert sweep.call("wait").returncode == 0, sweep.log(0)
    assert "slurm_lab.Mine" in (sweep.own(0) / "config.yaml").read_text()
    for row in sweep.jobs().values():
        provenance = json.loads((Path(row["folder"]) / "provenance.json").read_text())
        wanted = int(next(o for o in row["overrides"] if o.startswith("launch.gpus")).split("=")[1])
        assert len(provenance["visible_gpus"].split(",")) == wanted


@pytest.mark.parametrize("accounting", [False, True])
def test_a_job_that_died_unseen_is_unknown_without_accounting_and_failed_with_it(
    make_cluster: Callable[..., Cluster], at: Callable[[Cluster], Sweep], accounting: bool
) -> None:
    cluster = make_cluster(accounting=accounting, min_job_age=2)
    sweep = at(cluster)
    sweep.forked = True
    sweep.hold()
    sweep.send("seed=0,1", *LONG)
    until(lambda: sweep.holds(0) and sweep.holds(1), "two jobs to hold")
    for number in (0, 1):
        holder = read_holder(sweep.own(number) / "lease.json")
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)
    cluster.wait_until(lambda: not cluster.states(), "SLURM to forget them")
    told = sweep.jobs()
    assert {row["state"] for row in told.values()} == {"failed" if accounting else "unknown"}
    assert ("FAILED" if accounting else "no accounting") in told[0]["cause"]
    assert sweep.call("wait").returncode == 1


def test_four_ranks_on_two_nodes_train_one_model(sweep: Sweep) -> None:
    sweep.send(
        "seed=0",
        "launch.nodes=2",
        "launch.tasks_per_node=2",
        "trainer.batch_size=8",
        "trainer.max_batches_per_epoch=2",
        "trainer.log_every=1",
        "trainer.parallel=fsdp",
        "trainer.expert_parallel=2",
        "launch.drill=true",
    )
    assert sweep.call("wait").returncode == 0, sweep.log(0)
    assert sweep.steps(0)[-1] == 11
    assert "bit for bit" in sweep.log(0)
    assert len(list(sweep.own(0).glob("log-*.txt"))) == 3


def test_jobs_begin_with_the_updates_of_one_that_still_runs_and_are_planned_again_if_it_fails(
    sweep: Sweep, tmp_path: Path
) -> None:
    sweep.hold()
    ends = ("schedule.route_temp.end=0.6,0.8", "schedule.align_weight.end=0.1,0.3")  # updates 8 and 12 begin to differ
    sent = sweep.send(*ends, "launch.share=true").stdout
    assert "4 jobs, 96 updates asked, 64 trained: 33 % less" in sent
    assert sent.count("once job 0 has made their first updates") == 1  # an array of two
    until(lambda: sweep.holds(0), "job 0 to hold after update 8 and before update 12")
    until(lambda: list(sweep.folder.glob("2-*/graft.json")), "job 2 to begin")
    until(lambda: list(sweep.folder.glob("3-*/graft.json")), "job 3 to begin with what job 2 has made")
    assert sweep.jobs()[1]["state"] == "pending"
    holder = read_holder(sweep.own(0) / "lease.json")
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    until(lambda: sweep.written(1)["state"] == "planned", "job 1 to be planned again")
    assert "job 0, whose first 12 updates it shares," in sweep.written(1)["cause"]
    sweep.holding.let_go()
    assert sweep.call("wait").returncode == 1
    states = {number: row["state"] for number, row in sweep.jobs().items()}
    assert states == {0: "failed", 1: "planned", 2: "done", 3: "done"}

    assert sweep.call("resume", "--wait").returncode == 0, sweep.log(0) + sweep.log(1)
    assert {row["state"] for row in sweep.jobs().values()} == {"done"}
    assert_as_if_alone(sweep.folder, [1, 3], tmp_path)


def test_other_sweepers_wait_and_get_true_results(sweep: Sweep) -> None:
    sweep.forked = True
    told = sweep.send(
        "hydra/sweeper=basic", "optimizer.lr=0.001,1e30", "optimizer.weight_decay=0", "schedule=none", code=1
    )
    assert {number: row["state"] for number, row in sweep.jobs().items()} == {0: "done", 1: "failed"}
    assert "Traceback" not in told.stderr


def test_what_slurm_refuses_is_said_in_its_words(sweep: Sweep) -> None:
    told = sweep.send("seed=0,1", "hydra.launcher.partition=gpus", code=2).stderr
    assert "hydra.launcher: SLURM refuses" in told
    assert "partition" in told
