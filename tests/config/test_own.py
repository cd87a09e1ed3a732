"""A config names what a package of the user's defines, where the user says so, and nothing else of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from apt_launch import allow
from apt_launch.allow import VARIABLE, allowed, allowing, take_flags
from apt_launch.config import own
from apt_launch.config.instantiate import factory
from apt_launch.config.run_config import RunConfig
from apt_model.errors import ConfigError

PARTS = """
import contextlib, functools, os, subprocess
from os import system
from subprocess import Popen

import torch

from torch.optim import SGD

run = os.system
bound = functools.partial(os.system, "touch victim")
Renamed = subprocess.Popen
nameless = lambda x: x


class Lion(SGD):
    def __init__(self, params, lr: float = 0.1, weight_decay: float = 0.0, beta: float = 0.9, names: tuple[int, int] = (1, 2)):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=beta)


class Below(Lion):
    pass


def make(params, lr: float, weight_decay: float = 0.0):
    return SGD(params, lr=lr, weight_decay=weight_decay)


class Meta(type):
    def __new__(cls, name, bases, space):
        return subprocess.Popen


class Made(metaclass=Meta):
    pass


class Lying(type):
    __module__ = property(lambda self: "my_lab.parts")
    __name__ = property(lambda self: "Lion")


Shown = Lying("Shown", (subprocess.Popen,), {})


class Taken:
    pass


Taken = subprocess.Popen


def replaced():
    pass


replaced = os.system


@functools.lru_cache
def cached():
    pass


@contextlib.contextmanager
def wrapped():
    yield
"""


@pytest.fixture
def my_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of somebody's, which nobody allows yet."""
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").write_text("from my_lab.parts import Below\nfrom subprocess import Popen\n")
    (tmp_path / "my_lab" / "parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    for name in [name for name in sys.modules if allow.covers("my_lab", name)]:
        del sys.modules[name]


def refusal(target: str) -> str:
    with pytest.raises(ConfigError) as refused:
        own.find(target, "optimizer._target_")
    return str(refused.value)


# --- whose word it is ----------------------------------------------------------------------------------------------------


def test_the_flag_may_come_again_and_is_for_processes_started_from_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "there")
    assert take_flags(["a=1", "--allow", "one", "-m", "--allow=two,three.parts"]) == ["a=1", "-m"]
    assert allowed() == ("there", "one", "two", "three.parts")
    assert allow.word() == "there,one,two,three.parts"
    assert allow.flags() == [*("--allow", "there", "--allow", "one", "--allow", "two"), "--allow", "three.parts"]


@pytest.mark.parametrize("given", ["", "os", "subprocess.x", "a-b", "../x", "hydra_plugins", "a;b", "torch nn"])
def test_what_is_no_package_of_ones_own_cannot_be_allowed(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ConfigError, match=r"--allow"):
        take_flags(["--allow", given])
    if given:
        monkeypatch.setenv(VARIABLE, given)
        with pytest.raises(ConfigError, match=VARIABLE):
            allowed()


def test_a_word_for_one_run_in_this_process_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with allowing(["my_lab"]):
        assert allowed() == ("my_lab",)
    assert allowed() == ()


def test_an_installed_distribution_may_allow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "my_lab-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my_lab\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[apt_launch.allow]\nmine = my_lab.parts\nevil = os\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    allow._of_entry_points.cache_clear()
    try:
        assert allowed() == ("my_lab.parts",)
    finally:
        monkeypatch.undo()
        allow._of_entry_points.cache_clear()


# --- what it covers ------------------------------------------------------------------------------------------------------


def test_without_a_word_nothing_is_imported_and_the_flag_is_told(my_lab: None) -> None:
    said = refusal("my_lab.parts.Lion")
    assert said.startswith("optimizer._target_: 'my_lab.parts.Lion' may not be built here.")
    assert said.endswith("say so: --allow my_lab.")
    assert "my_lab" not in sys.modules
    assert "--allow" not in refusal("os.system")


def test_what_a_package_defines_is_built(my_lab: None) -> None:
    with allowing(["my_lab"]):
        for target in ("my_lab.parts.Lion", "my_lab.parts.Below", "my_lab.Below", "my_lab.parts.make"):
            made = factory({"_target_": target, "lr": 0.5})([torch.nn.Parameter(torch.zeros(2))])
            assert made.param_groups[0]["lr"] == 0.5
    with pytest.raises(ConfigError, match="may not be built"):
        factory({"_target_": "my_lab.parts.Lion"})


