"""A planned job's config is the one that Hydra itself composes for a job: real configs, composed in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from apt_launch.config.composing import config_loader
from apt_launch.sweep.application import HYDRA_MAIN, Program
from apt_launch.sweep.plan.composer import Composer
from apt_launch.sweep.programs.freeze import thaw
from apt_model.errors import ConfigError
from tests.sweep.programs import write

CONFIGS = {
    "conf/config.yaml": "defaults: [db: mysql, _self_]\nlr: 0.1\nseed: 0\ns: plain\n",
    "conf/searching.yaml": "defaults: [db: mysql, net: a, _self_]\nhydra: {searchpath: ['file://HERE/extra']}\n",
    "conf/drawing.yaml": "seed: 0\nrun: ${drawn:}\nagain: ${drawn:}\nwhen: ${now:%f}\n",
    "conf/db/mysql.yaml": "name: mysql\n",
    "extra/db/z.yaml": "name: extra\n",
    "extra/net/a.yaml": "w: 1\n",
    "extra/net/b.yaml": "w: 2\n",
}
Sweep = Callable[..., tuple[Composer, Callable[[list[str]], DictConfig]]]


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Sweep]:
    """Give the composer of a sweep with these overrides of Hydra's node, and what Hydra's launcher would give to its jobs."""
    write(tmp_path, {name: text.replace("HERE", str(tmp_path)) for name, text in CONFIGS.items()})
    with config_loader(tmp_path / "conf") as loader:

        def sweep(*of_hydra: str, config: str = "config") -> tuple[Composer, Callable[[list[str]], DictConfig]]:
            master = loader.load_configuration(config, ["hydra.sweep.dir=sweep", *of_hydra], run_mode=RunMode.MULTIRUN)
            _ = master.hydra.job.name  # what the command itself has resolved, jobs keep
            composer = Composer(loader, config, HYDRA_MAIN, Program(script=str(tmp_path / "train.py")), master)
            return composer, lambda overrides: loader.load_sweep_config(master, overrides)

        yield sweep


def of_job(composer: Composer, *overrides: str) -> Any:
    return thaw(composer(overrides).values)


def without_hydra(cfg: DictConfig) -> dict[str, Any]:
    return {str(key): OmegaConf.to_container(OmegaConf.create({"value": cfg[key]})) for key in cfg if key != "hydra"}


@pytest.mark.parametrize(
    ("config", "job"),
    [
        *(
            ("config", ("+net=a",)),
            ("config", ("+net=b", "lr=1")),
            ("config", ("db=z",)),
            ("config", ("+net=b", "~db")),
        ),
        *(("searching", ("net=b",)), ("searching", ("db=z",)), ("searching", ("net.w=3",))),
    ],
)
def test_groups_and_options_of_the_searchpath_are_chosen_as_hydra_does(
    sweep: Sweep, tmp_path: Path, config: str, job: tuple[str, ...]
) -> None:
    asked = [f"hydra.searchpath=['file://{tmp_path}/extra']"] if config == "config" else []
    composer, hydras = sweep(*asked, config=config)
    found, wanted = of_job(composer, *job), hydras(list(job))
    assert without_hydra(found) == without_hydra(wanted)
    assert found.hydra.runtime.choices == wanted.hydra.runtime.choices
    assert found.hydra.overrides == wanted.hydra.overrides
    paths = [[source.path for source in cfg.hydra.runtime.config_sources] for cfg in (found, wanted)]
    assert paths[0] == paths[1]
    assert str(tmp_path / "extra") in paths[0]


def test_a_job_with_an_interpolation_leaves_the_next_its_own_dirname(sweep: Sweep) -> None:
    composer, hydras = sweep("hydra.sweep.subdir=${hydra.job.override_dirname}")
    for override in ("s='r${seed}'", "s=p", "s=q", "s='${lr}'", "s=z"):
        found, wanted = of_job(composer, override), hydras([override])
        assert found.hydra.job.override_dirname == wanted.hydra.job.override_dirname
        assert found.hydra.sweep.subdir == wanted.hydra.sweep.subdir


def test_two_jobs_with_one_output_folder_are_refused_with_both_named(sweep: Sweep) -> None:
    composer, _ = sweep("hydra.sweep.subdir=of-${s}")
    composer(["s=a", "lr=1"])
    composer(["s=b", "lr=1"])
    composer(["s=a", "lr=1"])  # the same job
    with pytest.raises(ConfigError, match=r"subdir: .*sweep/of-a .*the job with s=a lr=1, .*hydra:job\.num"):
        composer(["s=a", "lr=2"])
    numbered, _ = sweep("hydra.sweep.subdir=of-${hydra:job.num}")
    assert numbered(["lr=1"]).identity != numbered(["lr=2"]).identity


def test_what_a_resolver_keeps_it_keeps_for_one_job(sweep: Sweep) -> None:
    numbers = itertools.count()
    OmegaConf.register_new_resolver("drawn", lambda: next(numbers), use_cache=True, replace=True)
    try:
        composer, hydras = sweep("hydra.job.name=at-${now:%f}", config="drawing")
        jobs = [of_job(composer, f"seed={seed}") for seed in (0, 1, 2)]
        assert [(job.run, job.again) for job in jobs] == [(0, 0), (1, 1), (2, 2)]
        theirs = [hydras([f"seed={seed}"]) for seed in (0, 1)]
        assert [(job.run, job.again) for job in theirs] == [(3, 3), (4, 4)]
        assert {job.when for job in (*jobs, *theirs)} == {jobs[0].hydra.job.name.removeprefix("at-")}
        assert composer.identities[("seed=2",)] != composer.identities[("seed=1",)]
    finally:
        OmegaConf.clear_resolver("drawn")
