"""The command as a user meets it: real processes, real signals, a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from apt_launch.record import read_rows
from apt_model.layers.backend import onednn_products
from apt_model.training.checkpoint import load, newest_intact
from tests.conftest import SMALL, until, wandb_records, wandb_rows
from tests.forks import HANGS, Fork, environment, run_fresh, run_module
from tests.hold import Hold

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def small(text_file: Path, *more: str) -> list[str]:
    return ["schedule=gpt5_moe", *SMALL, "data=text", f"data.path={text_file}", "hydra.run.dir=run", *more]


def told(folder: Path) -> list[dict[str, float]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows]


def test_who_multiplies_changes_a_result_by_its_last_digits_only(cli: Cli, text_file: Path, tmp_path: Path) -> None:
    found = []
    for folder, by_onednn in (("ours", "true"), ("theirs", "false")):
        result = cli(*small(text_file, f"trainer.onednn_products={by_onednn}", f"hydra.run.dir={folder}"))
        assert result.returncode == 0, result.stderr
        found.append((told(tmp_path / folder), json.loads((tmp_path / folder / "summary.json").read_text())))
    (ours, summary), (theirs, same) = found
    assert summary["identity"] == same["identity"]
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    assert summary["val/loss"] == pytest.approx(same["val/loss"], rel=1e-3)
    with onednn_products() as there:
        assert there == (ours != theirs)


def test_of_a_package_that_is_there_twice_the_one_that_is_imported_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "torch-99.1.dist-info").mkdir()
    (tmp_path / "torch-99.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 99.1\n")
    code = "from apt_launch.runs.provenance import packages; print(packages()['torch'])"
    assert run_fresh("-c", code, cwd=tmp_path).stdout == "99.1\n"  # the folder is the first that is looked into


def test_a_run_leaves_a_whole_folder_and_wandb_has_every_row(cli: Cli, text_file: Path, tmp_path: Path) -> None:
    result = cli(*small(text_file, "logger.mode=offline"))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        ".hydra",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "provenance.json",
        "schedule.png",
        "summary.json",
        "train.log",
        "wandb",
    }
    rows = read_rows(run / "metrics.jsonl")
    assert {"step", "epoch", "tokens", "time", "train/loss", "lr", "tokens_per_second"} <= rows[0].keys()
    assert next(row["step"] for row in rows if row.get("schedule/moe_enabled")) == 8

    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "done"
    assert summary["steps"] == 24
    assert summary["switched_on"]["moe"] == {"epoch": 2, "step": 8}
    assert summary["anneals"]["route_temp"] == {"first": 1.5, "last": 0.8}
    assert summary["final"]["val/loss"] == rows[-1]["val/loss"]
    assert summary["best"]["val/loss"] == min(row["val/loss"] for row in rows if "val/loss" in row)

    config = OmegaConf.load(run / "config.yaml")
    assert config.schedule.route_temp.end == 0.8
    assert config.data.seed == config.seed == 0
    assert (run / "schedule.png").read_bytes().startswith(b"\x89PNG")
    provenance = json.loads((run / "provenance.json").read_text())
    # a package's own metadata lack the build (+cpu, +cu130) that torch itself knows
    assert torch.__version__.startswith(provenance["packages"]["torch"].partition("+")[0])
    assert provenance["device"] == "cpu"
    assert "moe enabled" in (run / "train.log").read_text()

    kept: dict[int, dict[str, float]] = {}
    for row in rows:  # W&B has one row a step: what validation said joins the update's
        kept.setdefault(int(row["step"]), {}).update(row | {"trainer/step": row["step"]})
    seen = wandb_rows(wandb_records(next((run / "wandb").glob("offline-run-*"))))
    assert seen == [pytest.approx(row) for row in kept.values()]

    for line in (
        "epoch 2, step 8: moe enabled",
        "epoch 3, step 12: align enabled",
        "done: 24 of 24 steps",
        "run folder",
    ):
        assert line in result.stdout
    assert "route_temp" in result.stdout
    assert result.stderr == ""


def test_tensorboard_is_another_choice(cli: Cli, text_file: Path, tmp_path: Path) -> None:
    arguments = [argument for argument in small(text_file) if not argument.startswith("logger")]
    result = cli(*arguments, "logger=tensorboard")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule.rout_temp.end=1"], "schedule.rout_temp.end: unknown key. Did you mean 'schedule.route_temp.end'"),
        (["schedule.route_temp.power=2"], "schedule.route_temp.power: conf/ does not list this key. Write + before it"),
        (
            ["hydra.launcher.max_paralel=2"],
            "hydra.launcher.max_paralel: unknown key. Did you mean 'hydra.launcher.max_parallel'",
        ),
        (
            ["hydra/launcher=slurm", "hydra.launcher.additional_parameters={a: b}"],
            "hydra.launcher.additional_parameters: its entries are added one by one: +hydra.launcher.additional_parameters.a=",
        ),
        (["schedule=gpt5_mo"], "schedule: there is no option 'gpt5_mo'. Did you mean 'gpt5_moe'?"),
        (["trainer.max_epochs=3"], "schedule.enable_voter_at_epoch = 5 would never happen"),
        (["schedule.route_temp.end=["], "schedule.route_temp.end=[: not an override that Hydra understands"),
        (["data.path=ü folder x"], "If its value is text, quote it: 'data.path=\"ü folder x\"'"),
        (["trainer/lr=2"], "trainer/lr=2: the group takes the name of an option. Valid names: cosine, "),
        (["moe=null"], "moe=null: the group takes the name of an option. Valid names: "),
        (["--resolve"], "--resolve flag can only be used in conjunction"),
        (["hydra.run.dir=text.txt/x"], "hydra.run.dir: text.txt is a file, and a folder is wanted at text.txt/x"),
        (["--multirun", "--cfg", "job"], "Only one of --run, --multirun, --cfg"),
        (["profile_file=nowhere.yaml"], "profile_file: there is no file 'nowhere.yaml'"),
        (["trainer.resume=nowhere"], "trainer.resume: there is no checkpoint in 'nowhere/checkpoints'"),
    ],
)
def test_a_mistake_ends_with_exit_code_2_a_remedy_and_no_trace(
    cli: Cli, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text.txt").touch()
    result = cli(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_hydras_own_flags_keep_working(cli: Cli) -> None:
    resolved = cli("--cfg", "job", "--resolve", "schedule.route_temp.end=0.6")
    assert resolved.returncode == 0
    assert OmegaConf.create(resolved.stdout).schedule.route_temp.end == 0.6
    assert "gpt5_moe*, none" in cli("--help").stdout
    assert cli("--info", "searchpath").returncode == 0
    assert OmegaConf.create(cli("--cfg", "job", "profile=gpt5_moe_reasoning").stdout).moe.num_experts == 64


def test_a_second_run_over_the_first_is_refused_and_loses_nothing(cli: Cli, text_file: Path, tmp_path: Path) -> None:
    assert cli(*small(text_file, "schedule=none", "trainer.max_epochs=1")).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = cli(*small(text_file, "schedule=none", "trainer.max_epochs=1", "seed=1"))
    assert again.returncode == 2
    assert "hydra.run.dir: run already holds a run. Go on with it by trainer.resume=auto" in again.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before

    longer = cli(*small(text_file, "schedule=none", "trainer.max_epochs=2", "trainer.resume=auto"))
    assert longer.returncode == 2
    assert "schedule.on_horizon_change=rescale" in longer.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before

    other = cli(*small(text_file, "schedule=none", "trainer.max_epochs=1", "seed=1", "trainer.resume=auto"))
    assert other.returncode == 2
    assert "seed: the run in run was trained with 0, and a resume cannot change it to 1" in other.stderr


def test_a_run_that_fails_ends_with_exit_code_1_and_its_cause(cli: Cli, text_file: Path, tmp_path: Path) -> None:
    result = cli(*small(text_file, "optimizer.lr=1e30", "optimizer.weight_decay=0", "trainer.lr_schedule.warmup=0"))
    assert result.returncode == 1
    assert re.search(r"error: the (loss is|gradient's norm is) (nan|inf) at epoch 0, step \d", result.stderr)
    assert "Traceback" not in result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["state"] == "failed"
    assert "at epoch 0, step" in summary["cause"]


class Started:
    """A run in a process of its own whose output can be awaited."""

    def __init__(self, arguments: list[str], folder: Path, env: dict[str, str]) -> None:
        self.output = ""
        self.process = Fork(
            ["apt_launch", *arguments],
            cwd=folder,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{self.output}")

    def end(self) -> int:
        assert self.process.stdout is not None
        self.output += self.process.stdout.read()
        return self.process.wait()

    def clean_up(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    all_started: list[Started] = []

    def start(arguments: list[str], hold: Hold) -> Started:
        all_started.append(Started(arguments, tmp_path, hold.environment))
        return all_started[-1]

    yield start
    for started in all_started:
        started.clean_up()


LONG = ("trainer.max_batches_per_epoch=6", "trainer.log_every=10", "logger.mode=offline", "trainer.batch_size=1")
"""Overrides of 36 updates, the experts from the thirteenth on."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_continues_to_the_same_weights_and_rows(
    cli: Cli, start: Callable[..., Started], text_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole = cli(*small(text_file, *LONG, "hydra.run.dir=whole", "logger.mode=disabled"))
    assert whole.returncode == 0, whole.stderr

    hold = Hold(tmp_path / "hold", at=15)
    started = start(small(text_file, *LONG), hold)
    started.wait_for("moe enabled")
    until(hold.holding, "the run to hold")
    os.killpg(started.process.pid, number)  # as a terminal does: to the whole group
    assert started.end() == 130, started.output
    assert f"{number.name}: finishing this update and writing a checkpoint" in started.output
    assert "Traceback" not in started.output
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "interrupted"
    assert summary["steps"] == 15

    resumed = cli(*small(text_file, *LONG, "trainer.resume=auto"))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    assert json.loads((run / "summary.json").read_text())["state"] == "done"
    assert told(run) == told(tmp_path / "whole")
    ends = [load(newest_intact(folder / "checkpoints")[0])["model"] for folder in (run, tmp_path / "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    ids = {re.sub(r"^offline-run-\d+_\d+-", "", p.name) for p in (run / "wandb").glob("offline-run-*")}
    assert len(ids) == 1, "both parts are one run for W&B"


def test_a_second_signal_leaves_at_once(start: Callable[..., Started], text_file: Path, tmp_path: Path) -> None:
    hold = Hold(tmp_path / "hold", at=1, deaf=True)  # the update that the first one would wait for never ends
    started = start(small(text_file), hold)
    until(hold.holding, "the run to hold")
    os.kill(started.process.pid, signal.SIGINT)
    started.wait_for("once more leaves at once")
    os.kill(started.process.pid, signal.SIGINT)
    assert started.end() == 130


def test_a_terminal_gets_a_progress_bar_with_the_curriculum(text_file: Path, tmp_path: Path) -> None:
    shown, returncode = on_terminal(small(text_file), tmp_path)
    assert returncode == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"epoch [1-6]/6 [━╸╺]+ *\d+/24 loss \d\.\d+", shown)
    assert "tok/s" in shown
    assert "moe + align" in shown
    assert "epoch 2, step 8: moe enabled" in shown


def on_terminal(
    arguments: list[str], folder: Path, variables: dict[str, str] | None = None, *, fresh: bool = False
) -> tuple[str, int]:
    """Run the command on a terminal; return what that showed, and the exit code. ``fresh``: torch is not loaded yet."""
    parent, child = pty.openpty()
    env = environment(**{"TERM": "xterm-256color", "COLUMNS": "100"} | (variables or {}))
    streams = {"stdin": child, "stdout": child, "stderr": child}
    command = ["apt_launch", *arguments]
    process: Fork | subprocess.Popen[bytes]
    if fresh:
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=env, **streams)
    else:
        process = Fork(command, cwd=folder, env=env, **streams)
    os.close(child)
    shown = b""
    while True:
        ready, _, _ = select.select([parent], [], [], HANGS)
        try:
            chunk = os.read(parent, 65536) if ready else b""
        except OSError:  # the other side is closed
            chunk = b""
        if not chunk:
            break
        shown += chunk
    os.close(parent)
    return shown.decode(errors="replace"), process.wait()


