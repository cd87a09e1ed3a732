"""Completion: what is offered, and that real shells take it: bash, zsh and fish."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from apt_launch.cli.completion import answer, script
from apt_launch.config import schema
from apt_launch.config.menu import CONF, groups, keys
from apt_launch.values import flatten
from apt_model.schedule import Anneal
from tests.forks import HANGS, environment, run_module
from tests.packages import needed

ROUTE_TEMP = [f"schedule.route_temp.{key}=" for key in ("by", "end", "start", "type", "warmup")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("apt-launch sch", ["schedule.", "schedule="]),
        ("apt-launch profile=", ["profile=gpt5_moe_reasoning", "profile=gpt_100m", "profile=tiny_debug"]),
        ("apt-launch schedule=gpt5_moe,n", ["schedule=gpt5_moe,none"]),
        ("apt-launch schedule.r", ["schedule.route_temp."]),
        ("apt-launch schedule.route_temp.", ROUTE_TEMP),
        ("apt-launch schedule.route_temp.end=", ["schedule.route_temp.end=0.8"]),
        ("apt-launch schedule.route_temp.type=c", ["schedule.route_temp.type=cosine"]),
        ("apt-launch seed=1 moe.shared_expert=", ["moe.shared_expert=false", "moe.shared_expert=true"]),
        ("apt-launch data.su", []),  # not a key of data=stdlib ...
        ("apt-launch data=text data.su", ["data.suffix="]),  # ... but of this
        ("apt-launch profile=gpt5_moe_reasoning data.train", ["data.train_path="]),
        ("apt-launch trainer=hf trainer.gra", ["trainer.grad_clip="]),
        ("apt-launch hydra/launcher=slurm hydra.launcher.part", ["hydra.launcher.partition="]),
        ("apt-launch +sweeps=ro", ["+sweeps=route_temp"]),
        ("apt-launch --mu", ["--multirun"]),
        ("apt-launch --cfg j", ["job"]),
        ("apt-launch -sc install=z", ["install=zsh"]),
        ("python -m apt_launch seed", ["seed="]),
        ("x=1 .venv/bin/python3 -m apt_launch seed", ["seed="]),
        ("python -m apt_launch.sw", ["apt_launch.sweep"]),
        ("python -m apt_launch.sweep re", ["replay", "report", "resume"]),
        ("python -m apt_launch.sweep report --m", ["--maximize", "--metric", "--minimize"]),
        ("python -m apt_launch.preview --g", ["--gpu", "--gpus"]),
        ("python -m apt_launch.preview seed", ["seed="]),
        ("python -m apt_launch.generate runs --voter o", ["off", "on"]),
        ("python -m http.server ", []),
        ("apt-launch 'unfinished", []),
    ],
)
def test_a_line_is_completed(line: str, expected: list[str]) -> None:
    assert answer(line) == expected


def test_files_are_offered_where_a_key_holds_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "table.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert answer("apt-launch data=text data.path=t") == ["data.path=table.txt", "data.path=texts/"]
    assert answer("python -m apt_launch.sweep status t") == ["table.txt", "texts/"]
    assert answer("apt-launch --config-dir te") == ["texts/"]


def test_what_yaml_says_a_key_may_be_is_what_its_schema_takes() -> None:
    checked = set()
    for name, schemas in schema.GROUPS.items():
        for option in groups()[name].options:
            values = yaml.safe_load((CONF / name / f"{option}.yaml").read_text(encoding="utf-8"))
            for field, about in (schemas.get(values["_target_"]) or schema.OWN[name]).model_fields.items():
                if values.get(field) is None:  # not for the user to choose: model=pretrained takes it from its folder
                    continue
                allowed = get_args(about.annotation)
                key = f"{name}.{field}"
                if get_origin(about.annotation) is Literal and len(allowed) > 1:
                    assert set(keys({name: option})[key].choices) == set(allowed), key
                    checked.add(key)
    assert {"model.attention", "moe.router", "trainer.parallel", "trainer.on_nonfinite", "logger.mode"} <= checked
    assert set(keys()["schedule.align_weight.type"].choices) == set(get_args(Anneal.model_fields["type"].annotation))


def chosen() -> list[tuple[str, str]]:
    return [(name, option) for name, group in groups().items() for option in group.options if "sweeps" not in name]


@pytest.mark.parametrize(("group", "option"), chosen())
def test_the_keys_are_those_that_hydra_composes(group: str, option: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=[f"{group}={option}"])
    everything = flatten(cast("dict[str, Any]", OmegaConf.to_container(composed)))
    settable = {key for key in everything if not key.endswith("_target_") and key != "profile"}
    assert {key for key in keys({group: option}) if not key.startswith("hydra.")} == settable


def test_no_group_is_missing() -> None:
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}
    folders |= {f"sweeps/{path.parent.name}" for path in (CONF / "sweeps").glob("*/*.yaml")}
    assert set(groups()) == folders - {".", "sweeps/wandb"} | {"sweeps"}  # those are for W&B's own command
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for name, group in groups().items():
            assert set(group.options) <= set(loader.get_group_options(name))


def test_a_completion_is_quick_and_loads_no_library_that_is_not() -> None:
    code = (
        "import sys; from apt_launch.cli.completion import answer; answer('apt-launch schedule.r'); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert not {"torch", "hydra", "omegaconf", "pydantic", "rich", "yaml"} & set(loaded.stdout.split())


def test_a_shell_that_is_unknown_is_reported() -> None:
    result = run_module("apt_launch", "-sc", "install=ksh")
    assert result.returncode == 2
    assert result.stderr == (
        "error: -sc install=ksh: there is no such completion. Say install= or uninstall=, then bash, zsh or fish.\n"
    )


# --- real shells -------------------------------------------------------------------------------------------------------


class Terminal:
    """A shell at a terminal."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.environ |= {"TERM": "dumb", "PS1": "> ", "HOME": str(folder)}
            os.execv(command[0], command)
        self.seen = ""

    def type(self, keys: str, until: Callable[[str], bool]) -> str:
        """Type ``keys``; return what was shown since, once ``until`` says that it is all."""
        os.write(self.terminal, keys.encode())
        seen, end = "", time.monotonic() + HANGS
        while not until(seen):
            assert time.monotonic() < end, f"typed {keys!r}, and saw {seen!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                seen += os.read(self.terminal, 4096).decode(errors="replace")
        return seen

    def close(self) -> None:
        """Hang up."""
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture(params=["bash", "zsh"])
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    plain = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[request.param]
    (tmp_path / "script").write_text(script(f"install={request.param}"))
    terminal = Terminal([needed(request.param), *plain], tmp_path)
    terminal.type("source ./script; echo rea''dy\n", lambda seen: "ready" in seen)
    yield terminal
    terminal.close()


