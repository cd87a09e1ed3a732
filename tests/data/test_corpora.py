from __future__ import annotations

import json
from pathlib import Path

import pytest

from apt_model.data import Corpus, JsonlCorpus, StdlibCorpus, TextCorpus
from apt_model.data.tokenizer import train_tokenizer
from apt_model.errors import ConfigError


def content(corpus: Corpus, split: str) -> bytes:
    return corpus.read(split).array().tobytes()


def test_the_standard_library_gives_two_splits_that_share_no_file() -> None:
    corpus = StdlibCorpus(val_fraction=0.05, seed=3)
    train, val = set(corpus.files("train")), set(corpus.files("val"))
    assert not train & val
    assert len(val) == round(0.05 * len(train | val))
    assert any(path.name == "argparse.py" for path in train | val)
    assert corpus.files("val") == StdlibCorpus(val_fraction=0.05, seed=3).files("val")
    assert corpus.files("val") != StdlibCorpus(val_fraction=0.05, seed=4).files("val")


def test_what_is_counted_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ä" * 50, encoding="utf-8")
    (tmp_path / "b.txt").write_text("b" * 30)
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n\n{"text": "ü\\n"}\n', encoding="utf-8")
    rows = str(tmp_path / "rows.jsonl")
    for corpus in (
        StdlibCorpus(),
        TextCorpus(path=str(tmp_path)),
        TextCorpus(path=str(tmp_path / "a.txt"), val_fraction=0.3),
        JsonlCorpus(train_path=rows, val_path=rows),
    ):
        for split in ("train", "val"):
            assert corpus.count(split) == len(corpus.read(split)) > 0


def test_a_single_file_gives_its_last_part_to_validation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789" * 10)
    corpus = TextCorpus(path=str(tmp_path / "a.txt"), val_fraction=0.1)
    whole = b"0123456789" * 10 + b"\0"
    assert content(corpus, "train") == whole[:91]
    assert content(corpus, "val") == whole[91:]


def test_a_folder_is_split_by_file_and_each_document_ends_in_byte_zero(tmp_path: Path) -> None:
    for name in ("a.md", "b.md", "c.txt"):
        (tmp_path / name).write_text(name * 5)
    corpus = TextCorpus(path=str(tmp_path), suffix=".md", val_fraction=0.5)
    assert sorted((content(corpus, "train"), content(corpus, "val"))) == [
        b"a.md" * 5 + b"\0",
        b"b.md" * 5 + b"\0",
    ]


def test_documents_of_jsonl_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": text, "id": 1}) for text in ("one", "zwölf\n")), encoding="utf-8")
    corpus = JsonlCorpus(train_path=str(path), val_path=str(path), text_key="body")
    assert content(corpus, "train").decode() == "one\0zwölf\n\0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"data\.train_path: .* is empty"),
        (b'{"text": "a"}\n{"text": ', r"data\.train_path: .*line 2 is not JSON"),
        (b'{"txt": "a"}\n', r"line 1 has no text under 'text' \(data\.text_key\): its keys are 'txt'"),
        (b'["a"]\n', r"line 1 has no text .* it is no object"),
        (b'{"text": 3}\n', r"line 1 has no text"),
        (b'{"text": "\xe4"}\n', r"is not UTF-8: byte 0xe4 at offset 10"),
    ],
)
def test_a_bad_jsonl_file_is_named_with_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        JsonlCorpus(train_path=str(path), val_path=str(path)).count("train")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    corpus = JsonlCorpus(train_path=str(path), val_path=str(path))
    assert corpus.count("train") == 2
    path.write_text('{"text": "abcd"}\n')
    assert corpus.count("train") == 5


def test_missing_empty_and_foreign_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: there is no file or folder 'nowhere'"):
        TextCorpus(path="nowhere").count("train")
    with pytest.raises(ConfigError, match=r"has no file with text that ends in '\.txt' \(data\.suffix\)"):
        TextCorpus(path=str(tmp_path)).count("train")
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ConfigError, match="is empty"):
        TextCorpus(path=str(tmp_path / "a.txt")).count("train")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"b\.txt is not UTF-8: byte 0xe9 at offset 3.*iconv"):
        TextCorpus(path=str(tmp_path / "b.txt")).read("train")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        (tmp_path / "c d.txt").write_bytes("ein Wörterbuch\n".encode(encoding))
        name = encoding.replace("6-", "6")
        with pytest.raises(ConfigError, match=rf"c d\.txt is not UTF-8, but .*iconv -f {name} -t utf-8 'c d\.txt'"):
            TextCorpus(path=str(tmp_path / "c d.txt")).read("train")
    with pytest.raises(ConfigError, match=r"data\.val_path: there is no file"):
        JsonlCorpus(train_path="x", val_path="nowhere.jsonl").count("val")


def test_other_tokens_are_those_of_the_documents_and_an_end_after_each(tmp_path: Path) -> None:
    texts = {"a.txt": "to be or not to be\n" * 9, "b.txt": "that is the question\n" * 9, "c.txt": "wörter\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    bpe = train_tokenizer(texts.values(), 300)
    (tmp_path / "tokenizer.json").write_text(bpe.content)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    rows = str(tmp_path / "rows.jsonl")
    chosen = {"tokenizer": str(tmp_path), "cache": str(tmp_path / "cache")}
    jsonl = JsonlCorpus(train_path=rows, val_path=rows, **chosen)
    expected = [token for text in texts.values() for token in (*bpe.encode(text), bpe.end)]
    assert jsonl.count("train") == len(expected)
    assert jsonl.read("train").array().tolist() == expected
    assert jsonl.read("train").array().dtype == "uint16"
    folder = TextCorpus(path=str(tmp_path), val_fraction=0.4, **chosen)
    both = [folder.read(split).array().tolist() for split in ("train", "val")]
    assert sorted(both[0] + both[1]) == sorted(expected)
    assert [both_split.count(bpe.end) for both_split in both] == [2, 1]


def test_a_single_file_is_cut_between_characters_for_other_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ä" * 50, encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(["ä"], 260).content)
    for val_fraction, characters in ((0.1, 4), (0.105, 5), (0.11, 5)):  # the last 10, 11 and 11 of 101 bytes
        corpus = TextCorpus(path=str(tmp_path / "a.txt"), val_fraction=val_fraction)
        parts = [document.text for split in ("train", "val") for document in corpus.documents(split)]
        assert "".join(parts) == "ä" * 50
        assert len(parts[1]) == characters


def test_tokens_are_made_once_and_again_where_text_or_tokenizer_have_changed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 50)
    (tmp_path / "t.json").write_text(train_tokenizer(["some words"], 260).content)
    told = []

    def count(fraction: float = 0.1) -> int:
        corpus = TextCorpus(
            path=str(tmp_path / "a.txt"),
            val_fraction=fraction,
            tokenizer=str(tmp_path / "t.json"),
            cache=str(tmp_path / "cache"),
        )
        corpus.on_progress = lambda split, done, tokens: told.append(split)
        return corpus.count("train")

    first = count()
    made = len(told)
    assert made > 0
    assert count() == first
    assert len(told) == made
    assert count(0.2) < first
    (tmp_path / "a.txt").write_text("more words " * 99)
    assert count() > first
    (tmp_path / "t.json").write_text(train_tokenizer(["some words more " * 3] * 9, 280).content)
    assert count() < 99 * len("more words ")
    assert len(list((tmp_path / "cache").iterdir())) == 4