HOSTILE = {
    **dict.fromkeys(
        ("my_lab.Popen", "my_lab.parts.Renamed", "my_lab.parts.Made", "my_lab.parts.Taken"), "class subprocess.Popen"
    ),
    **dict.fromkeys(("my_lab.parts.run", "my_lab.parts.system", "my_lab.parts.replaced"), "builtin_function"),
    "my_lab.parts.Shown": "the class my_lab.parts.Shown",
    "my_lab.parts.SGD": "the class torch.optim.sgd.SGD",
    "my_lab.parts.bound": "the type partial",
    "my_lab.parts.cached": "_lru_cache_wrapper",
    "my_lab.parts.wrapped": "a function of contextlib",
    "my_lab.parts.nameless": "a function of my_lab.parts",
    "my_lab.parts.__builtins__": "the type dict",
    "my_lab.parts.os.system": "cannot be imported",
    "my_lab.parts.torch.load": "cannot be imported",
    "my_lab.parts.Lion.__init__": "cannot be imported",
    "my_lab.parts.Lin": "Did you mean 'Lion'",
    "my_lab.nowhere.X": "Start the command in the folder that holds my_lab",
    **dict.fromkeys(
        ("my_labs.X", "os.system", "torch.load", "my_lab", "my_lab..parts.Lion", "my_lab.parts. Lion"),
        "may not be built here",
    ),
}


@pytest.mark.parametrize("target", HOSTILE)
def test_what_a_package_only_has_is_refused(my_lab: None, tmp_path: Path, target: str) -> None:
    with allowing(["my_lab"]):
        assert HOSTILE[target] in refusal(target)
        with pytest.raises(ConfigError):
            factory({"_target_": target})
    assert not (tmp_path / "victim").exists()


def test_names_that_classes_and_modules_are_given_later_do_not_help(
    my_lab: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with allowing(["my_lab"]):
        own.find("my_lab.parts.Lion", "x")
        parts = sys.modules["my_lab.parts"]
        for name in ("Stranger", "Lion"):
            stranger = type(name, (subprocess.Popen,), {"__init__": lambda self: None})  # a function of this module
            stranger.__module__ = "my_lab.parts"
            monkeypatch.setattr(parts, name, stranger, raising=False)
            assert "is not what my_lab defines" in refusal(f"my_lab.parts.{name}")


# --- parameters ----------------------------------------------------------------------------------------------------------


def test_parameters_are_checked_against_the_signature(my_lab: None, small: Callable[..., RunConfig]) -> None:
    given = ["optimizer=own", "optimizer._target_=my_lab.parts.Lion", "optimizer.lr=0.1"]
    with allowing(["my_lab"]):
        config = small(*given, "+optimizer.beta=1", "+optimizer.names=[1,2]", "optimizer.weight_decay=0.01")
        assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.1, 0.01)
        with pytest.raises(ConfigError) as wrong:
            small(
                *given, "+optimizer.bta=1", "+optimizer.names=[1]", "+optimizer.params=[]", "+optimizer._partial_=true"
            )
    with pytest.raises(ConfigError, match=r"say so: --allow my_lab"):
        small(*given)
    assert [*wrong.value.problems] == [
        "optimizer.bta: unknown key: Lion takes no such parameter. Did you mean 'beta'? To leave it out: ~optimizer.bta",
        "optimizer.names: [1] is not valid: field required.",
        "optimizer.params: Lion is given it by the launcher. Leave it out.",
        "optimizer._partial_: a config may not set it here. Leave it out.",
    ]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("+optimizer.amsgrad=true", None),
        ("+optimizer.amsgrad=1", "optimizer.amsgrad: 1 is not valid: input should be a valid boolean"),
        ("+optimizer.amsgrd=true", "optimizer.amsgrd: unknown key."),
        ("optimizer=sgd", None),
        ("optimizer=adafactor", None),
        ("optimizer=muon", None),
        ("optimizer._target_=torch.optim.NAdam", "optimizer.fused: unknown key: NAdam takes no such parameter"),
        ("optimizer._target_=torch.optim.Nadam", "has no optimizer 'Nadam'. Did you mean 'NAdam'"),
        ("optimizer._target_=torch.optim.LBFGS", "LBFGS cannot train here"),
        ("optimizer._target_=torch.optim.lr_scheduler.StepLR", "may not be built here"),
        ("model._target_=torch.optim.SGD", "may not be built here"),
    ],
)
def test_torchs_optimizers_need_no_word(small: Callable[..., RunConfig], override: str, told: str | None) -> None:
    if told is None:
        assert small(override).optimizer.lr > 0
        return
    with pytest.raises(ConfigError) as refused:
        small(override)
    assert told in str(refused.value)
