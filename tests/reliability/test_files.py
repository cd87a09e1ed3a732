"""Whatever lies in the place of a file that is read back: a clear message with file, place and remedy. Never a hang."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from apt_launch.lease import Holder, Lease, read_holder
from apt_launch.record import Record, RecordReader, read_rows, read_tail
from apt_launch.runs.drill import SavedDrill as Told
from apt_launch.runs.folder import RunFolder
from apt_launch.sweep.application import Resources
from apt_launch.sweep.backends.local import LocalBackend
from apt_launch.sweep.control.cancel import cancel
from apt_launch.sweep.control.ledger import Ledger
from apt_launch.sweep.control.send import prepare
from apt_launch.sweep.control.table import show
from apt_launch.sweep.jobs.process import About
from apt_launch.sweep.jobs.state import ask_to_cancel, read_state, transition
from apt_launch.sweep.plan.jobs import Job
from apt_launch.sweep.plan.plan import Plan
from apt_launch.sweep.report.findings import find
from apt_launch.sweep.watch.live import Watch
from apt_launch.tracking.deliver import Identity, Summary
from apt_launch.values import from_yaml, read_frozen, to_yaml
from apt_model.data import TextCorpus
from apt_model.data.shard_writer import write
from apt_model.data.tokenizer import ByteTokenizer, load_tokenizer
from apt_model.errors import CheckpointError, ConfigError
from apt_model.files import open_kept, read_json, read_regular, touch, write_atomic
from apt_model.training.checkpoint import read_manifest
from tests.conftest import SMALL
from tests.forks import Forks, run_fresh

MANIFEST = {
    "step": 3,
    "rows": 2,
    "epochs": None,
    "loss": 1.5,
    "about": {},
    "files": {"state.pt": {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}},
}
PLAN = Plan(
    id="1234",
    created="now",
    command=("seed=0,1",),
    launcher="local",
    launcher_values={},
    cwd="/",
    asked=2,
    application="apt_launch.application:Trainer",
    shared={"model.d_model": 8},
    jobs=tuple(Job(n, f"{n:08x}ff", (f"seed={n}",), {"seed": n}, Resources(), 10) for n in range(3)),
)

Read = Callable[[Path], object]

FILES: dict[str, tuple[dict[str, object], Read]] = {
    "state.json": ({"state": "done", "restarts": 0, "seconds": 2.5}, lambda path: read_state(path.parent)),
    "job.json": (
        {"sweep": "1", "number": 0, "overrides": ["a=1"], "cwd": "/", "hours": 2.0},
        lambda path: read_json(path, About, remedy="Write it anew."),
    ),
    "summary.json": ({"state": "done"}, lambda path: read_json(path, Summary, remedy="Resume.")),
    "left_out.json": ({"updates": [[1, 2]]}, lambda path: RunFolder(path.parent).left_out()),
    "manifest.json": (MANIFEST, lambda path: read_manifest(path.parent)),
    "drill.json": (
        {"step": 1, "until": 2, "rows": [{"step": 1}], "weights": "ab", "verified": False},
        lambda path: read_json(path, Told, remedy="Remove it."),
    ),
    "wandb/apt_launch.json": (
        {"run_id": "a", "group": None, "job_type": "train", "job_tags": ["x"], "updates_per_epoch": 3},
        lambda path: Identity.read(path.parent.parent),
    ),
}

MUST = {  # a key of each, and values of other types, textual, negative or endless
    "state.json": ("seconds", ['"2.5"', "-1", "1e999", "[]", "NaN"]),
    "job.json": ("hours", ['"24"', "-1", "1e999", "{}", "NaN"]),
    "summary.json": ("state", ["1", "null", '"x"', "[]", '"DONE"']),
    "left_out.json": ("updates", ["1", "[[1]]", '[["1", 2]]', "[[1, 1e999]]", "{}"]),
    "manifest.json": ("step", ['"3"', "-1", "1e999", "[]", "3.5"]),
    "drill.json": ("rows", ["1", "[{}]", '[{"step": "1"}]', "{}", "null"]),
    "wandb/apt_launch.json": ("updates_per_epoch", ["{}", "null", "1e999", "[]", "1.5"]),
}


def special(path: Path, kind: str) -> None:
    """Put something that is no regular file at ``path``."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_place_and_a_remedy(tmp_path: Path, name: str) -> None:
    content, read = FILES[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    whole = json.dumps(content)
    (tmp_path / "state.pt").touch()
    path.write_text(whole)
    read(path)
    key, values = MUST[name]
    damaged = {
        "cut off": whole[: len(whole) // 2],
        "empty": "",
        "a list": "[]",
        "a number": "1",
        "no text": "\udcff\udcfe",
    }
    damaged |= {"fewer": json.dumps({k: v for k, v in content.items() if k != key})} if name != "state.json" else {}
    damaged |= {value: json.dumps(content | {key: "@"}).replace('"@"', value) for value in values}
    for kind, text in damaged.items():
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises((ConfigError, CheckpointError)) as caught:
            read(path)
        message = str(caught.value)
        assert str(path) in message, (kind, message)
        assert "damaged (" in message
        assert message.rstrip(")").endswith("."), message
        if kind in values and kind != "[{}]":  # "a row has no step" says it
            assert key in message, (kind, message)
    for kind in ("pipe", "folder", "device"):
        path.unlink()
        special(path, kind)
        with pytest.raises((ConfigError, CheckpointError), match=f"it is a {kind}, and a regular file is wanted"):
            read(path)
        shutil.rmtree(path) if kind == "folder" else path.unlink()
        path.touch()


def test_a_file_is_read_up_to_a_stated_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(ConfigError, match="more than 4 bytes"):
        read_regular(path, 4)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_tokenizer_a_config_a_lease_and_a_plan_of_another_kind_are_refused(tmp_path: Path, kind: str) -> None:
    for name in ("tokenizer.json", "config.yaml", "lease.json", "plan.yaml"):
        special(tmp_path / name, kind)
    for read in (
        lambda: load_tokenizer(tmp_path / "tokenizer.json"),
        lambda: read_frozen(tmp_path / "config.yaml"),
        lambda: Plan.read(tmp_path),
    ):
        with pytest.raises(ConfigError, match=f"it is a {kind}"):
            read()
    assert read_holder(tmp_path / "lease.json") is None


def plan(tmp_path: Path, change: Callable[[dict], object]) -> Path:
    """A sweep whose plan is changed."""
    PLAN.write(tmp_path)
    content = from_yaml((tmp_path / "plan.yaml").read_text())
    change(content)
    (tmp_path / "plan.yaml").write_text(to_yaml(content))
    return tmp_path


DAMAGES: dict[str, Callable[[dict], object]] = {
    "a key fewer": lambda content: content.pop("shared"),
    "a key more": lambda content: content.update(extra=1),
    "a job's key more": lambda content: content["jobs"][1].update(extra=1),
    "a job's key fewer": lambda content: content["jobs"][1].pop("identity"),
    "no jobs": lambda content: content.update(jobs=[]),
    "jobs of another type": lambda content: content.update(jobs={"a": 1}),
    "a job of another type": lambda content: content["jobs"].append(None),
    "a textual number": lambda content: content["jobs"][0].update(steps="10"),
    "an endless number": lambda content: content["jobs"][0]["resources"].update(hours=float("inf")),
    "not a number": lambda content: content["jobs"][0]["resources"].update(mem_gb=float("nan")),
    "a negative number": lambda content: content["jobs"][0].update(number=-1),
    "one number twice": lambda content: content["jobs"][0].update(number=1, folder=None),
    "an unknown launcher": lambda content: content.update(launcher="cloud"),
    "a folder that leads out": lambda content: content["jobs"][0].update(folder="../../elsewhere"),
    "an absolute folder": lambda content: content["jobs"][0].update(folder="/tmp/elsewhere"),
    "an identity that leads out": lambda content: content["jobs"][0].update(identity="/../../x", folder="0-/../../x"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_plan_is_refused(tmp_path: Path, name: str) -> None:
    assert Plan.read(plan(tmp_path, lambda content: None)) == PLAN
    with pytest.raises(ConfigError, match=r"plan.yaml: damaged \(.*\)\. Restore it") as caught:
        Plan.read(plan(tmp_path, DAMAGES[name]))
    assert "\n" not in str(caught.value)


def test_a_file_of_a_later_version_is_refused_by_that_whatever_else_it_has(tmp_path: Path) -> None:
    newer = r": its format is of version {}, and this program reads {}\. A newer one has written it"
    with pytest.raises(ConfigError, match=rf"^\S*plan\.yaml{newer.format(3, 'versions 1 to 2')}"):
        Plan.read(plan(tmp_path, lambda content: content.update(version=3, jobs={"by": "number"})))
    (tmp_path / "state.json").write_text('{"version": 2, "state": "paused", "node": 3}')
    with pytest.raises(ConfigError, match=rf"^\S*state\.json{newer.format(2, 'version 1')}"):
        read_state(tmp_path)
    for version in ("0", "-1", "1.5", '"1"', "null", "1e999", "9" * 5000):
        (tmp_path / "state.json").write_text(f'{{"state": "done", "version": {version}}}')
        with pytest.raises(ConfigError, match=r"state\.json: damaged"):
            read_state(tmp_path)
    (tmp_path / "state.json").write_text('{"state": "done"}')  # as before versions were named
    assert read_state(tmp_path).version == 1


def test_a_plan_that_repeats_itself_without_an_end_is_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    for text in (bomb, "a: &a [*a]\n", "[" * 3000, "a: 2020-13-45\n", "{", "- 1\n", ""):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"plan\.yaml: damaged"):
            Plan.read(tmp_path)


def test_a_damaged_job_hides_no_other(tmp_path: Path) -> None:
    PLAN.write(tmp_path)
    row = '{"step": 0, "epoch": 0, "tokens": 32, "val/loss": 4.0}\n'
    for job in PLAN.jobs:
        transition(tmp_path / job.folder, "submitted", job_id="worker-0")
        transition(tmp_path / job.folder, "running")
        transition(tmp_path / job.folder, "done", loss=4.0)
        (tmp_path / job.folder / "metrics.jsonl").write_text(row)
    (tmp_path / PLAN.jobs[0].folder / "state.json").write_text('{"state": "do')
    (tmp_path / PLAN.jobs[1].folder / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / PLAN.jobs[1].folder / "metrics.jsonl")
    statuses = Ledger(tmp_path).statuses()
    assert [one.state for one in statuses] == ["unknown", "unknown", "done"]
    assert "state.json: damaged" in str(statuses[0].cause)
    assert "metrics.jsonl: it is a pipe" in str(statuses[1].cause)
    assert all(one.final for one in statuses)  # who waits for the sweep does not wait for ever
    findings = find(tmp_path, {one.job.folder: one.state for one in statuses})
    assert findings.values == {0: 4.0, 2: 4.0}
    assert findings.trials[1].state == "unknown"


def test_damaged_rows_are_counted_and_hide_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = [
        *('{"step": Infinity}', '{"step": NaN}', '{"step": "1"}', '{"step": true}', '{"step": -1}', '{"step": null}'),
        *('{"step": 1, "tokens": 1e999}', f'{{"step": 1{"0" * 400}}}', f'{{"step": 1{"0" * 5000}}}', "[" * 5000),
        *('{"step": 1, "loss": [1]}', "{}", "\0\0\0", '{"step": 1, "loss": "x"}'),
    ]
    path.write_text('{"step": 0}\n' + "\n".join(damaged) + '\n{"step": 2, "loss": NaN}\n')
    assert [row["step"] for row in read_rows(path)] == [0, 2]
    assert f"line 2 (and {len(damaged) - 1} more) is damaged" in caplog.text
    assert read_tail(path).row["step"] == 2
    path.unlink()
    os.mkfifo(path)
    reader = RecordReader(path)
    assert list(reader.rows()) == []
    assert reader.problem is not None
    with pytest.raises(ConfigError, match="it is a pipe"):
        read_rows(path)
    with pytest.raises(ConfigError, match="it is a pipe"):
        read_tail(path)


def test_a_lease_that_is_damaged_is_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_text(json.dumps(asdict(Holder.this_process())))
    assert read_holder(path) is not None
    for text in ("", "{", "[]", "1", '{"host": 1}'):
        path.write_text(text)
        assert read_holder(path) is None


@pytest.mark.parametrize(
    "name", ["train.log", ".config.yaml.tmp", ".hydra", ".hydra/config.yaml", "checkpoints", "metrics.csv"]
)
def test_a_link_in_a_runs_folder_is_refused_and_nothing_is_written_elsewhere(
    forks: Forks, text_file: Path, tmp_path: Path, name: str
) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    run.mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(victim)  # dangling
    ended = forks.run(*SMALL, "data=text", f"data.path={text_file}", f"hydra.run.dir={run}", cwd=tmp_path)
    assert ended.code == 2, ended
    assert f"hydra.run.dir: {run / name} is a link to {victim}" in ended.err
    assert not victim.exists()


def test_a_run_folder_that_is_a_link_to_nothing_is_refused(forks: Forks, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    ended = forks.run(*SMALL, "data=text", f"data.path={text_file}", "hydra.run.dir=run", cwd=tmp_path)
    assert (ended.code, "Traceback" in ended.err) == (2, False)
    assert "run is a link to" in ended.err


def test_a_link_in_the_place_of_a_new_file_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("alive")
    (tmp_path / ".file.tmp").symlink_to(victim)
    (tmp_path / "file").symlink_to(victim)
    write_atomic(tmp_path / "file", "new")
    assert (victim.read_text(), (tmp_path / "file").read_text()) == ("alive", "new")
    assert not (tmp_path / "file").is_symlink()
    (tmp_path / ".metrics.jsonl.tmp").symlink_to(victim)
    Record(tmp_path / "metrics.jsonl").close()
    assert victim.read_text() == "alive"


def test_a_job_whose_folder_leads_out_of_the_sweep_gets_nothing(tmp_path: Path) -> None:
    elsewhere, sweep = tmp_path / "elsewhere", tmp_path / "sweep"
    elsewhere.mkdir()
    sweep.mkdir()
    (sweep / PLAN.jobs[1].folder).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="is a link"):
        prepare(PLAN, sweep, PLAN.jobs)
    assert not list(elsewhere.iterdir())
    assert not (sweep / PLAN.jobs[0].folder).exists()


def test_nothing_is_written_through_a_link_in_the_place_of_a_file_that_is_kept(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for exists in (False, True):
        if exists:
            victim.write_text("alive")
            os.utime(victim, (1, 1))
        for name, written in LINKED.items():
            folder = tmp_path / f"{name}{exists}"
            folder.mkdir()
            (folder / name).symlink_to(victim)
            with pytest.raises(
                ConfigError, match=f"{name} is a link to {victim}, and nothing is written through links"
            ):
                written(folder / name)
            assert victim.exists() == exists, name
    assert (victim.read_text(), victim.stat().st_mtime) == ("alive", 1)


def make_shards(path: Path) -> None:
    """Make shards, whose lock or unfinished folder is to be at ``path``."""
    name = path.name.removeprefix(".").removesuffix(".lock").removesuffix(".partial")
    text = path.parent / "text.txt"
    text.write_text("some text\n" * 20)
    corpus = TextCorpus(path=str(text))
    write(path.parent / name, corpus, ByteTokenizer(), key="OUT", on_progress=lambda *unused: None)


LINKED: dict[str, Callable[[Path], object]] = {
    "cancel": lambda path: ask_to_cancel(path.parent),
    "lease.json": lambda path: Lease(path, Holder.this_process()),
    "train.log": lambda path: open_kept(path, append=True),
    ".shards.lock": make_shards,
    ".shards.partial": make_shards,
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_a_file_that_is_kept_is_a_regular_one(tmp_path: Path, kind: str) -> None:
    special(tmp_path / "file", kind)
    with pytest.raises(ConfigError, match=r"and a regular file is wanted|is a link to /dev/zero"):
        touch(tmp_path / "file")
    touch(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b""


def test_no_state_is_written_into_a_job_whose_folder_is_a_link(tmp_path: Path) -> None:
    replace(PLAN, launcher_values={"max_parallel": None}).write(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / PLAN.jobs[0].folder).symlink_to(elsewhere)
    transition(tmp_path / PLAN.jobs[1].folder, "submitted")
    (tmp_path / PLAN.jobs[2].folder).mkdir()
    with pytest.raises(ConfigError, match="is a link to"):
        transition(tmp_path / PLAN.jobs[0].folder, "submitted")
    (tmp_path / ".submitit").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=f"{PLAN.jobs[0].folder} is a link"):
        cancel(tmp_path)
    assert [read_state(tmp_path / job.folder).state for job in PLAN.jobs[1:]] == ["cancelled", "cancelled"]
    with pytest.raises(ConfigError, match=r"\.submitit is a link"):
        LocalBackend({}).send(PLAN, tmp_path, PLAN.jobs)
    assert not list(elsewhere.iterdir())


def test_a_job_looks_for_links_before_it_writes(tmp_path: Path, forks: Forks) -> None:
    victim, job = tmp_path / "victim", tmp_path / PLAN.jobs[0].folder
    PLAN.write(tmp_path)
    job.mkdir()
    (job / "job.json").write_text(json.dumps(FILES["job.json"][0]))
    (job / "config.yaml").write_text("seed: 0\n")
    transition(job, "submitted", job_id="worker-0")
    (job / "train.log").symlink_to(victim)
    code = f"from pathlib import Path; from apt_launch.sweep.jobs.process import perform; perform(Path({str(job)!r}))"
    assert run_fresh("-c", code).returncode == 1
    state = read_state(job)
    assert (state.state, "train.log is a link" in str(state.cause)) == ("failed", True)
    assert not victim.exists()


def test_status_says_how_many_rows_are_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PLAN.write(tmp_path)
    row = '{"step": 0, "epoch": 0, "tokens": 32, "val/loss": 4.0}\n'
    for job, damaged in zip(PLAN.jobs, ("", "{}\n[1]\n", "{\n"), strict=True):
        transition(tmp_path / job.folder, "submitted", job_id="worker-0")
        transition(tmp_path / job.folder, "running")
        transition(tmp_path / job.folder, "done", loss=4.0)
        (tmp_path / job.folder / "metrics.jsonl").write_text(row + damaged + row)
    statuses = Ledger(tmp_path).statuses()
    assert [one.damaged_rows for one in statuses] == [0, 2, 1]
    assert [one.row["val/loss"] for one in statuses] == [4.0, 4.0, 4.0]
    show(PLAN, statuses, tmp_path)
    shown = capsys.readouterr().out
    assert f"job 1: {tmp_path / PLAN.jobs[1].folder / 'metrics.jsonl'}: 2 of its last 4 lines are damaged" in shown
    assert "1 of its last 3 lines are damaged, and left out." in shown
    assert shown.count("are damaged") == 2
    live = Watch(tmp_path)
    assert [one.damaged_rows for one in live.picture().statuses] == [0, 2, 1]
    assert "2 of its last 4 lines are damaged" in str(live.news(0)["jobs"][1]["cause"])
