from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apt_model.data import HFCorpus, JsonlCorpus, ShardsCorpus, StdlibCorpus, TextCorpus
from apt_model.data.corpus import Corpus
from apt_model.data.shard_writer import write
from apt_model.data.sources import Run, Sources, joined
from apt_model.data.tokenizer import ByteTokenizer, train_tokenizer
from apt_model.errors import ConfigError


def test_each_token_has_the_source_of_its_run() -> None:
    sources = Sources([Run("b", 3), Run("a", 2), Run("b", 1)])
    assert sources.names == ["a", "b"]
    assert sources.of(np.array([0, 2]), 4).tolist() == [[1, 1, 1, 0], [1, 0, 0, 1]]


def test_of_many_sources_the_smallest_are_one() -> None:
    sources = Sources([Run("c", 5), Run("a", 1), Run("d", 9), Run("b", 2)], most=3)
    assert sources.names == ["c", "d", "others"]
    assert sources.of(np.arange(0, 17, 4), 1).tolist() == [[0], [0], [1], [1], [2]]


def test_neighbours_of_one_source_are_one_run() -> None:
    assert joined([Run("a", 1), Run("a", 2), Run("b", 3), Run("a", 4)]) == [("a", 3), ("b", 3), ("a", 4)]


def sources_by_token(corpus: Corpus) -> list[str]:
    """The source of each validation token."""
    tokens = corpus.read("val")
    assert tokens.sources is not None
    return [tokens.sources.names[i] for i in tokens.sources.of(np.arange(len(tokens)), 1)[:, 0]]


def folder(path: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    return path


def test_files_come_from_the_folder_they_are_in(tmp_path: Path) -> None:
    root = folder(tmp_path, {"law/a.txt": "aé", "law/deep/b.txt": "b", "top.txt": "t", "zoo/c.txt": "cc"})
    corpus = TextCorpus(path=str(root), val_fraction=0.75)  # three of the four
    files = [path.relative_to(root) for path in corpus.files("val")]
    by_hand = [
        part.parts[0] if len(part.parts) > 1 else "." for part in files for _ in range((root / part).stat().st_size + 1)
    ]
    assert sources_by_token(corpus) == by_hand
    assert len(set(by_hand)) > 1


def test_files_without_folders_are_sources_themselves(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a.txt": "12", "b.txt": "3", "c.txt": "456"})
    found = sources_by_token(TextCorpus(path=str(root), val_fraction=0.6))
    files = [path.name for path in TextCorpus(path=str(root), val_fraction=0.6).files("val")]
    assert found == [name for name in files for _ in range((root / name).stat().st_size + 1)]
    assert len(files) == 2
    assert TextCorpus(path=str(root / "a.txt"), val_fraction=0.5).read("val").sources is None, "one file is one source"


def test_the_standard_library_has_its_packages_as_sources() -> None:
    found = StdlibCorpus(val_fraction=0.5).read("val").sources
    assert found is not None
    assert {"asyncio", "others"} < set(found.names)
    assert len(found.names) == 16


ROWS = [("law", "aé"), ("law", "b"), ("zoo", "ccc"), ("law", "d")]


def rows(path: Path, key: str = "from") -> str:
    path.write_text("".join(json.dumps({"text": text, key: source}) + "\n" for source, text in ROWS), encoding="utf-8")
    return str(path)


def test_json_documents_say_it_under_a_key(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl")
    by_hand = ["law"] * (4 + 2) + ["zoo"] * 4 + ["law"] * 2
    assert sources_by_token(JsonlCorpus(train_path=path, val_path=path, source_key="from")) == by_hand
    assert JsonlCorpus(train_path=path, val_path=path).read("val").sources is None
    with pytest.raises(ConfigError, match=r"line 1 has no source under 'form' \(data\.source_key\): its keys are"):
        JsonlCorpus(train_path=path, val_path=path, source_key="form").read("val")


def test_columns_of_a_dataset_say_it_too(tmp_path: Path) -> None:
    files = {"train": rows(tmp_path / "rows.jsonl"), "validation": rows(tmp_path / "val.jsonl")}
    options = {"path": "json", "data_files": files, "cache": str(tmp_path / "cache")}
    assert sources_by_token(HFCorpus(**options, source_key="from")) == ["law"] * 6 + ["zoo"] * 4 + ["law"] * 2
    assert HFCorpus(**options).read("val").sources is None
    with pytest.raises(ConfigError, match=r"data\.source_key: 'json' has no column 'form'\. Did you mean 'from'"):
        HFCorpus(**options, source_key="form").read("val")


def test_shards_keep_the_sources_of_validation(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl")
    corpus = JsonlCorpus(train_path=path, val_path=path, source_key="from")
    write(tmp_path / "bytes", corpus, ByteTokenizer(), key="OUT", on_progress=corpus.on_progress, shard_tokens=5)
    assert sources_by_token(ShardsCorpus(path=str(tmp_path / "bytes"))) == sources_by_token(corpus)
    assert ShardsCorpus(path=str(tmp_path / "bytes")).read("train").sources is None

    bpe = train_tokenizer([text for _, text in ROWS] * 9, 270)
    write(tmp_path / "bpe", corpus, bpe, key="OUT", on_progress=corpus.on_progress, shard_tokens=3)
    assert sources_by_token(ShardsCorpus(path=str(tmp_path / "bpe"))) == [
        s for s, t in ROWS for _ in (*bpe.encode(t), bpe.end)
    ]


def test_a_manifest_that_names_the_sources_of_other_tokens_is_damaged(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl")
    corpus = JsonlCorpus(train_path=path, val_path=path, source_key="from")
    write(tmp_path / "out", corpus, ByteTokenizer(), key="OUT", on_progress=corpus.on_progress)
    manifest = tmp_path / "out" / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["splits"]["val"]["sources"] == [["law", 6], ["zoo", 4], ["law", 2]]
    content["splits"]["val"]["sources"][1][1] = 5
    manifest.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged: its sources are those of other tokens"):
        ShardsCorpus(path=str(tmp_path / "out")).count("val")
