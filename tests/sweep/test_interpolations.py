"""A config whose interpolations stand for more than any config has is refused with its key, at once, wherever it is resolved."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import apt_launch
from apt_launch import interpolations
from apt_launch.config.load import composed
from apt_launch.interpolations import DEEPEST, MOST_RESOLVED, bounded
from apt_launch.planning import gather
from apt_model.errors import ConfigError

STAGES = 40


def doubling(
    first: str, value: Callable[[str], Any] = lambda below: f"${{{below}}}${{{below}}}"
) -> list[tuple[str, Any]]:
    """Keys and values, each of which stands for the next one twice."""
    names = [first, *(f"k{number}" for number in range(STAGES))]
    return [*((name, value(below)) for name, below in pairwise(names)), (names[-1], "x")]


def test_what_a_config_may_have_is_left_alone() -> None:
    chain = {f"k{n}": f"${{k{n + 1}}}" for n in range(DEEPEST - 1)} | {f"k{DEEPEST - 1}": "end"}
    wide = {f"w{n}": "${one} and ${one}" for n in range(MOST_RESOLVED // 10)} | {"one": 1}
    cfg = OmegaConf.create(chain | wide)
    with bounded():
        found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    assert (found["k0"], found["w7"]) == ("end", "1 and 1")


BOMBS: dict[str, tuple[dict[str, object], str]] = {
    "text": (dict(doubling("a")), "interpolations stand for each other"),
    "text, five times wider": (
        {"a": "${b}" * 20, "b": "${c}" * 20, "c": "${d}" * 20, "d": "${e}" * 20, "e": "x"},
        "interpolations are resolved",
    ),
    "by oc.select": (dict(doubling("a", lambda b: f"${{oc.select:{b}}}${{oc.select:{b}}}")), "stand for each other"),
    "by oc.decode": (
        {"a": "${oc.decode:${b}}", "b": "${c}${c}", "c": "${d}" * 60, "d": "${e}" * 60, "e": "${f}" * 60, "f": "1"},
        "interpolations are resolved",
    ),
    "mappings": (
        dict(doubling("a", lambda b: {"x": f"${{{b}}}", "y": f"${{{b}}}"})),
        "interpolations are resolved",
    ),
    "mappings around": ({"a": {"x": "${b}"}, "b": {"x": "${a}", "y": "${a}"}}, "interpolations"),
    "a long list, many times": ({"a": ["${b}"] * 4000, "b": list(range(2000))}, "stand for more than 5000 values"),
    "a long text, many times": ({"a": "${b}" * 400, "b": "x" * 20_000}, "stand for more than 5000 values"),
    "a text that is long to read": ({"a": "${b}" * 501, "b": "x"}, "in a text of more than 2000 characters"),
    "a text that is made to be read": (
        {"a": "${oc.decode:${b}}", "b": "[${c}]", "c": "1," * 2000},
        "in a text of more than 2000 characters",
    ),
    "many texts": (
        {f"k{n}": f"{n:04}" * 400 + "${x}" for n in range(80)} | {"x": 1},
        "more than 100000 characters together",
    ),
    "a long chain": ({f"k{n}": f"${{k{n + 1}}}" for n in range(500)} | {"k500": 1}, "stand for each other"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_its_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolations, "MOST_RESOLVED", 500)
    monkeypatch.setattr(interpolations, "MOST_VALUES", 5000)
    values, message = BOMBS[name]
    cfg = OmegaConf.create(values)
    with pytest.raises(ConfigError, match=message) as caught, bounded():
        OmegaConf.to_container(cfg, resolve=True)
    key, _, told = str(caught.value).partition(": ")
    assert key.split(".")[0].split("[")[0] in values
    assert told.endswith("Write the value out.")


def test_who_does_without_the_value_is_not_left_in_the_dark() -> None:
    cfg = OmegaConf.create(dict(doubling("a")))
    with pytest.raises(ConfigError, match=r"^a: more than"), bounded():
        assert OmegaConf.select(cfg, "a", throw_on_resolution_failure=False) is None
    with bounded():  # what is counted is counted anew
        assert OmegaConf.create({"a": "${b}", "b": 1}).a == 1


def option_of_somebody_else(tmp_path: Path) -> Path:
    """Return a folder with an option data=bomb, whose suffix would double forty times."""
    (tmp_path / "theirs" / "data").mkdir(parents=True)
    lines = "".join(f"{key}: {value}\n" for key, value in doubling("suffix"))
    lines = lines.replace("${k", "${data.k")
    (tmp_path / "theirs" / "data" / "bomb.yaml").write_text(f"defaults: [text, _self_]\npath: .\n{lines}")
    return tmp_path / "theirs"


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return option_of_somebody_else(tmp_path)


def values_of_a_sweep(theirs: Path) -> object:
    bomb = [f"+{key}={value!r}" for key, value in doubling("first")[1:]]
    return gather([*bomb, "data=text", "data.path=.", "data.suffix='${k0}${k0}'", "seed=0,1"], theirs)


WAYS: dict[str, Callable[[Path], object]] = {
    "composing": lambda theirs: composed([f"hydra.searchpath=[file://{theirs}]", "data=bomb"]),
    "notebook": lambda theirs: apt_launch.run([f"hydra.searchpath=[file://{theirs}]", "data=bomb"]),
    "a sweep's plan": lambda theirs: gather(["data=bomb", "seed=0,1"], theirs),
    "a sweep's values": values_of_a_sweep,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_config_refuses_it(theirs: Path, way: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.suffix: more than"):
        WAYS[way](theirs)
    assert [path.name for path in theirs.parent.iterdir()] == ["theirs"]
