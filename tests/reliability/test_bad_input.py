"""Whatever stands on the command line, in a profile, in a schedule or in a data file: a clear message and exit code 2, or a
run. Never a traceback, a hang, or a file outside the run's folder. ``APT_EXAMPLES`` is how many of each kind are tried.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_launch.config.profile_file import KEYS
from apt_launch.config.schema import all_keys
from apt_model.data import TextCorpus
from apt_model.data.shard_writer import write
from apt_model.data.tokenizer import FileTokenizer, train_tokenizer
from apt_model.schedule.curves import SHAPES
from tests.conftest import SMALL
from tests.forks import Forks

EXAMPLES = int(os.environ.get("APT_EXAMPLES", "10"))
tried = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="APT_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TINY = (*SMALL, "trainer.max_epochs=2", "trainer.max_batches_per_epoch=2", "trainer.validation_batches=1")
TEXT = "".join(f"line {i} of some text, {i * i} squared\n" for i in range(60))

words = st.one_of(
    st.sampled_from(
        ["null", "true", "gpt", "hot", "1e", "1.5.2", "10%", "5ep", "-1%", "101%", "0x10", "1_000", "auto"]
    ),
    st.text(alphabet="abzAZ019_-.%$:,;(){}[]'\"\\ \t#&*!|>@~üé漢\x7f", max_size=12),
    st.sampled_from(
        ["${seed}", "${nowhere}", "${oc.env:NOWHERE}", "${oc.env:HOME}", "???", "${hydra:job.name}", "../.."]
    ),
)
numbers = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([0.5, -0.5, 1e-300, 1e300, float("inf"), float("nan"), 2**63, -(2**70), 1.5]),
)
values = st.one_of(
    words, numbers.map(str), st.sampled_from(["[]", "{}", "[1,2]", "{a:1}", "[[", "{a:", "1,2", "range(3)"])
)
PLACES = {"hydra.run.dir", "hydra.sweep.dir", "profile_file", "trainer.resume"}  # these name a place, wherever it is
keys = st.one_of(
    st.sampled_from(sorted(set(all_keys()) - PLACES)),
    st.sampled_from(
        ["schedule.rout_temp.end", "trainer", "model.", ".seed", "se ed", "hydra", "hydra.x", "seed.x", "", "Ω"]
    ),
)
overrides = st.builds(
    lambda sign, key, value: f"{sign}{key}={value}", st.sampled_from(["", "", "", "+", "++", "~"]), keys, values
)

plausible = st.sampled_from(
    [
        *(
            "seed=7",
            "moe.top_k=1",
            "moe.num_experts=3",
            "moe.router=sigmoid",
            "moe.capacity_factor=0.1",
            "align.alpha=1",
        ),
        *(
            "schedule.route_temp.end=1e-3",
            "schedule.enable_moe_at_epoch=0",
            "schedule.enable_voter_at_epoch=99",
            "align.rank=1",
        ),
        *(
            "schedule=none",
            "optimizer.lr=1e-30",
            "optimizer.eps=1e-300",
            "trainer.grad_clip=1e-30",
            "trainer.accumulate=3",
        ),
        *(
            "model.dropout=0.99",
            "model.label_smoothing=0.5",
            "trainer.lr_schedule=null",
            "voter.num_votes=1",
            "trainer.resume=auto",
        ),
        *(
            "data.val_fraction=0.9",
            "trainer.max_batches_per_epoch=null",
            "logger=csv",
            "hydra.verbose=true",
            "hydra.output_subdir=null",
        ),
    ]
)

outcomes: Counter[str] = Counter()


def check(forks: Forks, *command: str, files: dict[str, bytes] | None = None) -> int:
    """Run the command in a folder of its own and judge it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, content in {"text.txt": TEXT.encode(), **(files or {})}.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
        before = set(folder.iterdir())
        ended = forks.run(*command, cwd=folder)
        told = f"{command}\n{ended.out}\n{ended.err}"
        assert ended.code in (0, 1, 2), told
        assert "Traceback" not in ended.out + ended.err, told
        left = set(folder.iterdir()) - before
        if ended.code == 2:
            assert "error:" in ended.err or "error" in ended.err.lower(), told
            assert not left, told
        else:
            assert left <= {folder / "outputs", folder / "run"}, told
        if ended.code == 1:  # values that are allowed and that no training survives
            assert "is nan" in ended.err or "is inf" in ended.err or "is -inf" in ended.err, told
        outcomes[f"exit {ended.code}"] += 1
        return ended.code


@pytest.mark.slow
@tried
@given(given_overrides=st.lists(st.one_of(overrides, plausible), min_size=1, max_size=2))
def test_overrides(forks: Forks, given_overrides: list[str]) -> None:
    check(forks, "data=text", "data.path=text.txt", *TINY, *given_overrides)


