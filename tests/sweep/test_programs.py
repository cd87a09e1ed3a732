"""What a program of somebody else is frozen as, and what a job gives to it: in this process."""

from __future__ import annotations

import enum
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError

from apt_launch.record import read_rows
from apt_launch.secrets import is_named_secret
from apt_launch.sweep import job
from apt_launch.sweep.application import HYDRA_MAIN, Program, load
from apt_launch.sweep.control.resume import refuse_shared
from apt_launch.sweep.plan.composer import typed_secret
from apt_launch.sweep.plan.plan import merged_order, shared_values
from apt_launch.sweep.programs.command_line import sweep_of
from apt_launch.sweep.programs.freeze import TYPES, Freezer, revealed, thaw
from apt_launch.sweep.programs.metrics import Follower
from apt_launch.sweep.programs.secrets import read_secrets, write_secrets
from apt_launch.sweep.programs.snapshot import checkout_of, take
from apt_launch.values import flatten, from_yaml, to_yaml, unflatten
from apt_model.errors import ConfigError, Interrupted
from tests.forks import REPOSITORY


class Colour(enum.Enum):
    RED = 1


@dataclass
class Part:
    size: int = 1
    colour: Colour = Colour.RED
    place: Path = Path("a")


@dataclass
class Larger(Part):
    more: list[Part] = field(default_factory=lambda: [Part(), Larger(size=3, more=[])])
    table: dict[int, float] = field(default_factory=lambda: {10: 0.1})
    empty: int = MISSING


@dataclass(frozen=True)
class Fixed:
    size: int = 1


@dataclass
class Whole:
    part: Fixed = field(default_factory=Fixed)


@dataclass
class Either:
    value: Union[int, str] = 1  # noqa: UP007 - OmegaConf 2.3 knows no other way to write it on Python 3.10


def frozen_and_back(content: Any) -> Any:
    """Freeze a config, write and read it as a plan does, and make a config of it again."""
    values = Freezer().freeze(OmegaConf.create(content))
    plain = json.loads(json.dumps(from_yaml(to_yaml(values))))
    return thaw(unflatten(flatten(plain)))


@pytest.mark.parametrize(
    "value",
    [
        *(
            "a",
            "",
            "null",
            "1",
            "1e3",
            "2020-01-01",
            "yes",
            "???x",
            "a: b",
            "${literal}",
            "\\${x}",
            "\\",
            "a\\",
            "äöü\n",
        ),
        *(0, -1, 1 << 70, 0.1, 1e-300, float("inf"), True, None, b"\x00\xff", Path("a b/c"), Colour.RED),
        *([], [1, [2, {"a": 3}]], {}, {"a": {}}, {1: "one", False: 2, "a.b": {"c": 1}}, {"$path": "no path"}),
    ],
)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    content = {"value": value.replace("${", "\\${") if value == "${literal}" else value, "after": 1}
    before = OmegaConf.create(content)
    after = frozen_and_back(content)
    assert after.value == before.value
    assert type(after.value) is type(before.value)
    assert list(after) == ["value", "after"]


def test_keys_that_are_no_plain_words_come_back_beside_hydras_node() -> None:
    content = {"a.b": 1, 3: "c", "$v": [2], "hydra": {"job": {"num": 0}}, "plain": {"$pairs": 1, "b": 2}}
    assert OmegaConf.to_container(frozen_and_back(content)) == content
    assert Freezer().freeze(OmegaConf.create(content))["hydra"] == {"job": {"num": 0}}


@pytest.mark.parametrize("value", [3, "3", "a", "${oc.env:NOT_SET_ANYWHERE}"])
def test_a_value_of_two_types_comes_back_as_the_one_that_it_had(value: Any) -> None:
    config = OmegaConf.create({"either": OmegaConf.structured(Either(value))})
    back = thaw(json.loads(json.dumps(Freezer().freeze(config))))
    assert OmegaConf.to_container(back) == {"either": {"value": value}}
    assert type(OmegaConf.to_container(back)["either"]["value"]) is type(value)


