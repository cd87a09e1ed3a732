"""Configs are judged as Hydra will act on them, however a value is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra._internal.hydra as internal
import pytest
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

from apt_launch.config.composing import config_loader
from apt_launch.config.explain import understood
from apt_launch.config.guard import installed
from apt_launch.config.instantiate import factory
from apt_launch.config.menu import CONF
from apt_launch.planning import gather
from apt_launch.sweep.plugins import register
from apt_model.errors import ConfigError

SECRET = "c4n4ry-0123456789abcdef"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of options of somebody else."""
    (tmp_path / "theirs" / "experiment").mkdir(parents=True)
    return tmp_path / "theirs"


@pytest.fixture
def loader(theirs: Path) -> Iterator[Any]:
    register()
    with installed(), config_loader(CONF, theirs) as loader:
        yield loader


def refusal(loader: Any, theirs: Path, text: str, mode: RunMode) -> str:
    """Return why an experiment with ``text`` is refused; empty: it is not."""
    (theirs / "experiment" / "best.yaml").write_text(f"# @package _global_\n{text}\n")
    try:
        loader.load_configuration("config", ["+experiment=best"], run_mode=mode)
    except Exception as error:
        explained = understood(error)
        if explained is None:
            raise
        return str(explained)
    return ""


def test_nothing_of_it_stays_in_a_process_that_has_planned() -> None:
    def judges() -> list[Any]:
        Plugins.instance()
        return [internal.ConfigLoaderImpl, SourcesRegistry.instance().types["file"], BaseContainer._resolvers["oc.env"]]

    before = judges()
    with installed():
        assert not set(map(id, judges())) & set(map(id, before))
    assert judges() == before
    with pytest.raises(HydraException, match="nowhere"):
        gather(["nowhere=1"])
    assert judges() == before


EVIL = "evil: {_target_: os.remove, path: victim}\n"

