from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.data.tokenizer import END, ByteTokenizer, FileTokenizer, find_tokenizer, load_tokenizer, train_tokenizer
from apt_model.errors import ConfigError

TEXTS = ["low lower lowest " * 20, "new newer newest\n" * 20]
BPE = train_tokenizer(TEXTS, 270)


def test_training_merges_the_most_frequent_pairs_and_gives_the_same_each_time() -> None:
    assert BPE.vocab_size == 270
    assert BPE.end == 0
    merges = json.loads(BPE.content)["model"]["merges"]
    assert merges[0] == ["w", "e"], "80 of them, and at most 60 of any other pair"
    assert train_tokenizer(iter(TEXTS), 270).content == BPE.content
    assert len(BPE.encode("lowest")) < len(b"lowest")


def test_a_vocabulary_has_room_for_bytes_and_an_end_and_is_no_larger_than_the_text_gives() -> None:
    with pytest.raises(ConfigError, match=r"--train-tokenizer = 256 is too small: .* need 257"):
        train_tokenizer(TEXTS, 256)
    assert train_tokenizer(["ab"], 5000).vocab_size == 258


@given(text=st.text(max_size=40))
def test_any_text_comes_back(text: str) -> None:
    for tokenizer in (BPE, ByteTokenizer()):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert BPE.end not in BPE.encode(text)


def test_the_name_of_the_end_within_a_text_is_text() -> None:
    assert BPE.end not in BPE.encode(f"a {END} b")
    assert BPE.decode(BPE.encode(f"a {END} b")) == f"a {END} b"


def test_bytes_are_counted_across_tokens_that_end_within_a_character() -> None:
    documents = ["a日本語", "low lower", "é"]
    tokens = np.concatenate([[*BPE.encode(text), BPE.end] for text in documents])
    assert len(BPE.encode(documents[0])) == 10, "a token is a byte there"
    all_of_them = np.ones(len(tokens), dtype=bool)
    assert BPE.num_bytes(tokens, all_of_them) == (10 + 1) + (9 + 1) + (2 + 1)
    assert BPE.num_bytes(tokens[:5], all_of_them[:5]) == pytest.approx(5, abs=2), "a character that is cut"
    without_first = all_of_them.copy()
    without_first[[0, 11]] = False
    first = len(BPE.decode(tokens[11:12].tolist()))
    assert BPE.num_bytes(tokens, without_first) == (9 + 1) + (9 - first + 1) + (2 + 1)
    assert ByteTokenizer().num_bytes(np.frombuffer(b"ab\0c", dtype=np.uint8), np.array([False, True, True, True])) == 3


def test_what_begins_a_document_stands_for_no_byte() -> None:
    content = json.loads(BPE.content)
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 270, "content": "<s>"})
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [270], "tokens": ["<s>"]}},
    }
    tokenizer = FileTokenizer(json.dumps(content))
    assert tokenizer.begin == 270
    tokens = np.array([270, *tokenizer.encode("low"), tokenizer.end, 270, *tokenizer.encode("new"), tokenizer.end])
    assert tokenizer.num_bytes(tokens, np.arange(len(tokens)) > 0) == 3 + 1 + 3 + 1


def test_half_a_surrogate_pair_is_encoded_as_no_text() -> None:
    assert BPE.decode(BPE.encode("a\ud800b")) == "a\ufffdb"


def test_tokens_are_kept_in_the_smallest_integers_that_hold_them() -> None:
    assert ByteTokenizer().dtype == "uint8"
    assert BPE.dtype == "uint16"


def test_what_others_have_set_to_cut_and_to_fill_texts_is_left_out() -> None:
    content = json.loads(BPE.content)
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    tokenizer = FileTokenizer(json.dumps(content))
    assert tokenizer.encode("a b c d e") == BPE.encode("a b c d e")


def test_a_file_that_is_missing_or_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer: there is no file 'nowhere' .*--train-tokenizer"):
        find_tokenizer(Path("nowhere"))
    with pytest.raises(ConfigError, match=r"there is no file '.*tokenizer\.json'"):
        find_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"[1, 2", b"\xff\xfe", BPE.content.encode()[:-40]):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"data\.tokenizer: .*tokenizer\.json (is no tokenizer|cannot be read)"):
            load_tokenizer(find_tokenizer(tmp_path))
    path.write_text(BPE.content.replace(END, "<|stop|>"))
    with pytest.raises(ConfigError, match=r"has no token that ends a document\. It needs one of <\|endoftext\|>"):
        load_tokenizer(path)


changes = st.tuples(
    st.floats(0, 1),
    st.one_of(
        st.binary(max_size=3),
        st.sampled_from([b"0", b"-1", b"null", b'"', b"}", b"[]", b"\\u0000", b"99999999999"]),
    ),
    st.integers(0, 9),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(changes=st.lists(changes, min_size=1, max_size=3))
def test_a_changed_file_is_a_tokenizer_or_reported_in_words(changes: list[tuple[float, bytes, int]]) -> None:
    content = BPE.content.encode()
    for where, put, instead_of in changes:
        begin = round(where * len(content))
        content = content[:begin] + put + content[begin + instead_of :]
    with suppress(ConfigError):
        tokenizer = FileTokenizer(content.decode(errors="replace"))
        tokens = tokenizer.encode("the lowest")
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        tokenizer.decode(tokens)
