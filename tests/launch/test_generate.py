"""The command that makes text from a run's checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.forks import run_module


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole curriculum; its text is gone."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("to be or not to be\n" * 400)
    done = run_module("apt_launch", *SMALL, "data=text", f"data.path={text}", "hydra.run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    text.unlink()
    return folder / "run"


def test_text_comes_from_the_newest_checkpoint_with_the_modules_of_its_time(trained: Path) -> None:
    arguments = ["--prompt", "to be", "--prompt", "or", "--num-samples", "2", "--max-new-tokens", "30", "--json"]
    first, again = (run_module("apt_launch.generate", str(trained), *arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["to be", "to be", "or", "or"]
    assert all(row["tokens"] <= 30 for row in rows)
    assert rows[0]["text"] != rows[1]["text"]
    assert first.stdout == again.stdout, "the seed says what is drawn"
    assert "step-00000024 (moe + align + voter)" in first.stderr
    assert "% voted on" in first.stderr


def test_the_voter_can_be_left_out_and_its_threshold_moved(trained: Path) -> None:
    arguments = [str(trained), "--prompt", "to", "--max-new-tokens", "5"]
    off = run_module("apt_launch.generate", *arguments, "--voter", "off")
    never = run_module("apt_launch.generate", *arguments, "--vote-threshold", "99")
    assert "voted on" not in off.stderr
    assert ", 0% voted on" in never.stderr
    assert off.stdout == never.stdout


def test_a_damaged_checkpoint_is_passed_over_and_said(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    (newest / "model.safetensors").write_bytes(b"damaged")
    told = run_module("apt_launch.generate", str(run), "--prompt", "to", "--max-new-tokens", "2")
    assert told.returncode == 0, told.stderr
    assert f"{newest.name} is damaged" in told.stderr
    named = run_module("apt_launch.generate", str(newest), "--prompt", "to")
    assert (named.returncode, named.stderr.count("\n")) == (2, 1), named.stderr
    assert "is damaged" in named.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--prompt", "a"], "RUN_DIR: there is no checkpoint in 'nowhere/checkpoints'"),
        ([".", "--max-new-tokens", "0"], "--prompt: there is none"),
        ([".", "--prompt", "a", "--num-samples", "0"], "--num-samples = 0 must be 1 or more"),
        ([".", "--prompt-file", "nothing"], "--prompt-file: "),
        (["RUN", "--prompt", "a", "--top-p", "2"], "top-p = 2.0"),
        (["RUN", "--prompt", "a", "--device", "gpu"], "--device = 'gpu' is not one of auto, cpu, cuda"),
    ],
)
def test_mistakes_are_reported_in_words(trained: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    arguments = [str(trained) if argument == "RUN" else argument for argument in arguments]
    done = run_module("apt_launch.generate", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
