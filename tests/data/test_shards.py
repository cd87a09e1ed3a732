from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_launch.generate import begin_of_texts
from apt_model.data import ShardsCorpus
from apt_model.data.corpora import DocumentCorpus, TextCorpus
from apt_model.data.corpus import Document, OnProgress, Split
from apt_model.data.shard_writer import _pieces, write
from apt_model.data.shards import MANIFEST, Shards
from apt_model.data.tokenizer import ByteTokenizer, Tokenizer, train_tokenizer
from apt_model.errors import ConfigError

TEXTS = [f"document {i} of some text, {i * i} squared\nand a second line of it\n" * (1 + i % 5) for i in range(40)]
BPE = train_tokenizer(TEXTS, 300)


class Memory(DocumentCorpus):
    """Texts that are in memory already; every tenth validates."""

    def __init__(self, texts: list[str] = TEXTS, max_tokens: int | None = None) -> None:
        super().__init__()
        self.texts = texts
        self.max_tokens = max_tokens

    def documents(self, split: Split) -> Iterator[Document]:
        chosen = [text for i, text in enumerate(self.texts) if (i % 10 == 0) == (split == "val")]
        for number, text in enumerate(chosen, start=1):
            yield Document(text, number / len(chosen))

    def source(self) -> dict[str, Any]:
        return {"texts": self.texts}


def made(folder: Path, tokenizer: Tokenizer = BPE, **options: Any) -> Shards:
    corpus = Memory(max_tokens=options.pop("max_tokens", None))
    write(folder, corpus, tokenizer, key="OUT", **{"on_progress": corpus.on_progress, "shard_tokens": 400} | options)
    return Shards(folder)


def expected(split: Split, tokenizer: Tokenizer = BPE) -> list[int]:
    return [t for text, *_ in Memory().documents(split) for t in (*tokenizer.encode(text), tokenizer.end)]


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()])
def test_shards_hold_the_tokens_of_all_documents_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = made(tmp_path / "out", tokenizer)
    for split in ("train", "val"):
        assert shards.read(split).array().tolist() == expected(split, tokenizer)
        assert shards.count(split) == len(expected(split, tokenizer))
    assert shards.read("train").array().dtype == tokenizer.dtype
    assert len(shards.manifest.splits["train"].shards) > 3
    assert shards.tokenizer.encode("a second") == tokenizer.encode("a second")
    shards.check()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_most_tokens_are_met_to_the_token(tmp_path: Path) -> None:
    shards = made(tmp_path / "out", max_tokens=1001)
    assert shards.read("train").array().tolist() == expected("train")[:1001]
    assert shards.count("val") == min(1001, len(expected("val")))


