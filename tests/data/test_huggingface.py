"""Corpora read by the real library, from local files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apt_model.data import HFCorpus
from apt_model.data.tokenizer import train_tokenizer
from apt_model.errors import ConfigError
from tests.forks import HANGS
from tests.late import Late

datasets = Late("datasets")

TEXTS = [f"document {i}, {i * i} squared\n" for i in range(50)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in several formats; in ``saved`` the last ten validate."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"text": text, "number": i} for i, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = datasets.Dataset.from_list(rows)
    whole.to_parquet(str(folder / "rows.parquet"))
    parts = {"train": whole.select(range(40)), "validation": whole.select(range(40, 50))}
    datasets.DatasetDict(parts).save_to_disk(str(folder / "saved"))
    whole.save_to_disk(str(folder / "single"))
    return folder


@pytest.fixture
def corpus(files: Path, tmp_path: Path) -> Any:
    def corpus(path: str, data_files: str | None = None, **options: Any) -> HFCorpus:
        path = str(files / path) if (files / path).exists() else path
        data_files = str(files / data_files) if data_files else None
        return HFCorpus(path=path, data_files=data_files, cache=str(tmp_path / "cache"), **options)

    return corpus


def texts(corpus: HFCorpus, split: str) -> list[str]:
    whole = bytes(corpus.read(split).array()).decode()
    assert corpus.count(split) == len(whole)
    return whole.split("\0")[:-1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "chosen", [("json", "rows.jsonl"), ("parquet", "rows.parquet"), ("parquet", "*.parquet"), ("single", None)]
)
def test_the_first_documents_of_a_single_split_validate(corpus: Any, chosen: tuple[str, Any], streaming: bool) -> None:
    bound = {"max_documents": 30} if streaming else {}
    made = corpus(*chosen, val_split=None, val_documents=7, streaming=streaming, **bound)
    assert texts(made, "val") == TEXTS[:7]
    assert texts(made, "train") == TEXTS[7 : 37 if streaming else 50]


def test_a_saved_dataset_has_its_own_splits_and_a_bound_for_each(corpus: Any) -> None:
    assert texts(corpus("saved"), "train") == TEXTS[:40]
    assert texts(corpus("saved"), "val") == TEXTS[40:]
    assert texts(corpus("saved", max_documents=12), "train") == TEXTS[:12]
    assert texts(corpus("saved", max_documents=12), "val") == TEXTS[40:]
    cut = corpus("saved", max_tokens=100)
    assert (cut.count("train"), cut.count("val")) == (100, 100)
    assert bytes(cut.read("train").array()) == "\0".join(TEXTS).encode()[:100]


def test_tokens_are_those_of_the_tokenizer(corpus: Any, tmp_path: Path) -> None:
    bpe = train_tokenizer(TEXTS, 300)
    (tmp_path / "t.json").write_text(bpe.content)
    made = corpus("saved", tokenizer=str(tmp_path / "t.json"))
    expected = [token for text in TEXTS[40:] for token in (*bpe.encode(text), bpe.end)]
    assert made.read("val").array().tolist() == expected


def test_a_changed_file_is_read_again(corpus: Any, files: Path) -> None:
    path = files / "more.jsonl"
    path.write_text('{"text": "a"}\n{"text": "bc"}\n')
    options = {"val_split": None, "val_documents": 1}
    assert corpus("json", "more.jsonl", **options).count("train") == 3
    path.write_text('{"text": "a"}\n{"text": "bcde"}\n')
    assert corpus("json", "more.jsonl", **options).count("train") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"path": "saved", "val_split": "test"},
            r"data\.val_split: .* no split 'test'\. Valid names: train, validation",
        ),
        ({"path": "json", "data_files": "rows.jsonl"}, r"data\.val_split: Unknown split .*data\.val_split=null"),
        ({"path": "saved", "train_split": "tran"}, r"data\.train_split: .* Did you mean 'train'"),
        ({"path": "saved", "text_key": "txt"}, r"data\.text_key: .* has no column 'txt'\. Did you mean 'text'"),
        ({"path": "saved", "text_key": "number"}, r"document 0 of the split 'validation' .* no text under 'number'"),
        (
            {"path": "json", "data_files": "rows.jsonl", "val_split": None, "text_key": "txt"}
            | {"streaming": True, "max_tokens": 9},
            r"data.*'txt'",
        ),
        ({"path": "json", "data_files": "nowhere.jsonl"}, r"data\.path: datasets cannot .* FileNotFoundError"),
        ({"path": "nobody/nothing"}, r"data\.path: datasets cannot give the split .* of 'nobody/nothing': "),
    ],
)
def test_mistakes_are_reported_in_words(corpus: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        corpus(**options).count("train")


@pytest.mark.parametrize(
    ("name", "content"), [("json", b'{"text": "a"}\n{"text": '), ("json", b"\xff\xfe"), ("parquet", b"PAR1 no")]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_file_is_reported_in_words(
    corpus: Any, files: Path, tmp_path: Path, name: str, content: bytes, streaming: bool
) -> None:
    path = files / f"damaged-{len(content)}.{name}"
    path.write_bytes(content)
    bound = {"max_tokens": 100} if streaming else {}
    with pytest.raises(ConfigError, match=r"data\.path: datasets cannot give the split 'train' of "):
        corpus(name, path.name, val_split=None, val_documents=1, streaming=streaming, **bound).count("train")


rows = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}), st.text(max_size=30)),
    st.sampled_from(
        ['{"text": 1}', '{"other": "x"}', "[]", "{", "", '{"text": null}', '"text"', "\ufeff{}", "[" * 3000]
    ),
)
contents = st.one_of(
    st.binary(max_size=200),
    st.lists(rows, max_size=5).map(lambda some: "\n".join(some).encode("utf-8", "surrogatepass")),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(content=contents, name=st.sampled_from(["json", "parquet", "text"]), streaming=st.booleans())
def test_whatever_is_in_a_file_is_text_or_reported_in_words(content: bytes, name: str, streaming: bool) -> None:
    assume(
        not content.lstrip().startswith(b"null")
    )  # pyarrow 26.0.1 dies of it: python -c "pyarrow.json.read_json(...)"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        path.write_bytes(content)
        options = {"val_split": None, "val_documents": 1, "streaming": streaming, "max_tokens": 500}
        with suppress(ConfigError):
            corpus = HFCorpus(path=name, data_files=str(path), cache=f"{folder}/cache", **options)
            assert corpus.count("train") == len(corpus.read("train")) <= 500


def test_a_stream_without_a_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.streaming: .* Set data\.max_tokens or data\.max_documents"):
        HFCorpus(path="x", streaming=True)


def test_counting_loads_no_torch(files: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from apt_model.data import HFCorpus\n"
        f"corpus = HFCorpus(path={str(files / 'saved')!r}, cache={str(tmp_path)!r})\n"
        "print(corpus.count('train'), 'torch' in sys.modules)\n"
        f"corpus = HFCorpus(path='json', data_files={str(files / 'rows.jsonl')!r}, cache={str(tmp_path)!r},\n"
        "    val_split=None, val_documents=3)\n"
        "print(corpus.count('train'), 'torch' in sys.modules)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANGS
    ).stdout
    assert told.splitlines() == [f"{sum(map(len, TEXTS[:40])) + 40} False", f"{sum(map(len, TEXTS[3:])) + 47} False"]
