"""YAML of other hands: limits, tags and errors, with the place in the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apt_launch.config.yaml_file import load_yaml
from apt_model.errors import ConfigError
from tests.forks import run_module

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "line 5, column 45: more than 100000 values"),
        (BOMB.replace("[x", "{k: [x", 1).replace("x]\n", "x]}\n", 1), "more than 100000 values"),
        ("a: &a [*a]\n", "line 1, column 8: the alias *a names nothing that ends before it"),
        ("seed: !!python/object/apply:os.system [x]\n", "line 1, column 7: the tag"),
        ("x:\n  - !include x\n", "line 2, column 5: the tag '!include' has no place"),
        ("a: 1\nb: [1,\n", "line 3, column 1: cannot be read as YAML"),
        ("a: 1\n\tb: 2\n", "line 2, column 1: cannot be read as YAML"),
        (
            "a: 1\na: 2\n",
            "line 2, column 1: cannot be read as YAML: while constructing a mapping, found duplicate key a",
        ),
        ("? [a]\n: 1\n", "line 1, column 3: cannot be read as YAML"),
        ("a: " + "[" * 60 + "]" * 60, "line 1, column 53: more than 50 levels"),
        ("a: " + "[" * 5000, "line 1, column"),
        ("a: \x00\n", "line 1, column 4: cannot be read as YAML"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
        ("a: ${\n", "not a config"),
        ("#" * (1 << 20) + "\n", "larger than 1 MiB"),
        ("- 1\n", "line 1, column 1: no mapping"),
        (b"a: \xe9\n", "no UTF-8 at byte 3"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_place(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as refused:
        load_yaml(path)
    assert str(refused.value).startswith(str(path))
    assert message in str(refused.value)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path,
        tmp_path / "pipe",
        Path("/dev/zero"),
        Path("x" * 300),
        Path("/proc/self/mem"),
        Path("/proc/x"),
    ):
        with pytest.raises(ConfigError, match="profile_file: "):
            load_yaml(path, "profile_file")


def test_aliases_and_plain_tags_are_taken(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {x: 1, y: 3e-5}\nb: {<<: *a, y: !!str 2}\nc: *a\n")
    assert load_yaml(tmp_path / "x.yaml")[1] == {
        "a": {"x": 1, "y": 3e-5},
        "b": {"x": 1, "y": "2"},
        "c": {"x": 1, "y": 3e-5},
    }


def test_commands_end_with_2_and_the_place(tmp_path: Path) -> None:
    (tmp_path / "theirs" / "experiment").mkdir(parents=True)
    for name, content in (("bomb", BOMB), ("tag", "seed: !x 1\n"), ("cut", "seed: [\n")):
        (tmp_path / "theirs" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{content}")
    for name, *arguments in (("bomb",), ("tag", "--multirun", "seed=0,1"), ("cut", "--dry-run")):
        ended = run_module("apt_launch", "--config-dir", "theirs", f"+experiment={name}", *arguments, cwd=tmp_path)
        assert (ended.returncode, f"experiment/{name}.yaml, line " in ended.stderr) == (2, True), ended
        assert "Traceback" not in ended.stderr
    for module in ("apt_launch", "apt_launch.preview"):
        ended = run_module(module, "--config-dir", "x" * 300, cwd=tmp_path)
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