@pytest.mark.parametrize(
    "config", [OmegaConf.structured(Whole), OmegaConf.create({"part": OmegaConf.structured(Fixed)})]
)
def test_what_a_frozen_class_holds_stays_as_it_is(config: DictConfig) -> None:
    config.part = Fixed(3)
    back = thaw(json.loads(json.dumps(Freezer().freeze(config))))
    assert back.part.size == 3
    with pytest.raises(ReadonlyConfigError):
        back.part.size = 4


def test_structured_nodes_keep_their_classes_and_rules() -> None:
    cfg = frozen_and_back({"part": Larger(size=7), "copy": "${part.more}", "plain": {"size": 1}})
    assert OmegaConf.get_type(cfg.part) is Larger
    assert [OmegaConf.get_type(one) for one in cfg["copy"]] == [Part, Larger]
    assert OmegaConf.get_type(cfg.plain) is dict
    assert cfg.part.more[1].colour is Colour.RED
    assert cfg.part.table == {10: 0.1}
    assert OmegaConf.is_missing(cfg.part, "empty")
    with pytest.raises(Exception, match="size"):
        cfg.part.size = "no number"
    with pytest.raises(Exception, match="nowhere"):
        cfg.nowhere = 1


def test_what_is_known_is_resolved_and_the_rest_stays_an_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIN", "value")
    monkeypatch.setenv("MY_API_KEY", "c4n4ry-0123456789")
    values = Freezer().freeze(
        OmegaConf.create(
            {
                "a": 1,
                "b": "${a}-${oc.env:PLAIN}",
                "c": "${oc.env:NOT_SET_HERE}",
                "d": "${hydra:runtime.output_dir}",
                "secret": "${oc.env:MY_API_KEY}",
                "url": "https://me:${secret}@host",
                "text": "it is c4n4ry-0123456789",
                "missing": "???",
                "on_missing": "${missing}",
            }
        )
    )
    assert values == {
        "a": 1,
        "b": "1-value",
        "c": "${oc.env:NOT_SET_HERE}",
        "d": "${hydra:runtime.output_dir}",
        "secret": "${oc.env:MY_API_KEY}",
        "url": "https://me:${secret}@host",
        "text": "it is ${oc.env:MY_API_KEY}",
        "missing": "???",
        "on_missing": "${missing}",
        TYPES: [],
    }
    cfg = thaw(values)
    assert cfg.url == "https://me:c4n4ry-0123456789@host"
    with pytest.raises(ConfigError, match=r"key: its value looks like a secret.*oc\.env:NAME"):
        Freezer().freeze(OmegaConf.create({"key": "sk-abcdefghijklmnopqrstuvwxyz"}))


SECRETS = [
    *(
        "wandb.api_key",
        "api_key",
        "openai.apiKey",
        "db.password",
        "DB_PASSWORD",
        "smtp.passwd",
        "pgpassword",
        "ssh.passphrase",
    ),
    *("client_secret", "aws.secret_access_key", "secrets.db", "credentials.user", "hub_token", "hf.auth-token", "pwd"),
    *("accounts.0.password", "api_keys.0", "hydra.job.env_set.WANDB_API_KEY"),
]
HARMLESS = [
    *(
        "password_file",
        "api_key_name",
        "tokenizer",
        "token_type",
        "secret_sauce",
        "credentials_path",
        "keys",
        "compass",
    ),
    *("max_tokens", "key", "passes", "private"),
]


def test_a_variable_that_jobs_have_of_the_config_or_of_slurm_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OF_JOB", raising=False)
    monkeypatch.setenv("OF_ALL", "all")
    content = {
        "a": "${oc.env:OF_JOB,none}",
        "b": "${oc.env:OF_ALL,none}",
        "c": "x${a}",
        "d": "${oc.env:SLURM_JOB_ID,local}",
        "e": "${oc.env:OF_NOBODY,none}",
        "hydra": {"job": {"env_set": {"OF_JOB": "bar"}}, "launcher": {"cpus": "${oc.env:OF_JOB,2}"}},
    }
    frozen = Freezer().freeze(OmegaConf.create(content))
    assert frozen["hydra"]["launcher"] == {"cpus": "2"}
    del frozen["hydra"], frozen[TYPES]
    assert frozen == {
        "a": "${oc.env:OF_JOB,none}",
        "b": "all",
        "c": "x${a}",
        "d": "${oc.env:SLURM_JOB_ID,local}",
        "e": "none",
    }