BUILT = {
    "a callback elsewhere": (EVIL + "hydra: {callbacks: {x: '${evil}'}}", "callbacks.x._target_: 'os.remove' may not"),
    "a callback, selected": (EVIL + "hydra: {callbacks: {x: '${oc.select:evil}'}}", "'os.remove' may not"),
    "a callback, created": ("hydra: {callbacks: {x: '${oc.create:{_target_: os.remove}}'}}", "'os.remove' may not"),
    "a callback, decoded": (
        "t: '{_target_: os.remove}'\nhydra: {callbacks: {x: '${oc.decode:${t}}'}}",
        "'os.remove' may",
    ),
    "a callback's target": (
        "t: os.remove\nhydra: {callbacks: {x: {_target_: '${t}'}}}",
        "'os.remove' may not be built",
    ),
    "all callbacks": ("t: {x: {_target_: os.remove}}\nhydra: {callbacks: '${t}'}", "'os.remove' may not be built"),
    "a callback's argument": ("hydra: {callbacks: {check_before_start: {path: x}}}", "takes no arguments"),
    "a partial callback": ("hydra: {callbacks: {check_before_start: {_partial_: true}}}", "takes no arguments"),
    "a callback that is text": ("hydra: {callbacks: {x: '\\${evil}'}}", "is no callback"),
    "the launcher's target": ("t: os.system\nhydra: {launcher: {_target_: '${t}'}}", "'os.system' may not be built"),
    "below the launcher": ("t: {_target_: os.system}\nhydra: {launcher: {more: ['${t}']}}", "'os.system' may not"),
    "the sweeper's values": (
        "t: {_target_: os.system}\nhydra: {sweeper: {params: '${oc.select:t}'}}",
        "'os.system' may",
    ),
    "a function of Optuna's": ("hydra: {sweeper: {custom_search_space: os.system}}", "may not name a function"),
    "a handler": (
        "t: {'()': os.system}\nhydra: {job_logging: {handlers: {x: '${t}'}}}",
        "'os.system' may not be built",
    ),
    "a handler's class": (
        "t: os.system\nhydra: {job_logging: {handlers: {file: {class: '${t}'}}}}",
        "'os.system' may not",
    ),
    "a formatter": ("hydra: {hydra_logging: {formatters: {x: '${oc.create:{\"()\": os.system}}'}}}", "refused"),
    "a filter": ("hydra: {job_logging: {filters: {x: {'()': os.system}}}}", "filters.x.(): a config may not set it"),
    "all of logging": ("t: {handlers: {x: {class: os.system}}}\nhydra: {hydra_logging: '${t}'}", "'os.system' may not"),
    "ext elsewhere": ("t: ext://hostile.x\nhydra: {job_logging: {root: {level: '${t}'}}}", "may not be reached"),
    "cfg in a list": ("hydra: {job_logging: {root: {handlers: ['cfg://handlers']}}}", "may not be reached"),
    "an attribute": ("hydra: {job_logging: {handlers: {file: {'.': {baseFilename: x}}}}}", "a config may not set it"),
    "a queue": ("hydra: {job_logging: {handlers: {file: {queue: os.system}}}}", "file.queue: a config may not set it"),
    "a file elsewhere": (
        "p: ../../x\nhydra: {job_logging: {handlers: {file: {filename: '${p}'}}}}",
        "no file in the run's",
    ),
    "a file above": (
        "hydra: {job_logging: {handlers: {file: {filename: '${hydra.run.dir}/../x.log'}}}}",
        "no file in the",
    ),
    "a run's own file": (
        "hydra: {job_logging: {handlers: {file: {filename: '${hydra.run.dir}/config.yaml'}}}}",
        "no file in",
    ),
    "a folder elsewhere": (
        "p: ../../x\nhydra: {output_subdir: '${p}'}",
        "hydra.output_subdir: '../../x' would lead out",
    ),
    "a name elsewhere": ("p: ../x\nhydra: {job: {name: '${oc.select:p}'}}", "hydra.job.name: '../x' would lead out"),
    "a subdir elsewhere": ("p: /x\nhydra: {sweep: {subdir: '${p}'}}", "hydra.sweep.subdir: '/x' would lead out"),
    "a home": (
        "hydra: {job: {env_set: {HOME: /tmp}}}",
        "env_set.HOME: a config may not set it. Export it in the shell",
    ),
    "a server": (
        "hydra: {job: {env_set: {WANDB_BASE_URL: https://x}}}",
        "env_set.WANDB_BASE_URL: a config may not set it",
    ),
    "a plugin of NCCL": (
        "hydra: {job: {env_set: {NCCL_NET_PLUGIN: ./x.so}}}",
        "env_set.NCCL_NET_PLUGIN: a config may not",
    ),
    "variables elsewhere": (
        "t: {HOME: /tmp}\nhydra: {job: {env_set: '${oc.create:${t}}'}}",
        "env_set.HOME: a config may not",
    ),
    "a copied variable": ("hydra: {job: {env_copy: [PATH]}}", "env_set.PATH: a config may not set it"),
    "a variable that is not there": ("hydra: {job: {env_copy: [NO_SUCH_X]}}", "'NO_SUCH_X' is not set here"),
    "a variable of two lines": ('hydra: {job: {env_set: {OMP_NUM_THREADS: "1\\n2"}}}', "is not one line of plain text"),
    "a folder of two lines": ('hydra: {run: {dir: "a\\nb"}}', "hydra.run.dir: 'a\\nb' has a line break"),
    "no value": (
        "a: '${b}'\nb: '${a}'\nhydra: {launcher: {max_parallel: '${a}'}}",
        "hydra.launcher: an interpolation has no",
    ),
    "a secret": ("hydra: {run: {dir: 'x/${oc.env:MY_TOKEN}'}}", "hydra.run.dir: it takes the secret MY_TOKEN"),
    "a secret, quoted": (
        "hydra: {run: {dir: \"x/${oc.env:'MY_TOKEN'}\"}}",
        "hydra.run.dir: it takes the secret MY_TOKEN",
    ),
    "a secret, escaped": ("hydra: {sweep: {dir: 'x/${oc.env:MY\\_TOKEN}'}}", "hydra.sweep.dir: it takes the secret"),
    "a secret, put together": (
        "n: TOKEN\nhydra: {sweep: {dir: 'x/${oc.env:MY_${n}}'}}",
        "hydra.sweep.dir: it takes the secret",
    ),
    "a secret with a number": (
        "n: PIN_TOKEN\nhydra: {sweep: {subdir: '${hydra.job.num}${oc.env:${n}}'}}",
        "secret PIN_TOKEN",
    ),
    "a secret elsewhere": (
        "n: TOKEN\nt: '${oc.env:MY_${n}}'\nhydra: {run: {dir: 'x/${t}'}}",
        "hydra.run.dir: it takes",
    ),
    "a secret in a name": (
        "n: TOKEN\nhydra: {job: {name: '${oc.decode:${oc.env:MY_${n}}}'}}",
        "hydra.job.name: it takes",
    ),
    "a secret in a line": (
        "n: TOKEN\nhydra: {launcher: {setup: ['x ${oc.env:MY_${n}}']}}",
        "hydra.launcher: it takes the",
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_what_hydra_acts_on_is_judged_after_interpolation(
    loader: Any, theirs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("PIN_TOKEN", "123")  # too short to be known by its value
    text, message = BUILT[name]
    for mode in (RunMode.RUN, RunMode.MULTIRUN):
        refused = refusal(loader, theirs, text, mode)
        assert (message if name != "a formatter" else "hydra") in refused, refused
        assert SECRET not in refused


@pytest.mark.parametrize(
    "text",
    [
        "level: DEBUG\nhydra: {job_logging: {root: {level: '${level}'}}}",
        "hydra: {job_logging: {handlers: {file: {class: logging.handlers.RotatingFileHandler, maxBytes: 9, mode: w}}}}",
        "hydra: {job_logging: {handlers: {console: {class: logging.StreamHandler, stream: ext://sys.stderr}}}}",
        "hydra: {job: {env_set: {OMP_NUM_THREADS: '2', CUDA_VISIBLE_DEVICES: '${oc.env:NO_SUCH_X,0}'}}}",
        "hydra: {run: {dir: 'runs/${now:%f}-${seed}'}, sweep: {subdir: '${hydra.job.num}-${hydra.job.override_dirname}'}}",
        "defaults: [{override /hydra/job_logging: default}, {override /hydra/hydra_logging: none}]",
        "defaults: [{override /hydra/sweeper: basic}, {override /hydra/launcher: basic}]",
    ],
)
def test_what_a_config_may_say_is_taken(loader: Any, theirs: Path, text: str) -> None:
    for mode in (RunMode.RUN, RunMode.MULTIRUN):
        assert refusal(loader, theirs, text, mode) == ""


def test_what_was_judged_keeps_its_value(loader: Any) -> None:
    taken = loader.load_configuration(
        "config",
        [
            "hydra/launcher=slurm",
            "hydra.launcher.qos='${now:%f}'",
            r"hydra.launcher.setup=['echo \${HOME}','x${seed}']",
        ],
        run_mode=RunMode.MULTIRUN,
    )
    values = OmegaConf.to_container(taken.hydra.launcher, resolve=True)
    assert OmegaConf.to_container(taken.hydra.launcher, resolve=False)["qos"] == values["qos"]
    assert values["qos"].isdecimal()
    assert values["setup"] == ["echo ${HOME}", "x0"]


def test_a_search_path_imports_no_package(loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_pkg.py").write_text("open('victim', 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for entry in ("pkg://hostile_pkg", "pkg://hostile_pkg/conf", "PKG://hostile_pkg"):
        with pytest.raises(ConfigError, match="would import a package of the config's choice"):
            loader.load_configuration("config", [f"hydra.searchpath=['{entry}']"], run_mode=RunMode.RUN)
    assert not (tmp_path / "victim").exists()
    loader.load_configuration("config", [f"hydra.searchpath=['file://{tmp_path}/theirs']"], run_mode=RunMode.RUN)


def test_text_of_a_group_stays_text(tmp_path: Path) -> None:
    hostile = f"${{oc.create:{{_target_: builtins.open, file: '{tmp_path}/victim', mode: w}}}}"
    made = factory({"_target_": "apt_model.gpt.GPT", "a": hostile, "b": [hostile], "c": {"d": hostile}})
    assert made.keywords == {"a": hostile, "b": [hostile], "c": {"d": hostile}}
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("mode", RunMode)
@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule=gpt5_moe", "hydra.verbose=true", "schedule.route_temp.end=0.7"],
        ["schedule.route_temp.end=0.6,0.8", "+experiment=best", "seed=1"],
        ["profile=???"],
        ["model.d_mode=3"],
    ],
    ids=["a run", "a sweep", "a group without an option", "a typing mistake"],
)
def test_what_was_composed_for_its_mode_is_what_hydra_composes_again(
    loader: Any, theirs: Path, overrides: list[str], mode: RunMode
) -> None:
    (theirs / "experiment" / "best.yaml").write_text(
        "# @package _global_\nmodel: {d_ff: 96}\nhydra: {job: {name: x}}\n"
    )

    def outcome(given: list[str]) -> object:
        try:
            return OmegaConf.to_container(loader.load_configuration("config", given, run_mode=mode))
        except Exception as error:
            return type(error), str(error)

    again, other = [*overrides, f"hydra.mode={mode.name}"], ["seed=5", f"hydra.mode={mode.name}"]
    expected = {id(given): outcome(given) for given in (again, other)}
    for given in ([again, again, other], [other, again, again]):
        with suppress(HydraException):  # as Hydra does, which then composes for the run to say what is wrong
            loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN, validate_sweep_overrides=False)
        assert [outcome(each) for each in given] == [expected[id(each)] for each in given]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule=none", "trainer=hf", "hydra/launcher=slurm"],
        ["+experiment=chosen", "seed=3"],
        ["+experiment=chosen", "optimizer=sgd", "~trainer/lr"],
        ["+experiment@model=best", "hydra.job.name=x"],
    ],
)
def test_what_is_merged_once_is_what_hydra_merges(theirs: Path, overrides: list[str]) -> None:
    (theirs / "experiment" / "chosen.yaml").write_text(
        "# @package _global_\ndefaults: [best@model, {data: '${experiment}'}, _self_, {override /optimizer: muon}]\nseed: 2\n"
    )
    (theirs / "experiment" / "best.yaml").write_text("d_ff: 96\n")
    (theirs / "experiment" / "data").mkdir()
    (theirs / "experiment" / "data" / "chosen.yaml").write_text("# @package _global_\nsaid_by: {its: name}\n")
    register()

    def composed() -> tuple[Any, ...]:
        with config_loader(CONF, theirs) as loader:
            found = loader.load_configuration("config", overrides, run_mode=RunMode.RUN)
        assert OmegaConf.is_struct(found)
        return OmegaConf.to_yaml(found), OmegaConf.get_type(found, "hydra"), OmegaConf.get_type(found.hydra, "job")

    plain = composed()
    with installed():
        assert [composed(), composed()] == [plain, plain]


def test_a_file_that_changes_is_merged_anew_and_nobody_sees_anothers_values(loader: Any, theirs: Path) -> None:
    path = theirs / "experiment" / "best.yaml"

    def composed() -> Any:
        return loader.load_configuration("config", ["+experiment=best"], run_mode=RunMode.RUN)

    for width in (96, 48, 96):  # of one length
        path.write_text(f"# @package _global_\nmodel: {{d_ff: {width}}}\n")
        found = composed()
        assert found.model.d_ff == width
        found.model.d_ff = found.seed = 5
        found.hydra.job.name = "mine"
        again = composed()
        assert (again.model.d_ff, again.seed) == (width, 0)
        assert again.hydra.job.name != "mine"
