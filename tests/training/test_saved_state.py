"""What lies in ``state.pt`` is what a run can go on from, or is refused with file, place and remedy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_launch.config.run_config import RunConfig
from apt_launch.runs.build import build_trainer
from apt_launch.runs.train import train
from apt_model.errors import CheckpointError, ConfigError
from apt_model.training.checkpoint import MANIFEST, STATE, WEIGHTS, Checkpoints
from apt_model.training.saved_state import read_state

Change = Callable[[dict[str, Any]], object]
FIRST = "blocks.0.attention.out.weight"

DAMAGES: dict[str, tuple[Change, str]] = {
    "a part fewer": (lambda state: state.pop("clock"), "clock: missing"),
    "several fewer": (
        lambda state: [state.pop(name) for name in ("random", "optimizer")],
        "optimizer, random: missing",
    ),
    "a key fewer": (lambda state: state["progress"].pop("rows"), "progress.rows"),
    "a key more": (lambda state: state["clock"].update(extra=1), "clock.extra"),
    "another type": (lambda state: state.update(schedule=[]), "schedule"),
    "a textual number": (lambda state: state["clock"].update(epoch="1"), "clock.epoch"),
    "a number that is none": (lambda state: state["progress"].update(seconds=float("nan")), "progress"),
    "an endless number": (lambda state: state["progress"].update(seconds=float("inf")), "progress"),
    "a negative number": (lambda state: state["progress"].update(batches_done=-1), "negative or endless"),
    "half a step": (lambda state: state["clock"].update(step=0.5), "clock.step"),
    "another step": (lambda state: state["clock"].update(step=7), "shows step 7, and the checkpoint is that of step 0"),
    "a horizon's text": (lambda state: state["schedule"]["horizon"].update(epochs="6"), "schedule.horizon.epochs"),
    "no switches": (lambda state: state["schedule"].update(on=None), "schedule.on"),
    "a switch's number": (lambda state: state["schedule"]["on"].update(moe_enabled=1), "schedule.on.moe_enabled"),
    "a tensor for a number": (lambda state: state["clock"].update(step=torch.zeros(())), "Tensor"),
    "moments of another size": (
        lambda state: state["optimizer"].update({FIRST: {"exp_avg": torch.zeros(3)}}),
        re.escape(f"optimizer.{FIRST}.exp_avg: (3,), and the parameter is (16, 16)"),
    ),
    "moments of nobody": (lambda state: state["optimizer"].update(nobody={}), "there is no parameter 'nobody'"),
    "moments as text": (lambda state: state["optimizer"].update({FIRST: {"exp_avg": "x"}}), "exp_avg: str, and a"),
    "a parameter's text": (lambda state: state["optimizer"].update({FIRST: "x"}), "no mapping"),
    "no ranks": (lambda state: state.update(random=[]), "random"),
    "a short generator": (lambda state: state["random"][0].update(cpu=torch.zeros(3, dtype=torch.uint8)), r"random\.0"),
    "Python's generator": (lambda state: state["random"][0].update(python=(3, (1, 2), None)), r"random\.0"),
    "NumPy's generator": (lambda state: state["random"][0].update(numpy="x"), r"random\.0"),
    "a generator fewer": (lambda state: state["random"][0].pop("cpu"), r"random\.0"),
}


@pytest.fixture
def config(composed: Callable[..., RunConfig], tmp_path: Path, small: Callable[..., RunConfig]) -> RunConfig:
    return small("logger=none")


def saved(config: RunConfig, folder: Path, change: Change = lambda state: None) -> Path:
    """Write a checkpoint of a run that has not begun, with a state that is changed; its checksums are right."""
    state = build_trainer(config).state_dict()
    change(state)
    return Checkpoints(folder).save(state, step=0)


def test_what_a_trainer_saves_is_what_is_read(config: RunConfig, tmp_path: Path) -> None:
    state = build_trainer(config).state_dict()
    read = read_state(Checkpoints(tmp_path / "c").save(state, step=0))
    assert {name: read[name] for name in ("clock", "progress", "scaler", "schedule")} == {
        name: state[name] for name in ("clock", "progress", "scaler", "schedule")
    }
    assert read["model"].keys() == state["model"].keys()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_state_that_no_run_can_go_on_from_is_named_with_the_place(
    config: RunConfig, tmp_path: Path, name: str
) -> None:
    change, message = DAMAGES[name]
    checkpoint = saved(config, tmp_path / "c", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_state(checkpoint)
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith(str(checkpoint / STATE))
    assert told.endswith("Remove that checkpoint: the one before it is taken then.")


@pytest.mark.parametrize("content", [[1, 2], "x", {"model": {}}, {1: 2}])
def test_something_else_is_no_state(config: RunConfig, tmp_path: Path, content: object) -> None:
    checkpoint = saved(config, tmp_path / "c")
    torch.save(content, checkpoint / STATE)
    (checkpoint / WEIGHTS).unlink()
    state = (checkpoint / STATE).read_bytes()
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"] = {STATE: {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"state\.pt: damaged"):
        read_state(checkpoint)


def test_a_run_refuses_it_before_anything_is_written(
    config: RunConfig, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    about = {"identity": config.identity, "config": config.result_values, "horizon": config.horizon.__dict__}
    state = build_trainer(config).state_dict()
    state["progress"]["seconds"] = "1"
    checkpoint = Checkpoints(tmp_path / "before" / "checkpoints", about=about).save(state, step=0)
    with pytest.raises(ConfigError, match=rf"trainer\.resume: {checkpoint / STATE}: damaged \(progress\.seconds"):
        train(small("logger=none", f"trainer.resume={checkpoint}"), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