def test_a_secret_is_known_by_the_name_of_its_key_and_by_nothing_that_only_looks_alike(tmp_path: Path) -> None:
    for key in SECRETS:
        assert is_named_secret(key, "c4n4ry-0123"), key
    for key in ("token", "my_service_token"):
        assert is_named_secret(key, "c4n4ry-01234")
        assert not is_named_secret(key, "character")
    for key in HARMLESS:
        assert not is_named_secret(key, "c4n4ry-0123"), key
    for word in ("<pad>", "[PAD]", "</s>", "<|endoftext|>", "PAD", "cls", 0):
        assert not is_named_secret("tokenizer.pad_token", word), word
    for value in (None, True, "", "???", "${oc.env:NAME}", "http://${oc.env:NAME}@host", str(tmp_path)):
        assert not is_named_secret("db.password", value), value
    assert is_named_secret("db.password", 123456)


def test_what_stands_in_a_config_in_clear_is_kept_apart_with_all_that_is_built_of_it(tmp_path: Path) -> None:
    freezer = Freezer()
    for first, second in (("c4n4ry-0", 1), ("c4n4ry-1", 1)):
        cfg = OmegaConf.create(
            {
                "db": {"password": first, "port": second, "pin": {"api_key": 4711}},
                "url": "x:${db.password}@${db.port}",
                "both": "${db}",
                "keys": [{"api_key": first}],
                "text": "\\${a} b",
            }
        )
        OmegaConf.set_readonly(cfg, True)
        values = freezer.freeze(cfg)
        assert "c4n4ry" not in json.dumps(values)
        assert "4711" not in json.dumps(values)
        assert cfg.db.password == first
        assert cfg.db.pin.api_key == 4711
        assert values["url"] == "x:${db.password}@${db.port}"
        write_secrets(tmp_path, freezer.kept)
        after = thaw(revealed(values, read_secrets(tmp_path)))
        assert OmegaConf.to_container(after, resolve=True) == OmegaConf.to_container(cfg, resolve=True)
    assert freezer.kept == {"0": "c4n4ry-0", "1": 4711, "2": "c4n4ry-1"}
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "secrets.json").write_text('{"version": 2, "values": []}')
    with pytest.raises(ConfigError, match=r"secrets\.json: damaged"):
        read_secrets(tmp_path)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        *(
            ("db.password=abc", "db.password"),
            ("+a.api_key=x,y", "a.api_key"),
            ("db={user: a, password: b}", "db.password"),
        ),
        *(("++pin.password=range(1,3)", "pin.password"), ("password=choice('a b',c)", "password")),
        *(("db.password='${oc.env:X}'", None), ("~db.password", None), ("db.user=a", None), ("db.password=", None)),
    ],
)
def test_a_secret_of_the_command_line_is_found_in_whatever_the_grammar_has(override: str, key: str | None) -> None:
    assert typed_secret(OverridesParser.create().parse_override(override)) == key