anneals = st.fixed_dictionaries(
    {},
    optional={
        "start": st.one_of(st.floats(0.1, 3), st.floats(0.1, 3), numbers, words),
        "end": st.one_of(st.floats(0.1, 3), st.floats(0.1, 3), numbers, words),
        "by": st.one_of(st.sampled_from(["epoch", "step", "sample", "token", "epochs", "hour"]), words),
        "type": st.one_of(st.sampled_from([*sorted(SHAPES), "linaer", "cosin"]), words),
        "warmup": st.one_of(numbers, st.sampled_from(["10%", "100%", "3ep", "0.5"]), words),
        "target": st.one_of(
            st.sampled_from(["optimizer.lr", "router.temperature", "nowhere", "label_smoothing"]), words
        ),
        "begin": st.one_of(numbers, words),
        "until": st.one_of(numbers, words),
        "end_at": numbers,
    },
)
right = st.fixed_dictionaries(
    {"end": st.floats(1, 3), "start": st.floats(1, 3)},
    optional={
        "by": st.sampled_from(["epoch", "step"]),
        "type": st.sampled_from(sorted(SHAPES)),
        "warmup": st.integers(0, 1),
    },
)
schedules = st.dictionaries(
    st.sampled_from(["route_temp", "moe_capacity", "enable_moe_at_epoch"]), right, max_size=2
) | st.dictionaries(
    st.one_of(
        st.sampled_from(
            [
                *(
                    "route_temp",
                    "moe_capacity",
                    "align_weight",
                    "vote_threshold",
                    "rout_temp",
                    "anneals",
                    "events",
                    "freeze",
                ),
                *("enable_moe_at_epoch", "enable_align_at_step", "enable_voter_at_epoch", "disable_moe_at_epoch"),
            ]
        ),
        words,
    ),
    st.one_of(anneals, numbers, words, st.none(), st.dictionaries(st.sampled_from(["a", "lr"]), anneals, max_size=2)),
    max_size=4,
)


@pytest.mark.slow
@tried
@given(schedule=schedules)
def test_schedules(forks: Forks, schedule: dict[str, Any]) -> None:
    content = yaml.safe_dump({"schedules": schedule}, allow_unicode=True).encode()
    files = {"profile.yaml": content}
    check(forks, "profile_file=profile.yaml", "data=text", "data.path=text.txt", *TINY, files=files)


profiles = st.one_of(
    st.dictionaries(
        st.sampled_from(sorted({key.split(".")[0] for key in KEYS} | {"extra", "schedules", "hydra"})),
        st.one_of(
            st.dictionaries(
                st.sampled_from(sorted({key.split(".", 1)[1] for key in KEYS if "." in key} | {"moe", "_target_"})),
                st.one_of(numbers, words, st.none(), st.dictionaries(words, numbers, max_size=2)),
                max_size=4,
            ),
            numbers,
            words,
            st.none(),
        ),
        max_size=4,
    ).map(lambda content: yaml.safe_dump(content, allow_unicode=True).encode()),
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@pytest.mark.slow
@tried
@given(profile=profiles)
def test_profile_files(forks: Forks, profile: bytes) -> None:
    files = {"profile.yaml": profile}
    check(forks, "profile_file=profile.yaml", "data=text", "data.path=text.txt", *TINY, files=files)


lines = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}), st.text(min_size=60, max_size=300)),
    st.sampled_from(
        ['{"text": 1}', '{"other": "x"}', "[]", "{", "", "null", '{"text": null}', '"text"', "\ufeff{}", "[" * 3000]
    ),
)
data = st.one_of(
    st.binary(max_size=400),
    st.lists(lines, max_size=6).map(lambda some: "\n".join(some).encode("utf-8", "surrogatepass")),
    st.text(min_size=120, max_size=600).map(lambda text: text.encode("utf-8", "surrogatepass")),
)


@pytest.mark.slow
@tried
@given(content=data, kind=st.sampled_from(["text", "jsonl"]))
def test_data_files(forks: Forks, content: bytes, kind: str) -> None:
    named = (
        ["data.path=data", "data.val_fraction=0.5"]
        if kind == "text"
        else ["data.train_path=data", "data.val_path=text.jsonl"]
    )
    good = "\n".join(json.dumps({"text": line}) for line in TEXT.splitlines()).encode()
    check(forks, f"data={kind}", *named, *TINY, "schedule=none", files={"data": content, "text.jsonl": good})


BPE = train_tokenizer([TEXT], 270).content


@cache
def shards() -> dict[str, bytes]:
    """A folder of shards, by file."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "text.txt").write_text(TEXT * 5)
        corpus = TextCorpus(path=f"{name}/text.txt", val_fraction=0.2)
        write(
            Path(name) / "out", corpus, FileTokenizer(BPE), key="OUT", on_progress=corpus.on_progress, shard_tokens=900
        )
        return {f"out/{path.name}": path.read_bytes() for path in sorted((Path(name) / "out").iterdir())}


changes = st.tuples(
    st.floats(0, 1),
    st.one_of(
        st.binary(max_size=3), st.sampled_from([b"0", b"-1", b"null", b'"', b"}", b"[]", b"\\u0000", b"99999999999"])
    ),
    st.integers(0, 5),
)


def changed(content: bytes, where: float, put: bytes, instead_of: int) -> bytes:
    begin = round(where * len(content))
    return content[:begin] + put + content[begin + instead_of :]


@pytest.mark.slow
@settings(tried, max_examples=max(1, EXAMPLES // 2))
@given(change=changes, number=st.integers(0, 9))
def test_shards(forks: Forks, change: tuple[float, bytes, int], number: int) -> None:
    files = dict(shards())
    name = sorted(files)[number % len(files)]
    if number < 8:
        files[name] = changed(files[name], *change)
    code = check(forks, "data=shards", "data.path=out", *TINY, "schedule=none", "model.vocab_size=300", files=files)
    assert code == 2 or files == shards() or name == "out/manifest.json"  # where a space more does no harm
    assert code == 0 or files != shards()


def test_something_of_both_was_met() -> None:
    """Nothing is shown by inputs that are all refused, or all harmless."""
    if outcomes:
        assert outcomes["exit 0"] >= 5, outcomes
        assert outcomes["exit 2"] >= 20, outcomes
    print(json.dumps(outcomes))