class CutError(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("shards_before", [1, 2, 4])
def test_what_was_cut_off_continues_with_the_shards_that_are_complete(tmp_path: Path, shards_before: int) -> None:
    folder, partial = tmp_path / "out", tmp_path / ".out.partial"

    def cut(split: str, done: float, tokens: int) -> None:
        if len(list(partial.glob("*.bin"))) >= shards_before and done == 1:
            raise CutError

    with pytest.raises(CutError):
        made(folder, on_progress=cut)
    assert not folder.exists()
    with pytest.raises(ConfigError, match=r"\.out\.partial was cut off\. Go on with it: the command that began it"):
        Shards(folder)
    there = {path.name: path.stat().st_ino for path in partial.glob("*.bin")}
    assert len(there) >= shards_before
    assert made(folder).read("train").array().tolist() == expected("train")
    assert {name: (folder / name).stat().st_ino for name in there} == there, "they were not made again"


def test_what_was_begun_of_other_text_or_is_damaged_is_begun_anew(tmp_path: Path) -> None:
    def cut(split: str, done: float, tokens: int) -> None:
        if split == "train" and done == 1:
            raise CutError

    for damage in (False, True):
        folder = tmp_path / str(damage)
        with pytest.raises(CutError):
            made(folder, on_progress=cut, **({} if damage else {"max_tokens": 900}))
        if damage:
            next((tmp_path / f".{folder.name}.partial").glob("train-*.bin")).write_bytes(b"else")
        assert made(folder).read("train").array().tolist() == expected("train")


def test_several_processes_make_them_once(tmp_path: Path) -> None:
    """Locks of open files hold off threads as they do processes."""
    told: list[str] = []
    threads = [
        threading.Thread(
            target=made, args=(tmp_path / "out",), kwargs={"on_progress": lambda *made: told.append(made[0])}
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.count("train") == 2, "at the begin and at the end of one that made them"
    assert Shards(tmp_path / "out").read("train").array().tolist() == expected("train")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "train-00001.bin").unlink(), r"train-00001\.bin cannot be read \(No such file"),
        (lambda out: (out / "val-00000.bin").write_bytes(b"abc"), r"val-00000\.bin is damaged: it has 3 bytes, not "),
        (lambda out: flip(out / "train-00002.bin"), r"train-00002\.bin is damaged: it differs from its checksum"),
        (
            lambda out: flip(out / "tokenizer.json"),
            r"tokenizer\.json is missing, or another one than that of the shards",
        ),
        (lambda out: (out / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda out: (out / MANIFEST).write_text("{}"), r"manifest\.json is no manifest of shards, or damaged"),
        (lambda out: (out / MANIFEST).write_text('{"a'), r"manifest\.json is no manifest of shards, or damaged"),
        (lambda out: edit(out / MANIFEST, splits={}), r"manifest\.json is damaged: it has no train split"),
        (lambda out: edit(out / MANIFEST, format="shards 2"), r"is no manifest of shards, or damaged"),
        (lambda out: edit(out / MANIFEST, dtype="<f4"), r"is no manifest of shards, or damaged"),
        (lambda out: edit(out / MANIFEST, vocab_size=200), r"has the token 2\d\d, but manifest\.json says .* are 200"),
        (lambda out: shutil.rmtree(out), r"data\.path: '.*' holds no shards: .*python -m apt_launch\.tokenize OUT"),
    ],
)
def test_what_is_damaged_or_foreign_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    made(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        ShardsCorpus(path=str(tmp_path / "out")).check()


def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    made(tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    path.write_text(path.read_text().replace("train-00000.bin", "../train-00000.bin"))
    with pytest.raises(ConfigError, match="is no manifest of shards"):
        Shards(tmp_path / "out")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"OUT: .*out is something else already"):
        made(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@given(words=st.lists(st.sampled_from(["word", "other", "\n", "\n\n", " ", "  \n", "ä"]), max_size=60))
def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(words: list[str]) -> None:
    text = "".join(words)
    pieces = list(_pieces(iter([Document(text, 0.5), Document("b", 1.0)]), longest=8))
    assert "".join(piece.text for piece in pieces) == f"{text}b"
    assert [piece.ends for piece in pieces].count(True) == 2
    assert [piece.done for piece in pieces] == sorted(piece.done for piece in pieces)
    assert [token for piece in pieces[:-1] for token in BPE.encode(piece.text)] == BPE.encode(text)


def test_progress_is_reported_up_to_its_end_once(tmp_path: Path) -> None:
    rows: list[tuple[str, float, int]] = []
    show: OnProgress = lambda split, done, tokens: rows.append((split, done, tokens))  # noqa: E731
    made(tmp_path / "out", on_progress=show)
    assert [row for row in rows if row[1] == 1.0] == [
        ("val", 1.0, len(expected("val"))),
        ("train", 1.0, len(expected("train"))),
    ]


def test_documents_begin_with_the_token_that_the_tokenizer_puts_before_texts_if_asked(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library = Library.from_str(train_tokenizer(["some words\n" * 9], 270).content)
    library.add_special_tokens(["<s>"])
    begin = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").mkdir()
    for name, text in (("a.txt", "words"), ("b.txt", "some"), ("c.txt", "some words")):
        (tmp_path / "text" / name).write_text(text)
    options = {"path": str(tmp_path / "text"), "tokenizer": str(tmp_path / "tokenizer.json"), "cache": str(tmp_path)}
    plain, begun = TextCorpus(**options), TextCorpus(**options, bos=True)
    assert begun.tokenizer.begin == begin
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        expected = [begin]
        for token in plain.read(split).array().tolist():
            expected += [token, begin] if token == plain.tokenizer.end else [token]
        assert begun.read(split).array().tolist() == expected[:-1]
    for corpus, beginning in ((plain, []), (begun, [begin])):  # what generate begins with, of a run on shards
        folder = tmp_path / f"shards{len(beginning)}"
        write(folder, corpus, corpus.tokenizer, key="OUT", on_progress=corpus.on_progress)
        data = {"_target_": "apt_model.data.ShardsCorpus", "path": str(folder)}
        assert begin_of_texts({"data": data}, begun.tokenizer) == beginning
        assert begin_of_texts({"data": {"bos": bool(beginning)}}, begun.tokenizer) == beginning
    library.post_processor = processors.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"data\.bos: the tokenizer puts no token before a text"):
        TextCorpus(**options, bos=True).count("train")
