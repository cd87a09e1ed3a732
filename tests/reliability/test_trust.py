"""What a person allows is inherited by the jobs that they send, and by nobody else; no file carries it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from apt_launch.allow import VARIABLE, allowing
from apt_launch.application import Trainer
from apt_launch.config.load import parse_groups
from apt_launch.config.run_config import RunConfig
from apt_launch.sweep.backends.slurm import inherited_lines
from apt_model.errors import ConfigError
from tests.conftest import SMALL
from tests.forks import Forks
from tests.reliability.test_security import HOSTILE

LAB = """
import os
from subprocess import Popen

import torch


class Slow(torch.optim.SGD):
    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, lr=lr / 2, weight_decay=weight_decay)


touch = os.system
"""

OWN = ("optimizer=own", "optimizer._target_=trusted_lab.Slow", "optimizer.lr=0.1")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "trusted_lab.py").write_text(LAB)
    return tmp_path


def test_jobs_inherit_the_word_of_who_sends_them_and_a_resume_needs_it_again(
    forks: Forks, place: Path, text_file: Path
) -> None:
    command = [*SMALL, "data=text", f"data.path={text_file}", "trainer.max_epochs=1", "schedule=none", *OWN]
    refused = forks.run("--multirun", "seed=0", *command, "hydra.sweep.dir=sweep", cwd=place)
    assert (refused.code, "--allow trusted_lab" in refused.err) == (2, True), refused.err
    assert not (place / "sweep").exists()
    sent = forks.run("--allow", "trusted_lab", "--multirun", "seed=0", *command, "hydra.sweep.dir=sweep", cwd=place)
    assert sent.code == 0, sent.out + sent.err
    (job,) = (place / "sweep").glob("0-*")
    for file in [*place.glob("sweep/*"), *place.glob("sweep/0-*/*")]:
        assert not file.is_file() or b"APT_LAUNCH_ALLOW" not in file.read_bytes(), file

    state = json.loads((job / "state.json").read_text())
    (job / "state.json").write_text(json.dumps(state | {"state": "failed"}))
    refused = forks.run("resume", "sweep", cwd=place, module="apt_launch.sweep")
    assert (refused.code, "say so: --allow trusted_lab" in refused.err) == (2, True), refused.err
    assert json.loads((job / "state.json").read_text())["state"] == "failed"

    for target in ("trusted_lab.Popen", "trusted_lab.touch"):  # a folder that somebody has changed to name more
        for path in (place / "sweep" / "plan.yaml", job / "config.yaml"):
            text = path.read_text()
            path.write_text(text.replace("trusted_lab.Slow", target).replace("trusted_lab.Popen", target))
        refused = forks.run("resume", "sweep", "--allow", "trusted_lab", cwd=place, module="apt_launch.sweep")
        assert (refused.code, "is not what trusted_lab defines" in refused.err) == (2, True), refused.err


def test_what_the_trainers_jobs_inherit_is_the_senders_word_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Trainer().environment() == {VARIABLE: ""}
    with allowing(["trusted_lab", "other.parts"]):
        assert Trainer().environment() == {VARIABLE: "trusted_lab,other.parts"}
        assert inherited_lines(Trainer()) == [f"export {VARIABLE}=trusted_lab,other.parts"]
    assert inherited_lines(Trainer()) == [f"export {VARIABLE}=''"]  # whatever stands in the cluster's environment


def test_no_config_gives_the_word(forks: Forks, place: Path) -> None:
    for override in (
        f"+hydra.job.env_set.{VARIABLE}=trusted_lab",
        f"+hydra.job.env_copy=[{VARIABLE}]",
        "+allow=trusted_lab",
    ):
        ended = forks.run(override, *SMALL, *OWN, cwd=place, env={VARIABLE: ""})
        assert ended.code == 2, ended
        assert not (place / "outputs").exists()


def test_what_is_hostile_stays_refused_whatever_else_is_allowed(
    small: Callable[..., RunConfig], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(place)
    monkeypatch.chdir(place)
    values = small().values
    before = sorted(path.name for path in place.iterdir())
    with allowing(["trusted_lab"]):
        good = {"_target_": "trusted_lab.Slow", "lr": 0.1}
        assert parse_groups({**values, "optimizer": good})[0]["optimizer"].lr == 0.1
        for target, arguments in HOSTILE.values():
            node = {"_target_": target, **arguments}
            for changed in (
                {"optimizer": {**node, "lr": 0.1}},
                {"optimizer": {**good, "more": node}},
                {"optimizer": {**good, "nesterov": [{"deeper": node}]}},
                {"model": {**node, "seq_len": 16}},
                {"data": node},
                {"loss": node},
                {"logger": node},
                {"callbacks": {"evil": node}},
                {"trainer": {**values["trainer"], "extra": node}},
            ):
                if changed == {"logger": {"_target_": "apt_launch.tracking.wandb.WandbTracker"}}:
                    continue  # where it belongs
                given = {**values, **changed}
                with pytest.raises(ConfigError):
                    parse_groups(given)
    assert {path.name for path in place.iterdir()} - {"__pycache__"} == {*before} - {"__pycache__"}
