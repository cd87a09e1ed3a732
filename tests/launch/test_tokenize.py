"""The command that makes shards, and runs on tokens that are no bytes."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt_launch.config.run_config import RunConfig
from apt_launch.runs.folder import RunFolder
from apt_launch.runs.train import train as train_here
from apt_model.data import StdlibCorpus
from apt_model.data.shards import Shards
from apt_model.errors import ConfigError
from apt_model.files import MOST_BYTES
from tests.conftest import SMALL, until
from tests.forks import Fork, Forks, environment, run_module

TEXT = "".join(f"line {i} of some text, {i * i} squared\n" for i in range(600))


@pytest.fixture(scope="module")
def forks() -> Any:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, shards of it, and runs on both, whose tokens are the same."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    done = run_module(
        "apt_launch.tokenize", "out", "--train-tokenizer", "300", "data=text", "data.path=text.txt", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert (
        "300 kinds of tokens. Train: python -m apt_launch data=shards data.path=out model.vocab_size=300" in done.stdout
    )
    assert re.search(r"^tokens of train: [\d,]+, [\d,]+ a second$", done.stderr, flags=re.MULTILINE)
    return folder


def train(forks: Forks, made: Path, run: str, *overrides: str) -> Path:
    ended = forks.run(*SMALL, "model.vocab_size=300", *overrides, f"hydra.run.dir={run}", cwd=made)
    assert ended.code == 0, ended.err
    return made / run


def weights(run: Path) -> bytes:
    return sorted((run / "checkpoints").glob("step-*"))[-1].joinpath("model.safetensors").read_bytes()


def test_a_run_is_the_same_from_text_and_from_shards_and_resumes_exactly(forks: Forks, made: Path) -> None:
    whole = train(forks, made, "shards", "data=shards", "data.path=out")
    cached = ("data.tokenizer=out", "data.cache=cache")
    again = train(forks, made, "text", "data=text", "data.path=text.txt", *cached)
    assert weights(again) == weights(whole)
    for step in sorted((again / "checkpoints").glob("step-*"))[1:]:  # go on from an earlier one
        shutil.rmtree(step)
    train(forks, made, "text", "data=text", "data.path=text.txt", *cached, "trainer.resume=auto")
    assert weights(again) == weights(whole)


def test_a_run_is_the_same_from_jsonl_and_from_datasets_streamed_or_not(forks: Forks, made: Path) -> None:
    pytest.importorskip("datasets")
    rows = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    (made / "rows.jsonl").write_text(rows)
    jsonl = train(forks, made, "jsonl", "data=jsonl", "data.train_path=rows.jsonl", "data.val_path=rows.jsonl")
    files = ("data.data_files={train: rows.jsonl, validation: rows.jsonl}", "data.cache=cache")
    read = train(forks, made, "read", "data=hf", "data.path=json", *files)
    streamed = train(
        forks, made, "streamed", "data=hf", "data.path=json", *files, "data.streaming=true", "data.max_documents=600"
    )
    assert weights(jsonl) == weights(read) == weights(streamed)


def test_text_is_generated_with_the_tokenizer_that_the_run_has_kept(forks: Forks, made: Path) -> None:
    run = train(forks, made, "kept", "data=shards", "data.path=out")
    shutil.move(run, made / "elsewhere")
    told = run_module("apt_launch.generate", "elsewhere", "--prompt", "line 7 of", "--max-new-tokens", "9", cwd=made)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("line 7 of")
    tokens = len(Shards(made / "out").tokenizer.encode("line 7 of"))
    assert f"; {tokens} of the prompts in " in told.stderr


def test_a_resume_with_another_tokenizer_is_refused(forks: Forks, made: Path) -> None:
    (made / "t.json").write_bytes((made / "out" / "tokenizer.json").read_bytes())
    asked = ("data=text", "data.path=text.txt", "data.tokenizer=t.json", "data.cache=cache")
    train(forks, made, "other", *asked)
    (made / "t.json").write_text((made / "t.json").read_text().replace("\n", " "))
    ended = forks.run(*(*SMALL, "model.vocab_size=300", *asked, "hydra.run.dir=other", "trainer.resume=auto"), cwd=made)
    assert ended.code == 2
    assert "error: data: t.json is not the tokenizer that the run was trained with, which is kept in " in ended.err


def test_a_large_tokenizer_is_kept_and_compared(made: Path, small: Callable[..., RunConfig], tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.write_bytes((made / "out" / "tokenizer.json").read_bytes() + b" " * MOST_BYTES)
    asked = (f"data.tokenizer={large}", f"data.cache={tmp_path}/cache", "model.vocab_size=300", "logger=none")
    config = small(*asked, "trainer.max_epochs=6", "trainer.max_batches_per_epoch=1")
    train_here(config, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == large.read_bytes()
    assert RunFolder(tmp_path / "run").resume(config.resuming()) is not None
    with large.open("a") as file:
        file.write(" ")
    with pytest.raises(ConfigError, match=r"large\.json is not the tokenizer that the run was trained with"):
        RunFolder(tmp_path / "run").resume(config.resuming())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["out", "data=text", "data.path=text.txt"], "OUT: out holds shards already. Train from them by data=shards"),
        (["new", "data=text"], "data.path: has no value yet"),
        (["new", "data=text", "data.path=nowhere"], "data.path: there is no file or folder 'nowhere'"),
        (["new", "data=txt"], "data: there is no option 'txt'. Did you mean 'text'?"),
        (["new", "data=stdlib", "data.val_fraction=2"], "data.val_fraction: 2 is not valid"),
        (["new", "data=shards", "data.path=out"], "data: it has tokens already, and no documents."),
        (["new", "--train-tokenizer", "9", "data=text", "data.path=text.txt"], "--train-tokenizer = 9 is too small"),
        (
            ["new", "--train-tokenizer", "300", "data=text", "data.path=text.txt", "data.tokenizer=out"],
            "names one already",
        ),
        (["new", "--train-tokenizer", "300", "data=text", "data.path=nowhere"], "there is no file or folder 'nowhere'"),
        (["new", "data=text", "data.path=text.txt", "data.tokenizer=text.txt"], "text.txt is no tokenizer"),
        (["new", "data=jsonl", "data.train_path=text.txt", "data.val_path=text.txt"], "text.txt, line 1 is not JSON"),
        (["new", "--shards", "3"], "--shards: unknown option. See python -m apt_launch.tokenize --help."),
        (["new", "--shard-tokens", "0"], "--shard-tokens = 0 must be 1 or more."),
        (["data=text", "data.path=text.txt"], "OUT: 'data=text' is an override. Name the folder first"),
        (["text.txt", "data=text", "data.path=text.txt"], "OUT: text.txt is a file, and a folder is wanted"),
    ],
)
def test_mistakes_are_reported_in_words_and_leave_nothing(
    forks: Forks, made: Path, arguments: list[str], told: str
) -> None:
    before = {path.name for path in made.iterdir()}
    ended = forks.run(*arguments, cwd=made, module="apt_launch.tokenize")
    assert ended.code == 2, ended.err
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert {path.name for path in made.iterdir()} == before


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("train-00000.bin", "train-00000.bin is damaged: it differs from its checksum in manifest.json. Delete "),
        ("tokenizer.json", "tokenizer.json is missing, or another one than that of the shards beside it. Delete "),
        ("manifest.json", "manifest.json is no manifest of shards, or damaged: "),
    ],
)
def test_damaged_shards_are_refused_before_torch_is_loaded(made: Path, tmp_path: Path, damage: str, told: str) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    content = bytearray((tmp_path / "out" / damage).read_bytes())
    content[len(content) // 2] ^= 128
    (tmp_path / "out" / damage).write_bytes(content)
    command = [sys.executable, "-X", "importtime", "-m", "apt_launch", *SMALL, "model.vocab_size=300", "data=shards"]
    ended = subprocess.run(
        [*command, "data.path=out"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert told in ended.stderr
    loaded = {line.rsplit("|", 1)[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time")}
    assert "apt_model.data.shards" in loaded
    assert not loaded & {"torch", "tokenizers", "datasets"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_and_killed_it_continues_where_it_stood(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "apt_launch.tokenize", "out", "--shard-tokens", "20000"]
    partial = tmp_path / ".out.partial"
    shards = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
            until(lambda: len(list(partial.glob("*.bin"))) > shards + 20, "some shards more")  # noqa: B023
            process.send_signal(number)
            _, told = process.communicate()
        assert process.returncode == code, told
        assert "Traceback" not in told
        assert not (tmp_path / "out").exists()
        shards = len(list(partial.glob("*.bin")))
        if code == 130:
            assert "Go on with: python -m apt_launch.tokenize out --shard-tokens 20000" in told
    first = (partial / "train-00000.bin").stat().st_ino
    done = run_module("apt_launch.tokenize", "out", "--shard-tokens", "20000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "train-00000.bin").stat().st_ino == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Shards(tmp_path / "out").check()
    for split in ("train", "val"):
        expected = StdlibCorpus().read(split).array()
        assert (Shards(tmp_path / "out").read(split).array() == expected).all()


def test_a_terminal_sees_a_bar(made: Path) -> None:
    parent, child = pty.openpty()
    command = ["apt_launch.tokenize", "seen", "data=text", "data.path=text.txt"]
    process = Fork(command, cwd=made, env=environment(TERM="xterm"), stdout=subprocess.PIPE, stderr=child)
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # the other end was closed
            break
    process.communicate()
    os.close(parent)
    assert process.returncode == 0
    assert b"tokens of train" in shown
    assert "━".encode() in shown


def test_a_full_disk_is_reported_and_the_same_command_continues_where_there_is_room(made: Path, tmp_path: Path) -> None:
    asked = [*("out", "--shard-tokens", "9000", "data=text"), f"data.path={made / 'text.txt'}"]
    ended = run_module("apt_launch.tokenize", *asked, cwd=tmp_path, largest_file=9500)  # the text has 19 kB
    assert ended.returncode == 2, ended.stderr
    assert "error: OUT: tokens could not be made in out: [Errno 27] File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    done = run_module("apt_launch.tokenize", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    Shards(tmp_path / "out").check()


def test_a_cache_that_cannot_be_is_reported(forks: Forks, made: Path) -> None:
    ended = forks.run(
        *(*SMALL, "data=text", "data.path=text.txt", "data.tokenizer=out", "model.vocab_size=300"),
        *("data.cache=text.txt/cache", "hydra.run.dir=never"),
        cwd=made,
    )
    assert ended.code == 2
    assert "error: data.cache: tokens could not be made in text.txt/cache/" in ended.err
    assert not (made / "never").exists()