def test_nobody_reading_the_output_does_not_disturb_a_run(text_file: Path, tmp_path: Path) -> None:
    process = Fork(["apt_launch", *small(text_file)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait() == 0, told
    assert "Traceback" not in told
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "done"


def test_flags_may_stand_between_overrides(cli: Cli) -> None:
    shown = cli("seed=3", "--cfg", "job", "schedule.route_temp.end=0.7")
    assert OmegaConf.create(shown.stdout).schedule.route_temp.end == 0.7
    assert OmegaConf.create(shown.stdout).seed == 3


def test_hydras_own_sweeper_and_launcher_still_run_one_job_after_the_other(
    cli: Cli, text_file: Path, tmp_path: Path
) -> None:
    arguments = [argument for argument in small(text_file) if not argument.startswith("hydra.run.dir")]
    own = ("hydra/sweeper=basic", "hydra/launcher=basic")
    result = cli("--multirun", *own, *arguments, "hydra.sweep.dir=sweep", "schedule.route_temp.end=0.6,0.8")
    assert result.returncode == 0, result.stderr
    ends: dict[str, Any] = {}
    for job in ("0", "1"):
        summary = json.loads((tmp_path / "sweep" / job / "summary.json").read_text())
        ends[job] = summary["anneals"]["route_temp"]["last"]
    assert ends == {"0": 0.6, "1": 0.8}


def test_a_kept_sweep_is_found_by_its_name(cli: Cli) -> None:
    shown = cli("+sweeps=route_temp", "--cfg", "hydra", "--package", "hydra.sweeper")
    assert "schedule.route_temp.end: 0.6,0.8,1.0" in shown.stdout


def test_relative_paths_are_those_of_the_commands_folder_and_wandb_is_off_where_its_variable_says_so(
    text_file: Path, tmp_path: Path
) -> None:
    more = ("hydra.job.chdir=true", f"data.path={text_file.name}", "trainer.max_epochs=1", "schedule=none")
    variables = environment(WANDB_MODE="disabled")
    result = run_module("apt_launch", *small(text_file, *more, "logger.mode=offline"), cwd=tmp_path, env=variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "W&B: disabled, as WANDB_MODE=disabled says in the environment (logger.mode is offline)." in result.stdout
    assert not (tmp_path / "run" / "wandb").exists()
    wrong = run_module("apt_launch", *small(text_file, *more, "data.path=none", "hydra.run.dir=b"), cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "b").exists()
