"""What a run shows, and where: a bar only where it can be drawn over, colours only where they belong."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from apt_launch.config.run_config import RunConfig
from apt_launch.runs.console import PlainLines, ProgressBar, progress_callback
from apt_launch.runs.folder import RunFolder
from apt_launch.runs.summary import suggest
from tests.forks import HANGS, environment
from tests.launch.test_cli import on_terminal, small

CHOICE = "from apt_launch.runs.console import progress_callback; print(type(progress_callback()).__name__)"


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"])
def test_a_log_has_plain_lines_also_where_colours_are_forced(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert isinstance(progress_callback(), PlainLines)


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"TERM": "xterm"}, "ProgressBar"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "ProgressBar"),
        ({"TERM": "dumb"}, "PlainLines"),
    ],
)
def test_a_terminal_that_can_redraw_has_a_bar(variables: dict[str, str], shown: str) -> None:
    parent, child = os.openpty()
    subprocess.run(
        [sys.executable, "-c", CHOICE], env=environment() | variables, stdout=child, check=True, timeout=HANGS
    )
    os.close(child)
    assert os.read(parent, 1000).decode().strip() == shown
    os.close(parent)


@pytest.mark.parametrize("no_color", [False, True])
def test_the_bar_has_colours_unless_they_are_unwanted(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    progress = ProgressBar(Console(file=file, force_terminal=True, width=90, color_system="standard")).progress
    progress.add_task("train", total=24, completed=12, epoch="3/6", numbers="loss 2.500  9,000 tok/s")
    progress.below = "moe enabled, " + ", ".join(f"a_long_name_{i} {i}" for i in range(9))
    progress.console.print(progress.get_renderable())
    shown = file.getvalue()
    assert bool(re.search(r"\x1b\[[\d;]*\b3[0-7]m", shown)) is not no_color
    upper, lower = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert re.fullmatch(r"epoch 3/6 [━╸╺]+ *12/24 loss 2\.500  9,000 tok/s -:--:-- left *", upper)
    assert lower.startswith("moe enabled, a_long_name_0 0, ")
    assert lower.rstrip().endswith("…")
    assert max(len(upper), len(lower)) <= 90


def test_a_dumb_terminal_gets_a_whole_run_without_a_control_character(text_file: Path, tmp_path: Path) -> None:
    shown, returncode = on_terminal(small(text_file), tmp_path, {"TERM": "dumb"}, fresh=True)
    assert returncode == 0
    assert "\x1b" not in shown
    assert "\r" not in shown.replace("\r\n", "")
    in_order = (
        "Loading torch ...",
        "parameters on cpu",
        "epoch 2, step 8: moe enabled",
        "done: 24 of 24",
        "What next?",
    )
    assert sorted(in_order, key=shown.index) == list(in_order)


def test_how_to_continue_is_the_whole_command(composed: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text(
        "- schedule=none\n- data.path=my texts\n- trainer.resume=auto\n"
    )
    assert folder.how_to_resume(composed()) == (
        f"Go on with: python -m apt_launch schedule=none 'data.path=my texts' hydra.run.dir={tmp_path} trainer.resume=auto"
    )


@pytest.mark.parametrize("option", ["lightning", "hf"])
def test_a_run_in_another_librarys_loop_goes_on_by_the_trainer_that_can(
    composed: Callable[..., RunConfig], tmp_path: Path, option: str
) -> None:
    config = composed(f"trainer={option}")
    how = RunFolder(tmp_path).resume_overrides(config)
    assert how[-1] == "trainer._target_=apt_model.training.trainer.Trainer"
    assert composed(f"trainer={option}", *how).trainer.target == "apt_model.training.trainer.Trainer"


def test_what_to_do_next_names_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suggest(RunFolder(tmp_path / "a run"))
    told = capsys.readouterr().out
    assert f"python -m apt_launch.generate '{tmp_path}/a run' --prompt 'def '" in told
    assert "\x1b" not in told