def test_a_programs_command_line_for_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.py").touch()
    python, ours = sys.executable, ["hydra/sweeper=apt", "hydra/launcher=apt_local"]
    assert sweep_of(["a b.py", "lr=1,2"]) == [python, "a b.py", "--multirun", "lr=1,2", *ours]
    assert sweep_of(
        ["-m", "lab.train", "-m", "lr=1", "--config-name", "big", "--dry-run", "hydra/launcher=apt_slurm"]
    ) == [
        *(python, "-m", "lab.train", "--multirun", "--config-name", "big", "lr=1", "hydra/launcher=apt_slurm"),
        *("hydra/sweeper=apt", "hydra.sweeper.dry_run=true"),
    ]
    for words, message in (
        ([], "a program first"),
        (["-m"], "a program first"),
        (["lr=1"], "a program first"),
        (["-m", "lab.train", "a=1", "--cfg=job"], "the program itself: python -m lab.train --cfg=job"),
        (["lab.train"], r"no file lab\.train .*run -m lab\.train"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep_of(words)


@pytest.mark.parametrize(
    ("one", "other"), [([1], [1.0]), ([1], [True]), ({"a": 1}, {"a": True}), (0.0, -0.0), (1, "1")]
)
def test_jobs_share_what_is_equal_to_the_last_type(one: Any, other: Any) -> None:
    assert shared_values([{"x": one, "y": 2}, {"x": other, "y": 2}]) == {"y": 2}
    assert shared_values([{"x": one}, {"x": one}]) == {"x": one}


def test_keys_keep_the_order_of_the_config_also_where_some_differ() -> None:
    flats = [{"a": 1, "lr": 1, "m.x": 1, "m.y": 1, "z": 1}, {"a": 1, "lr": 2, "m.w": 1, "m.y": 1, "z": 1}]
    order = merged_order(flats)
    assert sorted(order) == ["a", "lr", "m.w", "m.x", "m.y", "z"]
    for flat in flats:
        assert [key for key in order if key in flat] == list(flat)


def test_identities_leave_out_what_is_neutral_and_hydras_own_but_for_what_programs_find() -> None:
    def identity(neutral: tuple[str, ...] = (), **values: Any) -> str:
        application = load(HYDRA_MAIN, Program(script="/a.py", neutral=neutral))
        return application.check({"lr": 1, "hydra": {"launcher": {}}, **values}).identity

    assert identity(wandb={"name": "a"}) != identity(wandb={"name": "b"})
    for pattern in ("wandb", "wandb.*", "*.name"):
        assert identity((pattern,), wandb={"name": "a"}) == identity((pattern,), wandb={"name": "b"})
    assert identity(hydra={"sweep": {"dir": "a"}}) == identity(hydra={"sweep": {"dir": "b"}})
    assert identity(hydra={"job": {"env_set": {"A": "1"}}}) != identity(hydra={"job": {"env_set": {"A": "2"}}})


@pytest.mark.parametrize(
    ("subdir", "name"),
    [
        ("${hydra.job.num}", "3"),
        ("${hydra.job.id}", "3"),
        ("${hydra.job.name}_${hydra.job.num}", "train_3"),
        ("${hydra.job.num}_${hydra.job.override_dirname}", "3_lr=0.1"),
        ("${lr}_${hydra:job.num}", "0.1_3"),
        ("${net.name}/${hydra:job.name}", "small/train"),
        ("${unknown:${hydra.job.num}}", "own"),
        ("${hydra.job.num}_${oc.env:NOT_SET_HERE}", "own"),
    ],
)
def test_the_output_folder_is_known_outside_of_the_program_as_far_as_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subdir: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hydra = {
        "job": {"num": MISSING, "id": MISSING, "name": "train", "override_dirname": "lr=0.1"},
        "sweep": {"dir": "sweep", "subdir": subdir},
        "launcher": {},
    }
    application = load(HYDRA_MAIN, Program(script="/a.py"))
    cfg = OmegaConf.create({"lr": 0.1, "net": {"name": "small"}, "part": Part(), "hydra": hydra})
    values = application.check(cfg).values
    assert application.output(tmp_path / "sweep/own", values, 3) == tmp_path / "sweep" / name


def test_a_value_that_only_the_program_can_make_does_not_hide_the_output_folder(tmp_path: Path) -> None:
    hydra = {"job": {}, "sweep": {"dir": str(tmp_path), "subdir": "${hydra.job.num}"}}
    values = {"colour": {"$enum": ["not_loaded:Colour", "RED"]}, "hydra": hydra}
    assert load(HYDRA_MAIN, Program(script="/a.py")).output(tmp_path / "own", values, 3) == tmp_path / "3"


def test_a_folder_that_jobs_share_is_the_sweeps_wherever_it_lies_and_one_that_they_do_not_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    application = load(HYDRA_MAIN, Program(script="/a.py"))
    values = {"hydra": {"job": {}, "sweep": {"dir": "sweep", "subdir": "${hydra.job.num}"}}}
    moved = tmp_path / "moved"
    moved.mkdir()
    for shared, output in (
        ({"hydra": {"sweep": {"dir": "sweep"}}}, moved / "3"),
        ({}, tmp_path / "sweep/3"),  # hydra.sweep.dir=${lr}: Hydra's own launcher takes each job's
    ):
        (moved / "plan.yaml").write_text(to_yaml({"shared": shared}))
        assert application.output(moved / "own", values, 3) == output
    (moved / "own").mkdir()
    (moved / "own/output.json").write_text('{"output": "as/it/was"}')
    assert application.output(moved / "own", values, 3) == moved / "as/it/was"
    (moved / "own/output.json").write_text('{"output": 3}')
    assert application.output(moved / "own", values, 3) == tmp_path / "sweep/3"


@pytest.mark.filterwarnings("ignore:The version_base parameter is deprecated")  # of 1.4, and 1.3 asks for it
def test_the_loop_of_the_documentation_has_its_result_wherever_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (REPOSITORY / "docs/howto/any_application.md").read_text(encoding="utf-8")
    text = page.partition('title="loop.py"\n')[2].partition("```")[0]
    program: dict[str, Any] = {"__name__": "loop"}
    exec(compile(text, "loop.py", "exec"), program)
    for stopped in range(1, 6):
        folder = tmp_path / str(stopped)
        folder.mkdir()
        context = job.begin(folder, folder, first=True)
        try:
            monkeypatch.setattr(job, "stop_requested", lambda: context.reports == stopped)  # noqa: B023
            with pytest.raises(Interrupted):
                program["main"](OmegaConf.create({"lr": 0.5}))
            job.begin(folder, folder, first=True)
            monkeypatch.setattr(job, "stop_requested", lambda: False)
            assert program["main"](OmegaConf.create({"lr": 0.5})) == 0.1
        finally:
            job._context = None
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_a_job_by_hand_and_within_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job.report(step=1, loss=0.5)
    job.requeue()
    assert not job.stop_requested()
    assert job.folder == tmp_path
    assert job.checkpoints == tmp_path / "checkpoints"
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoints"]

    context = job.begin(tmp_path / "own", tmp_path / "out", first=True)
    (tmp_path / "own").mkdir()
    try:
        job.report(loss=1)
        job.report(total=9, **{"val/loss": 0.5})
        job.report(step=7, loss=float("nan"))
        with pytest.raises(TypeError, match="loss='x' is no number"):
            job.report(loss="x")
        rows = read_rows(tmp_path / "own/metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 7]
        assert rows[1]["total"] == 9
        assert job.folder == tmp_path / "out"
        assert job.checkpoints == tmp_path / "own/checkpoints"
        assert not context.has_checkpoint
        (job.checkpoints / "a").mkdir()
        assert not context.has_checkpoint
        (job.checkpoints / "a/b").touch()
        assert context.has_checkpoint
        with pytest.raises(Interrupted):  # a program that never asks is interrupted
            context.asked_to_stop(signal.SIGTERM, None)
        assert job.stop_requested()
        assert context.leaves_early
        context.asked_to_stop(signal.SIGTERM, None)  # one that asks is not
        with pytest.raises(Interrupted):
            job.requeue()
    finally:
        job._context = None


@pytest.fixture
def context(tmp_path: Path) -> Iterator[job.Context]:
    (tmp_path / "own").mkdir()
    yield job.begin(tmp_path / "own", tmp_path / "out", first=True)
    job._context = None


def test_lightnings_metrics_are_read_while_they_grow(context: job.Context, tmp_path: Path) -> None:
    table = tmp_path / "out/lightning_logs/version_0/metrics.csv"
    table.parent.mkdir(parents=True)
    follower = Follower(context)
    table.write_text("epoch,step,train_loss\n0,4,0.5\n0,9,")
    follower.look()
    table.write_text("epoch,step,train_loss,val_loss\n0,4,0.5,\n0,9,0.25,\n0,9,,0.75\n")
    follower.look()
    follower.look()
    rows = read_rows(tmp_path / "own/metrics.jsonl")
    assert [{key: value for key, value in row.items() if key != "time"} for row in rows] == [
        {"step": 4, "epoch": 0.0, "train_loss": 0.5},
        {"step": 9, "epoch": 0.0, "train_loss": 0.25},
        {"step": 9, "epoch": 0.0, "val_loss": 0.75},
    ]
    context.report(10, None, {"loss": 1})
    table.write_text(table.read_text() + "1,14,0.1,\n")
    follower.look()  # a program that reports is not read besides
    assert read_rows(tmp_path / "own/metrics.jsonl")[-1]["step"] == 10


def test_tensorboards_scalars_are_read(context: job.Context, tmp_path: Path) -> None:
    writers = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    follower = Follower(context)
    writer = writers.EventFileWriter(str(tmp_path / "out/tb"))
    for step in (0, 5):
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in (("loss", 0.5 + step), ("acc", 0.25))]
        writer.add_event(Event(step=step, wall_time=0.0, summary=Summary(value=values)))
    writer.flush()
    follower.look()
    writer.close()
    rows = read_rows(tmp_path / "own/metrics.jsonl")
    assert [(row["step"], row["loss"], row["acc"]) for row in rows] == [(0, 0.5, 0.25), (5, 5.5, 0.25)]


def test_a_snapshot_has_what_git_does_not_ignore_as_it_is_now(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.email=a@b", "-c", "user.name=a", *words], cwd=code, check=True)

    code = tmp_path / "code"
    (code / "pkg").mkdir(parents=True)
    (code / ".gitignore").write_text("*.bin\nruns/\n")
    (code / "pkg/a b.py").write_text("old\n")
    (code / "gone.py").write_text("gone\n")
    (code / "big.bin").write_text("x" * 1000)
    assert checkout_of(Program(script=str(code / "pkg/a b.py")), tmp_path) is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    (code / "gone.py").unlink()
    (code / "pkg/a b.py").write_text("edited\n")
    (code / "new.py").write_text("new\n")
    assert checkout_of(Program(script=str(code / "pkg/a b.py")), tmp_path) == str(code)
    sweep = code / "out"  # not ignored, and no part of the copy of itself
    sweep.mkdir()
    (sweep / "plan.yaml").touch()
    assert "3 files" in take(code, sweep)
    copy = sweep / "code"
    found = {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*") if path.is_file()}
    assert found == {".gitignore": "*.bin\nruns/\n", "pkg/a b.py": "edited\n", "new.py": "new\n"}
    about = json.loads((sweep / "snapshot.json").read_text())
    assert (about["checkout"], about["changed"], len(about["commit"])) == (str(code), True, 40)
    (code / "large.txt").write_text("x" * 10_000)
    with pytest.raises(ConfigError, match=r"snapshot_mb=0\.005; the largest: large\.txt"):
        take(code, tmp_path / "other", most_mb=0.005)


def test_a_folder_that_others_may_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep/0-a").mkdir(parents=True, mode=0o755)
    (tmp_path / "sweep").chmod(0o755)
    (tmp_path / "sweep/plan.yaml").touch(mode=0o644)
    refuse_shared(tmp_path / "sweep", ["0-a", "1-b"])
    for name, mode in (("sweep/0-a", 0o775), ("sweep", 0o757)):
        before = (tmp_path / name).stat().st_mode
        (tmp_path / name).chmod(mode)
        with pytest.raises(ConfigError, match=f"{name}: it may be written to by others"):
            refuse_shared(tmp_path / "sweep", ["0-a", "1-b"])
        (tmp_path / name).chmod(before)
    (tmp_path / "sweep").chmod(0o755)


@pytest.mark.parametrize("given", [{}, {"script": "a", "module": "b"}, {"script": "a", "function": "f"}])
def test_a_program_starts_one_thing(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a program is a script, a module, or a function"):
        Program(**given)
