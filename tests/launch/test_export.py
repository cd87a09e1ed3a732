"""The command that writes a run's weights for others, and a run that begins with such a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt_launch.generate import restored
from apt_launch.record import read_rows
from apt_model.data.tokenizer import load_tokenizer
from apt_model.layouts.folder import SEALS, WeightsFolder
from apt_model.training.checkpoint import load
from tests.conftest import SMALL
from tests.forks import Ended, run_module

REST = [override for override in SMALL if not override.startswith("model.")]


def run(module: str, *arguments: str, cwd: Path) -> Ended:
    done = run_module(module, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the whole curriculum and a dense one, on a text."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text("to be or not to be\n" * 400)
    data = ("data=text", "data.path=text.txt", "trainer.keep_last=3")
    run("apt_launch", *SMALL, *data, "hydra.run.dir=run", cwd=folder)
    run(
        "apt_launch",
        *SMALL,
        *data,
        "schedule=none",
        "trainer.max_epochs=2",
        "trainer.ema=0.9",
        "hydra.run.dir=dense",
        cwd=folder,
    )
    return folder


def test_what_no_layout_holds_is_named_and_left_out_with_the_difference(place: Path) -> None:
    kept = run_module("apt_launch.export", "run", "--to", "refused", cwd=place)
    assert kept.returncode == 2
    assert "alignment's mixture: no layout holds it. Leave it out with --without align,voter." in kept.stderr
    assert "votes where the model is unsure" in kept.stderr
    assert not (place / "refused").exists()
    done = run("apt_launch.export", "run", "--to", "out", "--without", "align,voter", "--dtype", "bf16", cwd=place)
    assert "out: step 24 as mixtral in bf16" in done.stdout
    assert "left out: align and voter; on " in done.stdout
    out = place / "out"
    said = json.loads((out / SEALS).read_text())
    assert said["files"].keys() == {path.name for path in out.iterdir()} - {SEALS}
    assert said["difference"]["left_out"] == ["align", "voter"]
    assert said["difference"]["of"] == "the run's validation text"
    assert {stored.kind for stored in WeightsFolder(out).stored.values()} == {"BF16"}
    card = (out / "README.md").read_text()
    assert said["identity"] in card
    assert "4 experts a layer, 2 a token" in card
    assert not [path for path in place.iterdir() if ".partial." in path.name]


def test_the_tokenizer_of_bytes_gives_bytes(place: Path) -> None:
    run("apt_launch.export", "dense", "--to", "bytes", cwd=place)
    tokenizer = load_tokenizer(place / "bytes" / "tokenizer.json")
    text = "".join(map(chr, range(1, 400))) + " dé\n\n  ff 🙂"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.end, tokenizer.vocab_size, tokenizer.begin) == (0, 256, None)
    assert json.loads((place / "bytes" / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "RUN: there is no checkpoint in 'nowhere/checkpoints'"),
        (["dense", "--layout", "mixtal"], "--layout: 'mixtal' is none. Did you mean 'mixtral'"),
        (
            ["dense", "--layout", "mixtral"],
            "--layout mixtral: the feed-forward layers are dense: its layers have experts.",
        ),
        (["dense", "--layout", "mixtral"], "What holds it: --layout llama."),
        (["dense", "--without", "experts"], "--without: 'experts' is not one of align, voter, capacity"),
        (["dense", "--checkpoint", "3"], "--checkpoint: there is no '3' in 'dense/checkpoints'. Steps: 4, 8."),
        (["dense/checkpoints/step-00000004", "--checkpoint", "8"], "Leave --checkpoint out, or name the run's folder"),
        (["run", "--ema"], "has no average of the weights. Train with trainer.ema=0.999"),
        (["dense", "--shard-gb", "0"], "--shard-gb = 0.0 must be above 0"),
        (["dense", "--to", "text.txt"], "--to: text.txt is a file, and a folder is wanted"),
        (["dense", "--to", "dense"], "--to: dense is there already. Choose another folder."),
    ],
)
def test_mistakes_are_told_in_words(place: Path, arguments: list[str], told: str) -> None:
    arguments = arguments if "--to" in arguments else [*arguments, "--to", "new"]
    done = run_module("apt_launch.export", *arguments, cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert told in done.stderr
    assert not (place / "new").exists()


def test_the_checkpoint_can_be_chosen(place: Path) -> None:
    losses = {}
    for manifest in (place / "dense" / "checkpoints").glob("*/manifest.json"):
        said = json.loads(manifest.read_text())
        losses[said["step"]] = said["loss"]
    best = min(losses, key=losses.__getitem__)
    (place / ".as_best.partial.1").mkdir()  # as one that was killed leaves
    for which, step in (("best", best), ("4", 4), ("newest", 8)):
        done = run("apt_launch.export", "dense", "--to", f"as_{which}", "--checkpoint", which, cwd=place)
        assert f"as_{which}: step {step} as llama" in done.stdout
        assert ("left by an export that did not end" in done.stderr) == (which == "best")
    (place / ".as_best.partial.1").rmdir()


def test_the_average_of_the_weights_is_exported_where_it_is_asked_for(place: Path) -> None:
    state = load(place / "dense" / "checkpoints" / "step-00000008")
    for name, options, expected in (("last", [], state["model"]), ("average", ["--ema"], state["ema"])):
        run("apt_launch.export", "dense", "--to", name, *options, cwd=place)
        written = load_file(place / name / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(written, expected["embedding.weight"])
        assert ("the average that `trainer.ema` kept" in (place / name / "README.md").read_text()) == bool(options)
        assert json.loads((place / name / SEALS).read_text())["average"] == bool(options)


def test_a_model_that_is_not_of_this_library_is_refused_and_an_optimizer_of_ones_own_is_not(place: Path) -> None:
    short = ("data=text", "data.path=text.txt", "schedule=none", "trainer.max_epochs=1")
    llama = "{model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
    other = ("model=transformers", f"model.config={llama}", "model.vocab_size=256", "model.seq_len=16")
    run("apt_launch", *REST, *other, *short, "hydra.run.dir=other", cwd=place)
    refused = run_module("apt_launch.export", "other", "--to", "new", cwd=place)
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert "RUN: no layout holds LlamaForCausalLM" in refused.stderr

    (place / "my_lab.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    allow = ("--allow", "my_lab")
    mine = ("optimizer=own", "optimizer._target_=my_lab.Mine", "optimizer.lr=0.1")
    run("apt_launch", *allow, *SMALL, *mine, *short, "hydra.run.dir=mine", cwd=place)
    told = run_module("apt_launch.export", "mine", "--to", "new", cwd=place)
    assert (told.returncode, "--allow my_lab" in told.stderr) == (2, True)
    run("apt_launch.export", *allow, "mine", "--to", "of_mine", cwd=place)


def test_a_run_that_begins_with_a_folder_goes_through_the_curriculum_resumes_and_leaves(place: Path) -> None:
    shutil.rmtree(place / "base", ignore_errors=True)
    run("apt_launch.export", "dense", "--to", "base", "--shard-gb", "0.00002", cwd=place)
    begin = (
        "model=pretrained",
        "model.path=base",
        "model.seq_len=16",
        "data=text",
        "data.path=text.txt",
        "schedule=experts",
    )
    once = (*REST, *begin, "optimizer.lr=1e-12", "moe.granularity=2", "moe.top_k=4", "moe.num_experts=8")
    run("apt_launch", *once, "hydra.run.dir=upcycled", cwd=place)
    rows = [row for row in read_rows(place / "upcycled" / "metrics.jsonl") if "val/loss" in row]
    dense = [row["val/loss"] for row in read_rows(place / "dense" / "metrics.jsonl") if "val/loss" in row]
    assert {row["schedule/moe_enabled"] for row in rows} == {0, 1}
    assert all(row["val/loss"] == pytest.approx(dense[-1], abs=1e-5) for row in rows), "it begins as the other ended"
    values = (place / "upcycled" / "config.yaml").read_text()
    assert "d_model: 16" in values
    assert "tokenizer: " in values
    run("apt_launch", *once, "hydra.run.dir=upcycled", "trainer.resume=auto", cwd=place)
    shutil.move(place / "base", place / "moved")  # the run has all that it needs
    told = run("apt_launch.generate", "upcycled", "--prompt", "to be", "--max-new-tokens", "3", cwd=place)
    assert "(moe)" in told.stderr
    kept = place / "upcycled" / "tokenizer.json"
    run("apt_launch.export", "upcycled", "--to", "experts", cwd=place)
    few = ("--json", "--max-batches", "2", "data=text", "data.path=text.txt")
    loaded = run("apt_launch.evaluate", "experts", *few, cwd=place)
    assert loaded.stderr == "", "no progress of a library's"
    theirs = json.loads(loaded.stdout)
    ours = json.loads(run("apt_launch.evaluate", "upcycled", *few, f"data.tokenizer={kept}", cwd=place).stdout)
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    assert (theirs["tokens"], theirs["bits_per_byte"]) == (ours["tokens"], pytest.approx(ours["bits_per_byte"]))
    begin = ("model=pretrained", "model.path=experts", "model.seq_len=16", "data=text", "data.path=text.txt")
    rest = [one for one in REST if not one.startswith("moe.")]
    on = (*rest, *begin, "moe=pretrained", "schedule=none", "optimizer.lr=1e-12", "trainer.max_epochs=1")
    refused = run_module("apt_launch", *on, "hydra.run.dir=never", cwd=place)
    assert "has experts, and the curriculum begins without. Set schedule.enable_moe_at_epoch=0." in refused.stderr
    run("apt_launch", *on, "schedule.enable_moe_at_epoch=0", "hydra.run.dir=on", cwd=place)
    again = [row["val/loss"] for row in read_rows(place / "on" / "metrics.jsonl") if "val/loss" in row]
    assert again[0] == pytest.approx(rows[-1]["val/loss"], abs=1e-5), "experts go on as they ended"
    checkpoint = next((place / "upcycled" / "checkpoints").iterdir())
    model, _, _ = restored(checkpoint, torch.device("cpu"))
    assert model.moe_layers[0].granularity == 2
    assert json.loads((place / "experts" / "config.json").read_text())["intermediate_size"] == 16  # 32 in two slices


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.d_model=64"], "model.d_model = 64: the model in base has 16. Leave it null."),
        (["model.seq_len=17"], "model.seq_len = 17: the model in base is meant for 16 tokens at the most."),
        (["model.path=nowhere"], "model.path: there is no folder 'nowhere'"),
        (["model.path=text.txt"], "model.path: there is no folder 'text.txt'"),
        (["model.dropout=2"], "model.dropout: 2 is not valid"),
        (["moe=pretrained"], "moe=pretrained: the model in base has no experts. Choose moe=experts."),
    ],
)
def test_a_config_that_contradicts_the_folder_is_refused(place: Path, overrides: list[str], told: str) -> None:
    if not (place / "base").exists():
        run("apt_launch.export", "dense", "--to", "base", cwd=place)
    begin = ["model=pretrained", "model.path=base", "data=text", "data.path=text.txt", "model.seq_len=16"]
    given = {override.partition("=")[0] for override in overrides}
    kept = [override for override in [*REST, *begin] if override.partition("=")[0] not in given]
    done = run_module("apt_launch", *kept, *overrides, "hydra.run.dir=never", cwd=place)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert told in done.stderr
    assert not (place / "never").exists()
