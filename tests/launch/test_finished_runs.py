"""What is done with a finished run: measured on text, averaged, the begin of another."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from apt_launch.record import read_rows
from apt_model.training.checkpoint import Checkpoints, load
from tests.conftest import SMALL
from tests.forks import Ended, Forks

TRAIN = ("schedule=experts", "trainer.keep_last=9", "hydra.run.dir=run")


@pytest.fixture(scope="module")
def forks() -> Forks:
    return Forks()


@pytest.fixture(scope="module")
def place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 6 epochs, each with its checkpoint, and with its text."""
    place = tmp_path_factory.mktemp("finished")
    (place / "text.txt").write_text("".join(f"line {i} of some text, {i * i} squared\n" for i in range(200)))
    ended = forks.run(*SMALL, *TRAIN, "data=text", "data.path=text.txt", cwd=place)
    assert ended.code == 0, ended.err
    return place


def run(forks: Forks, place: Path, module: str, *arguments: str) -> Ended:
    return forks.run(*arguments, cwd=place, module=f"apt_launch.{module}")


def test_a_checkpoint_is_measured_on_the_runs_own_text_or_another(forks: Forks, place: Path) -> None:
    ended = run(forks, place, "evaluate", "run", "--json", "--max-batches", "2", "--batch-size", "2")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["tokens"] == 2 * 2 * 16
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))  # bytes are its tokens
    rows = [row for row in read_rows(place / "run" / "metrics.jsonl") if "val/loss" in row]
    assert found["loss"] == pytest.approx(rows[-1]["val/loss"], abs=0.15)  # of a few other sequences

    first = json.loads(run(forks, place, "evaluate", "run", "--json", "--which", "4").out)
    best = json.loads(run(forks, place, "evaluate", "run", "--json", "--which", "best").out)
    assert first["checkpoint"].endswith("step-00000004")
    assert best["loss"] < first["loss"]
    (place / "other").mkdir()
    for name in ("a", "b"):
        (place / "other" / f"{name}.txt").write_text(f"{name} " * 400)
    ended = run(
        forks, place, "evaluate", "run", "data=text", "data.path=other", "data.val_fraction=0.5", "--split", "train"
    )
    assert ended.code == 0, ended.err
    assert "bits a byte" in ended.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "--which", "5"), "There are: 4, 8, 12, 16, 20, 24."),
        (("run", "--which", "last"), "is none of newest, best"),
        (("run", "model.d_model=8"), "model.d_model=8: only the group data"),
        (("nowhere",), "there is no checkpoint"),
        (("run", "--batch-size", "0"), "must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_told(forks: Forks, place: Path, arguments: tuple[str, ...], told: str) -> None:
    ended = run(forks, place, "evaluate", *arguments)
    assert (ended.code, told in ended.err) == (2, True), ended.err
    assert "Traceback" not in ended.err


def test_the_mean_of_checkpoints_is_a_run_like_any_other(forks: Forks, place: Path) -> None:
    ended = run(forks, place, "average", "run", "--last", "3", "--to", "mean")
    assert ended.code == 0, ended.err
    (made,) = Checkpoints(place / "mean" / "checkpoints").all()
    assert made.name == "step-00000024"
    state = load(made)
    others = [load(path)["model"] for path in Checkpoints(place / "run" / "checkpoints").all()[-3:]]
    for name, value in state["model"].items():
        assert torch.allclose(value, sum(other[name] for other in others) / 3, atol=1e-6), name
    about = json.loads((made / "manifest.json").read_text())["about"]
    assert about["averaged"] == ["step-00000016", "step-00000020", "step-00000024"]
    ended = run(forks, place, "evaluate", "mean", "--json")
    assert json.loads(ended.out)["loss"] > 0
    for arguments, told in (
        (("run", "--last", "3", "--to", "mean"), "is there already"),
        (("run", "--last", "7"), "has 6 whole checkpoints. Give 1 to 6."),
        (("run", "--last", "6"), "have no mean. Give --last 4 or less."),
    ):
        ended = run(forks, place, "average", *arguments)
        assert (ended.code, told in ended.err) == (2, True), ended.err


def test_a_run_begins_with_the_weights_of_another_and_with_nothing_else(forks: Forks, place: Path) -> None:
    more = ("data=text", "data.path=text.txt", "trainer.init_from=run", "trainer.max_epochs=1", "trainer.batch_size=4")
    given = [override for override in SMALL if not override.startswith(("trainer.max_epochs", "trainer.batch_size"))]
    ended = forks.run(*given, *more, "schedule=none", "schedule.enable_moe_at_step=0", "hydra.run.dir=next", cwd=place)
    assert ended.code == 0, ended.err
    before = [row for row in read_rows(place / "run" / "metrics.jsonl") if "val/loss" in row]
    rows = read_rows(place / "next" / "metrics.jsonl")
    assert rows[0]["step"] == 0
    assert rows[0]["train/loss"] == pytest.approx(before[-1]["val/loss"], abs=0.4)
    assert rows[0]["train/loss"] < before[0]["val/loss"]
    summary = {name: json.loads((place / name / "summary.json").read_text())["identity"] for name in ("run", "next")}
    assert len(set(summary.values())) == 2

    (place / "run" / "tokenizer.json").write_text("{}")
    try:
        ended = forks.run(*given, *more, "schedule=none", "hydra.run.dir=third", cwd=place)
    finally:
        (place / "run" / "tokenizer.json").unlink()
    assert (ended.code, "trainer.init_from: the tokens of" in ended.err) == (2, True), ended.err
    ended = forks.run(*given, *more, "schedule=none", "model.d_model=8", "hydra.run.dir=third", cwd=place)
    assert (ended.code, "made for another model" in ended.err) == (2, True), ended.err