@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("apt-launch trainer.max_ep", "trainer.max_epochs="),
        ("apt-launch schedule=g", "schedule=gpt5_moe "),
        ("apt-launch seed=1 schedule.route_temp.e", "schedule.route_temp.end="),
        ("apt-launch seed=1 schedule.route_temp.end=", "schedule.route_temp.end=0.8 "),
        ("python -m apt_launch +sweeps=ro", "+sweeps=route_temp "),
        ("python3 -m apt_launch.sweep repo", "report "),
        ("python -m apt_launch.ge", "apt_launch.generate "),
    ],
)
def test_a_tab_completes(terminal: Terminal, typed: str, becomes: str) -> None:
    whole = typed[: typed.rindex(" ") + 1] + becomes
    terminal.type(f"{typed}\t", lambda seen: whole in seen.replace("\r", "").replace("\x07", ""))


def test_a_second_tab_lists_what_is_left(terminal: Terminal) -> None:
    terminal.type(
        "apt-launch schedule.route_temp.\t\t", lambda seen: all(key.split(".")[-1] in seen for key in ROUTE_TEMP)
    )


def test_python_without_us_completes_as_before(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "some_script.py").touch()
    terminal.type("python some_\t", lambda seen: "python some_script.py" in seen)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("apt-launch schedule.route_temp.", ROUTE_TEMP),
        ("apt-launch profile=", ["profile=gpt5_moe_reasoning", "profile=gpt_100m", "profile=tiny_debug"]),
        ("python -m apt_launch seed=1 trainer.max_ep", ["trainer.max_epochs="]),
        ("python -m apt_launch.sweep re", ["replay", "report", "resume"]),
    ],
)
def test_fish_completes(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script("install=fish"))
    command = [needed("fish"), "--no-config", "-c", f"source {tmp_path}/script; complete -C '{line}'"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS, env=environment())
    assert [found.split("\t")[0] for found in result.stdout.splitlines()] == expected
