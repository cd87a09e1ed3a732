"""What is done with a finished run: measured on text, averaged, the begin of another."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from apt_launch.lease import Holder, Lease
from apt_launch.record import Record, read_rows
from apt_launch.watch import RunWatch, frame
from apt_model.errors import ConfigError
from apt_model.training.checkpoint import Checkpoints, load
from tests.conftest import SMALL
from tests.forks import Ended, Forks

TRAIN = ("schedule=experts", "trainer.keep_last=9", "trainer.ema=0.9", "hydra.run.dir=run")


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


def test_a_model_that_never_holds_all_logits_is_measured_alike(forks: Forks, place: Path) -> None:
    shutil.copytree(place / "run", place / "chunked")
    config = place / "chunked" / "config.yaml"
    text = config.read_text()
    assert text.count("loss_chunk: null") == 1
    config.write_text(text.replace("loss_chunk: null", "loss_chunk: 8"))
    by = {
        name: json.loads(run(forks, place, "evaluate", name, "--json", "--max-batches", "4", "--batch-size", size).out)
        for name, size in (("run", "1"), ("chunked", "4"))
    }
    assert by["chunked"]["loss"] == pytest.approx(by["run"]["loss"], rel=1e-6)
    assert by["chunked"]["tokens"] == by["run"]["tokens"] == 4 * 16


def test_the_average_kept_in_training_is_measured_and_writes(forks: Forks, place: Path) -> None:
    few = ("--json", "--max-batches", "2", "--batch-size", "2")
    plain, average = (json.loads(run(forks, place, "evaluate", "run", *few, *ema).out) for ema in ((), ("--ema",)))
    state = load(Checkpoints(place / "run" / "checkpoints").all()[-1])
    assert average["loss"] != plain["loss"]
    assert average["loss"] == pytest.approx(plain["loss"], abs=0.2)
    assert state["ema"].keys() <= state["model"].keys()
    ended = run(forks, place, "generate", "run", "--ema", "--prompt", "line", "--max-new-tokens", "4", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["text"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "--which", "5"), "Steps: 4, 8, 12, 16, 20, 24."),
        (("run", "--which", "last"), "there is no 'last'"),
        (("run", "model.d_model=8"), "model.d_model=8: only the group data"),
        (("nowhere",), "there is no checkpoint"),
        (("run", "--batch-size", "0"), "must be 1 or more"),
        (("run", "--max-batches", "0"), "must be 1 or more"),
        (("run", "--seq-len", "0"), "must be 1 or more"),
        (("run", "--device", "meta"), "--device = 'meta' is not one of auto, cpu, cuda or cuda:N"),
        (("run", "--device", "cuda:9"), "--device: 'cuda:9' was asked for"),
        (("run", "data.val_fraction=0.5"), "data.val_fraction=0.5: say of which data it is"),
        (
            ("run/checkpoints/step-00000004", "--which", "8"),
            "--which 8: run/checkpoints/step-00000004 is one checkpoint",
        ),
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


def test_runs_are_compared_at_equal_tokens(forks: Forks, place: Path) -> None:
    short = (
        "schedule=experts",
        "trainer.max_epochs=3",
        "optimizer.lr=0.01",
        "hydra.run.dir=short",
        "trainer.keep_last=1",
        "trainer.ema=0.9",
    )
    given = [override for override in SMALL if not override.startswith("trainer.max_epochs")]
    assert forks.run(*given, *short, "data=text", "data.path=text.txt", cwd=place).code == 0
    found = json.loads(run(forks, place, "compare", "run", "short", "--json").out)
    assert found["tokens"][-1] == 3 * 4 * 2 * 16
    for name in ("run", "short"):
        rows = [row for row in read_rows(place / name / "metrics.jsonl") if "val/loss" in row and row["tokens"] <= 384]
        assert found["values"][name][-1] == rows[-1]["val/loss"]
    assert found["differences"] == {"optimizer.lr": [0.002, 0.01], "trainer.max_epochs": [6, 3]}
    assert (place / "compared.png").stat().st_size > 1000
    shown = run(forks, place, "compare", "run", "short")
    assert "val/loss at equal tokens" in shown.out
    assert "optimizer.lr" in shown.out
    for arguments, told in (
        (("run",), "Name two or more"),
        (("run", "nowhere"), "no run here"),
        (("run", "short", "--metric", "x"), "no row with"),
    ):
        ended = run(forks, place, "compare", *arguments)
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

    ended = run(forks, place, "evaluate", "next", "--ema")
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err
    assert "trainer.ema" in ended.err

    (place / "run" / "tokenizer.json").write_text("{}")
    try:
        ended = forks.run(*given, *more, "schedule=none", "hydra.run.dir=third", cwd=place)
    finally:
        (place / "run" / "tokenizer.json").unlink()
    assert (ended.code, "trainer.init_from: the tokens of" in ended.err) == (2, True), ended.err
    ended = forks.run(*given, *more, "schedule=none", "model.d_model=8", "hydra.run.dir=third", cwd=place)
    assert (ended.code, "made for another model" in ended.err) == (2, True), ended.err


def resumed(forks: Forks, place: Path, *more: str, begun: str = "run") -> Ended:
    return forks.run(
        *SMALL, *TRAIN[:-1], "data=text", "data.path=text.txt", f"trainer.resume={begun}", *more, cwd=place
    )


@pytest.mark.parametrize(
    ("given", "differ"),
    [
        (("schedule.enable_moe_at_epoch=null",), "schedule.enable_moe_at_epoch"),
        (("optimizer.lr=0.1", "moe.top_k=1"), "moe.top_k, optimizer.lr"),
        (("trainer.max_epochs=4", "schedule.on_horizon_change=keep_absolute"), "trainer.max_epochs"),
        (("trainer.max_batches_per_epoch=2", "schedule.on_horizon_change=rescale"), "trainer.max_batches_per_epoch"),
    ],
)
def test_of_a_run_that_ended_nothing_is_left_to_train_with_other_values(
    forks: Forks, place: Path, given: tuple[str, ...], differ: str
) -> None:
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    ended = resumed(forks, place, "hydra.run.dir=run", *given, begun="auto")
    assert ended.code == 2, ended.out
    assert "trainer.resume: the run in run has ended: it is at update 24, " in ended.err
    assert (
        f"Nothing would be trained with what differs now: {differ}. Make it longer: trainer.max_epochs=7" in ended.err
    )
    assert "trainer.init_from=run hydra.run.dir=ANOTHER_FOLDER" in ended.err
    assert {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_ended_is_no_run_of_another_folder(forks: Forks, place: Path) -> None:
    for more, what in (((), ""), (("optimizer.lr=0.1",), " with what differs now: optimizer.lr")):
        ended = resumed(forks, place, "hydra.run.dir=new", *more)
        assert (ended.code, f"Nothing would be trained in new{what}. " in ended.err) == (2, True), ended.err
        assert not (place / "new").exists()


def test_a_run_that_ended_is_resumed_as_it_was_or_made_longer(forks: Forks, place: Path) -> None:
    shutil.copytree(place / "run", place / "again")
    was = json.loads((place / "again" / "summary.json").read_text())
    neutral = ("trainer.log_every=1", "trainer.checkpoint_every_epochs=2")
    ended = resumed(forks, place, "hydra.run.dir=again", *neutral, begun="auto")
    assert ended.code == 0, ended.err
    now = json.loads((place / "again" / "summary.json").read_text())
    assert {name: now[name] for name in ("state", "identity", "steps", "final")} == (
        {name: was[name] for name in ("state", "identity", "steps", "final")}
    )
    longer = ("trainer.max_epochs=7", "schedule.on_horizon_change=rescale", "optimizer.lr=0.001")
    ended = resumed(forks, place, "hydra.run.dir=longer", *longer, begun="again")
    assert ended.code == 0, ended.err
    assert json.loads((place / "longer" / "summary.json").read_text())["steps"] == 28


def test_a_resume_begins_with_no_other_weights(forks: Forks, place: Path) -> None:
    longer = ("trainer.max_epochs=7", "schedule.on_horizon_change=rescale")
    ended = resumed(forks, place, "hydra.run.dir=run", "trainer.init_from=run", *longer, begun="auto")
    assert ended.code == 2
    assert (
        "trainer.init_from: the run in run was trained with None, and a resume cannot change it to 'run'" in ended.err
    )


def test_a_run_that_ended_is_watched_in_two_lines(forks: Forks, place: Path) -> None:
    ended = run(forks, place, "watch", "run")
    assert ended.code == 0, ended.err
    (line,) = [one for one in ended.out.splitlines() if one.startswith("run: done, ")]
    assert "update 24 of 24 (100%), 768 tokens" in line
    rows = [row for row in read_rows(place / "run" / "metrics.jsonl") if "val/loss" in row]
    assert f"val/loss {rows[-1]['val/loss']:.4f}, best {min(row['val/loss'] for row in rows):.4f}" in line
    (place / "sent").mkdir(exist_ok=True)
    (place / "sent" / "plan.yaml").write_text("")
    for folder, told in (("nowhere", "there is no run here"), ("sent", "sweep watch sent")):
        ended = run(forks, place, "watch", folder)
        assert (ended.code, told in ended.err) == (2, True), ended.err


def test_a_run_is_watched_while_it_trains_and_after_its_process_is_gone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    lease = Lease(tmp_path / "lease.json", Holder.this_process())
    summary = tmp_path / "summary.json"
    summary.write_text('{"state": "running", "planned_steps": 40}')
    live = RunWatch(tmp_path)
    assert live.moment().state == "running"
    assert not live.moment().step
    record = Record(tmp_path / "metrics.jsonl")
    for step, loss in ((9, 3.0), (19, 2.0)):
        record.log({"step": step, "tokens": 32 * (step + 1), "tokens_per_second": 8, "train/loss": loss})
    record.log({"step": 19, "tokens": 640, "val/loss": 2.5, "schedule/moe_enabled": 1, "schedule/route_temp": 0.5})
    moment = live.moment()
    assert (moment.step, moment.total, moment.ended) == (20, 1280, False)
    shown = io.StringIO()
    Console(file=shown, width=100).print(frame(tmp_path.relative_to(tmp_path.parent), moment, 100, 20))
    lines = shown.getvalue().splitlines()
    assert lines[0] == f"run {tmp_path.name}: running, moe"
    assert lines[1] == "update 20 of 40 (50%), 640 tokens, 8 tokens/s, 1:20 left"
    assert lines[2] == "train/loss 2.0000, val/loss 2.5000, best 2.5000 at 640 tokens"
    assert [line.split()[0] for line in lines[3:]] == ["train/loss", "val/loss", "route_temp", "moe"]
    assert "█" in lines[3]
    assert all(len(line) <= 100 for line in lines)
    record.close()
    lease.release()
    assert live.moment().state == "gone"
    summary.write_text('{"state": "failed"}')
    assert live.moment().state == "failed"
    summary.write_text("{")
    with pytest.raises(ConfigError, match="summary"):
        live.moment()
