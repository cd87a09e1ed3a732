"""Output that takes little: pipes that are closed, and encodings with few characters."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt_launch.command_line import CLOSED, ending, take_any_character
from apt_launch.planning import gather
from tests.conftest import SMALL
from tests.forks import HANGS, Fork, environment


@pytest.fixture
def arguments(text_file: Path) -> list[str]:
    return [*SMALL, "data=text", f"data.path={text_file}", "logger=none"]


def test_an_encoding_with_few_characters_is_no_reason_to_fail(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "apt_launch", "--dry-run", *arguments, "schedule=gpt5_moe"]
    variables = environment(PYTHONIOENCODING="ascii")
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=HANGS, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "route_temp" in result.stdout
    assert (result.stdout + result.stderr).isascii()


def test_what_an_encoding_has_not_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    take_any_character()
    print("é ▁ \udc80", flush=True)
    assert written.getvalue() == b"\xe9 ? ?\n"


@pytest.mark.parametrize(
    "command",
    [
        ["apt_launch.sweep", "status", "sweep"],
        ["apt_launch.sweep", "status", "--json", "sweep"],
        ["apt_launch", "--help"],
        ["apt_launch", "--cfg", "job"],
    ],
)
def test_a_closed_pipe_ends_a_command_quietly(arguments: list[str], tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "sweep").mkdir()
    if "sweep" in command:
        gather([*arguments, "seed=1,2"]).write(tmp_path / "sweep")
    reading, writing = os.pipe()
    os.close(reading)
    with Fork(command, cwd=tmp_path, env=environment(), stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        _, told = process.communicate()
    assert told == ""
    assert process.returncode == CLOSED


def test_a_pipe_of_another_kind_is_not_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokenPipeError), ending():
        raise BrokenPipeError("of a program that was asked something")
