"""What is printed as a command works as it stands, from a shell, in the folder of the command that printed it."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from apt_launch.commands import command, config_flags, for_all_ranks, override
from apt_launch.sweep.control.ledger import Ledger
from apt_launch.sweep.jobs.state import transition
from tests.conftest import SMALL, until
from tests.forks import Fork, environment, run_module
from tests.hold import Hold

NAMES = [
    "a",
    "lr (1), b",
    "it's",
    'a "b"',
    "null",
    "1e3",
    "a\\",
    'a\\"b',
    "{x}",
    "[1]",
    "k=v",
    "#a",
    "~/b",
    "ü/é",
    "a\tb",
    "$a",
]


@pytest.mark.parametrize("name", [*NAMES, *(f"runs/{name}" for name in NAMES), *(f"/tmp/{name}/x" for name in NAMES)])
def test_a_folder_of_any_name_is_read_back_by_the_shell_and_by_hydra(name: str) -> None:
    line = command("apt_launch", override("hydra.run.dir", name))
    assert line.startswith("python -m apt_launch ")
    echoed = subprocess.run(["bash", "-c", f"printf %s {line.split(' ', 3)[3]}"], capture_output=True, check=True)
    parsed = OverridesParser.create().parse_override(echoed.stdout.decode())
    assert str(parsed.value()) == name


def test_a_plain_name_is_left_alone() -> None:
    assert command("apt_launch", override("data.path", "out"), "a b") == "python -m apt_launch data.path=out 'a b'"


def test_an_interpolation_in_a_name_is_none() -> None:
    assert override("data.path", "a/${oc.env:HOME}") == 'data.path="a/\\${oc.env:HOME}"'


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--config-dir", "my conf", "a=1"], ["--config-dir", "my conf"]),
        (
            ["--config-d=x", "-m", "-cn", "y", "hydra.searchpath=[file://z]"],
            ["--config-dir", "x", "--config-name", "y"],
        ),
        (["--multirun", "--cfg", "job", "a=--config-dir"], []),
    ],
)
def test_flags_that_say_where_configs_are_are_kept(given: list[str], kept: list[str]) -> None:
    searched = [one for one in given if one.startswith("hydra.searchpath")]
    assert config_flags(given) == kept + searched


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
NODES = {"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("known", "line", "remark"),
    [
        ({}, "python -m apt_launch 'a b'", ""),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1"}, "python -m apt_launch 'a b'", ""),
        (TORCHRUN, "python -m torch.distributed.run --nproc-per-node 2 --standalone -m apt_launch 'a b'", ""),
        (
            TORCHRUN | NODES,
            "python -m torch.distributed.run --nproc-per-node 2 --nnodes 2 --node-rank 0 --master-addr n1 --master-port 29500 "
            "-m apt_launch 'a b'",
            ", on each node with its own --node-rank",
        ),
        ({"WORLD_SIZE": "3"}, "python -m apt_launch 'a b'", ", by what started these 3 processes"),
    ],
)
def test_a_command_starts_as_many_ranks_as_there_are(known: dict[str, str], line: str, remark: str) -> None:
    assert for_all_ranks(["python", "-m", "apt_launch", "a b"], known) == (line, remark)


def own_options(folder: Path, text_file: Path) -> list[str]:
    """Return what names an option of the user's own."""
    (folder / "my conf" / "data").mkdir(parents=True)
    (folder / "my conf" / "data" / "mine.yaml").write_text(f"defaults: [text, _self_]\npath: {text_file}\n")
    return ["--config-dir", "my conf", "data=mine", *SMALL, "logger=none"]


def printed(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as it was printed."""
    python, dash, module, *arguments = shlex.split(line)
    assert (python, dash) == ("python", "-m")
    return run_module(module, *arguments, cwd=cwd)


def test_how_to_continue_and_what_next_work_as_they_are_printed(text_file: Path, tmp_path: Path) -> None:
    hold = Hold(tmp_path / "hold", at=9)
    given = [*own_options(tmp_path, text_file), 'hydra.run.dir="runs/lr (1), b"', "hydra.output_subdir=null", "seed=3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with Fork(["apt_launch", *given], cwd=tmp_path, env=environment(**hold.environment), **pipes) as process:
        until(hold.holding, "the run to hold")
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate()
    assert process.returncode == 130, told
    line = re.findall(r"Go on with: (.*)", told)[0]
    done = printed(line, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming" in done.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["lr (1), b"]
    assert not (tmp_path / "outputs").exists()
    summary = json.loads((tmp_path / "runs" / "lr (1), b" / "summary.json").read_text())
    assert (summary["state"], summary["steps"]) == ("done", 24)


def test_commands_of_a_sweep_work_as_they_are_printed(text_file: Path, tmp_path: Path) -> None:
    given = [*own_options(tmp_path, text_file), "trainer.max_epochs=1", "schedule=none", "hydra/launcher=local"]
    sent = run_module(
        "apt_launch", "--multirun", *given, "seed=1,2", 'hydra.sweep.dir="my sweeps/(1), b"', cwd=tmp_path
    )
    sweep = tmp_path / "my sweeps" / "(1), b"
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert run_module("apt_launch.sweep", "report", str(sweep), cwd=tmp_path).returncode == 0
    best = re.findall(r"```sh\n(.*)\n```", (sweep / "report" / "report.md").read_text())[0]
    composed = printed(f"{best} --cfg job --resolve", tmp_path)
    assert composed.returncode == 0, composed.stderr
    assert f"path: {text_file}" in composed.stdout

    again = run_module("apt_launch", "--multirun", *given, "seed=3", 'hydra.sweep.dir="my sweeps/(1), b"', cwd=tmp_path)
    assert again.returncode == 2
    line = re.findall(r"Continue it by: (.*), or choose another", again.stderr)[0]
    assert "Nothing to send" in printed(line, tmp_path).stdout
    assert {status.state for status in Ledger(sweep).statuses()} == {"done"}

    (elsewhere := tmp_path / "elsewhere").mkdir()
    last = sorted(sweep.glob("1-*"))[0]
    transition(last, "running")
    transition(last, "failed", cause="on purpose")
    resumed = run_module("apt_launch.sweep", "resume", "../my sweeps/(1), b", cwd=elsewhere)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert not list(elsewhere.iterdir())
    assert {status.state for status in Ledger(sweep).statuses()} == {"done"}
