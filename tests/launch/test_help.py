"""``--help`` and ``--version``: what they say is so, at every width, and quickly."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from importlib import metadata

import pytest

from apt_launch.cli.completion import answer
from apt_launch.cli.help import COMMON, EXAMPLES, LESS_COMMON, show
from apt_launch.config.load import composed as compose
from apt_launch.config.menu import COMMANDS, entry_point, groups, keys
from tests.forks import environment, run_module


@pytest.fixture(params=[60, 80, 140])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(request.param))
    show()
    told = capsys.readouterr().out
    commands = [command for _, command in EXAMPLES]
    assert max(len(line) for line in told.splitlines() if line.strip() not in commands) <= request.param
    return told


def test_every_option_of_every_group_is_there(shown: str) -> None:
    words = set(re.findall(r"[\w/+]+", shown))
    for name, group in groups().items():
        if name not in LESS_COMMON:
            assert name in words or f"+{name}" in words
            assert set(group.options) <= words


def test_every_key_and_command_is_there_and_exists(shown: str) -> None:
    unfolded = shown.replace(" ", "").replace("\n", "")
    assert set(COMMON) <= set(keys())
    assert all(key in unfolded for key in COMMON)
    assert all(importlib.util.find_spec(module) and f"python-m{module}" in unfolded for module in COMMANDS)


def test_the_example_commands_compose() -> None:
    for _, command in EXAMPLES:
        words = shlex.split(command)
        assert words[:2] == ["python", "-m"]
        overrides = [
            word.split(",")[0] for word in words if "=" in word and "sweeps" not in word and "hydra." not in word
        ]
        assert compose(overrides).horizon.steps == 256
        flags = [word for word in words[3:] if word.startswith("-")]
        assert set(flags) <= {*answer(f"python -m {words[2]} -"), "--multirun"}


def test_a_key_that_the_help_shows_has_the_value_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    show()
    told = capsys.readouterr().out
    assert "schedule.route_temp.end=0.8" in told
    assert "trainer.max_epochs=8" in told
    config = compose([])
    assert config.schedule.route_temp is not None
    assert (config.schedule.route_temp.end, config.trainer.max_epochs) == (0.8, 8)


def test_help_loads_neither_torch_nor_hydra_and_has_no_colours_in_a_pipe() -> None:
    code = (
        "import sys; sys.argv[1:] = ['schedule=none', '--help']; from apt_launch.__main__ import main; main(); "
        "print(*sys.modules, file=sys.stderr)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert not {"torch", "hydra", "omegaconf", "pydantic"} & set(told.stderr.split())
    assert told.stdout.startswith("apt-launch ")
    assert "\x1b" not in told.stdout


def test_the_version_names_what_is_installed() -> None:
    told = run_module("apt_launch", "--version")
    versions = {package: metadata.version(package) for package in ("torch", "hydra-core")}
    assert told.returncode == 0
    assert told.stdout.startswith("apt-launch 0.1.0 (")
    assert all(f"{package} {version}" in told.stdout for package, version in versions.items())


@pytest.mark.parametrize("module", [*COMMANDS])
def test_every_command_has_help_that_fits(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = importlib.import_module(entry_point(module)).parser().format_help()
    assert f"usage: python -m {module} " in told
    assert max(len(line) for line in told.splitlines() if not line.startswith("  python -m")) <= 80
    for command in re.findall(r"^  python -m apt_launch(?:\.\w+)? (.*)$", told, flags=re.MULTILINE):
        overrides = [
            word for word in shlex.split(command) if "=" in word and "data." not in word and "data=" not in word
        ]
        assert compose([word.split(",")[0] for word in overrides if "vocab" not in word]).horizon.steps > 0
