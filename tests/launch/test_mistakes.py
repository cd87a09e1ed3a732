"""Mistakes on the command lines of commands that compose no run: exit 2, no traceback, and nothing left behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import apt_launch
from apt_model.errors import ConfigError
from tests.sweep.test_interpolations import option_of_somebody_else

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

LONG = "x" * 300
HUGE = "9" * 30

MISTAKES: dict[str, tuple[str, ...]] = {
    "a file for a sweep": ("sweep", "report", "file"),
    "a file for a sweep to look at": ("sweep", "status", "file"),
    "too long a name for a sweep": ("sweep", "status", LONG),
    "too long a name for a delivery": ("sync", LONG),
    "a file for a delivery": ("sync", "file"),
    "too long a name for a run": ("generate", LONG, "--prompt", "a"),
    "too long a name for prompts": ("generate", ".", "--prompt-file", LONG),
    "a folder for prompts": ("generate", ".", "--prompt-file", "."),
    "a device for prompts": ("generate", ".", "--prompt-file", "/dev/zero"),
    "too low a temperature": ("generate", ".", "--prompt", "a", "--temperature", "1e-300"),
    "too great a seed": ("generate", ".", "--prompt", "a", "--seed", "18446744073709551616"),
    "a device that computes nothing": ("generate", ".", "--prompt", "a", "--device", "meta"),
    "too many samples": ("generate", ".", "--prompt", "a", "--num-samples", HUGE),
    "no threshold": ("generate", ".", "--prompt", "a", "--vote-threshold", "nan"),
    "too large a vocabulary": ("tokenize", "out", "--train-tokenizer", HUGE),
    "too large a file of tokens": ("tokenize", "out", "--shard-tokens", HUGE),
    "the folder that one is in": ("tokenize", "."),
    "the folder above": ("tokenize", ".."),
    "too long a name for shards": ("tokenize", LONG),
    "a place where no folder can be made": ("preview", "--out", "/proc/x"),
    "too long a name for pictures": ("preview", "--out", LONG),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_2_and_leaves_nothing(cli: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    command, *arguments = MISTAKES[name]
    result = cli(*arguments, module=f"apt_launch.{command}")
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["/proc/x", "/proc/x/y", "/sys/x", LONG, f"new/{LONG}", f"{LONG}/new"], ids=range(6))
@pytest.mark.parametrize("given", [("hydra.run.dir",), ("hydra.sweep.dir", "--multirun", "seed=0,1")])
def test_a_folder_that_cannot_be_made_is_named_with_its_key(
    cli: Cli, tmp_path: Path, place: str, given: tuple[str, ...]
) -> None:
    key, *more = given
    result = cli(*more, f"{key}={place}")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {key}: "), line
    assert place[:50] in line
    assert re.search(r"(Choose|choose) (another|a shorter)", line)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named_by_hydras_own_sweeper_and_in_python(cli: Cli, tmp_path: Path) -> None:
    result = cli("--multirun", "hydra/sweeper=basic", "hydra/launcher=basic", "hydra.sweep.dir=/proc/x")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert "error: /proc/x: No such file or directory" in result.stderr
    with pytest.raises(ConfigError, match=r"^hydra\.run\.dir: the folder /proc/x cannot be made: No such file"):
        apt_launch.run(["hydra.run.dir=/proc/x"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "override",
    [
        *(
            "+hydra.job.env_set.OMP_NUM_THREADS=1",
            "hydra.job.env_copy=[OMP_NUM_THREADS]",
            "hydra.job.chdir=true",
            "hydra.output_subdir=null",
        ),
        *(
            "hydra.output_subdir=other",
            "hydra.sweep.subdir=a",
            "hydra/job_logging=none",
            "hydra.job_logging.root.level=DEBUG",
        ),
    ],
)
def test_what_a_sweep_would_drop_in_silence_is_refused_while_planning(cli: Cli, tmp_path: Path, override: str) -> None:
    result = cli("--multirun", "seed=0,1", override, "hydra.sweep.dir=sweep")
    key = (
        override.lstrip("+")
        .split("=")[0]
        .replace("env_set.OMP_NUM_THREADS", "env_set")
        .replace("/", ".")
        .removesuffix(".root.level")
    )
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert f"{key}: jobs of a sweep" in result.stderr
    assert not list(tmp_path.iterdir())


DROPPED = {
    "hydra.job_logging": "hydra: {job_logging: {root: {level: DEBUG}}}",
    "hydra.verbose": "hydra: {verbose: true}",
    "hydra.job.chdir": "hydra: {job: {chdir: true}}",
    "hydra.output_subdir": "hydra: {output_subdir: other}",
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_an_option_of_somebody_else_brings_is_refused_for_a_sweep_too(cli: Cli, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "experiment").mkdir(parents=True)
    (theirs / "experiment" / "best.yaml").write_text(f"# @package _global_\n{DROPPED[name]}\n")
    given = ("--config-dir", "theirs", "+experiment=best")
    for result in (
        cli("--multirun", *given, "seed=0,1"),
        cli("--dry-run", *given, "seed=0,1"),
        cli(*given, "--multirun", module="apt_launch.preview"),
    ):
        assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
        assert f"{name}: jobs of a sweep" in result.stderr
    assert cli(*given, "--out", "out", module="apt_launch.preview").returncode == 0  # a run alone obeys it
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "out"}


@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("apt_launch", ()),
        ("apt_launch", ("--cfg", "job", "--resolve")),
        ("apt_launch", ("--multirun", "seed=0,1")),
        ("apt_launch", ("--dry-run",)),
        ("apt_launch.preview", ()),
    ],
)
def test_every_command_refuses_interpolations_without_an_end(
    cli: Cli, tmp_path: Path, module: str, more: tuple[str, ...]
) -> None:
    option_of_somebody_else(tmp_path)
    ended = cli("--config-dir", "theirs", *more, "data=bomb", module=module)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert "error: data.suffix: more than" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
