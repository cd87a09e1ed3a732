"""The real W&B client against a loopback server: kills, outages, a dead client, no key. Every row arrives once."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from apt_launch.record import read_rows
from tests.conftest import SMALL, rows_in, until
from tests.forks import Ended, Forks
from tests.hold import Hold
from tests.wandb_server import WandbServer, serving

KEY = "x" * 40
CANARY = "c4n4ry-0123456789abcdef-c4n4ry"
"""A secret of the environment; see test_security."""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with serving(WandbServer()) as server:
        yield server


@pytest.fixture
def command(text_file: Path) -> list[str]:
    small = [override for override in SMALL if not override.startswith("logger.mode")]
    more = ["logger.mode=online", "hydra.run.dir=run", "trainer.log_every=1", "trainer.resume=auto"]
    return [*small, "data=text", f"data.path={text_file}", *more]


def client(url: str) -> dict[str, str]:
    soon = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds; 15 by itself
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "MY_SERVICE_TOKEN": CANARY} | soon


def recorded(run: Path) -> list[dict[str, float]]:
    """Return what W&B should have: the rows of the record, those of one step in one."""
    merged: dict[float, dict[str, float]] = {}
    for row in read_rows(run / "metrics.jsonl"):
        merged.setdefault(row["step"], {}).update(row)
    return list(merged.values())


def delivered(server: WandbServer) -> list[dict[str, float]]:
    (rows,) = server.history.values()
    return rows


def check_every_row_once(
    server: WandbServer, run: Path, *, but: tuple[str, ...] = (), interrupted: bool = False
) -> None:
    for secret in (KEY, CANARY):
        assert not [body for body in server.bodies if secret.encode() in body]
    rows, expected = delivered(server), recorded(run)
    if interrupted and "val/loss" not in expected[-1] and len(rows) < len(expected):
        expected.pop()  # the last update of an epoch waits for its validation
    assert [row["_step"] for row in rows] == [row["step"] for row in expected]
    assert [row["trainer/step"] for row in rows] == [row["step"] for row in expected]
    for found, row in zip(rows, expected, strict=True):
        assert {key: found[key] for key in row if key not in but} == {k: v for k, v in row.items() if k not in but}


def sync(forks: Forks, folder: Path, url: str) -> Ended:
    return forks.run("run", cwd=folder, module="apt_launch.sync", env=client(url))


@pytest.mark.slow
def test_every_row_arrives_once_over_five_kills(
    forks: Forks, server: WandbServer, command: list[str], tmp_path: Path
) -> None:
    long = [*command, "trainer.max_epochs=200", "schedule=none", "trainer.checkpoint_every_epochs=5"]
    for attempt in range(5):
        before = sum(map(len, server.history.values()))
        hold = Hold(tmp_path / f"hold-{attempt}", at=50)
        pid = forks.start(*long, cwd=tmp_path, env=client(server.url) | hold.environment)
        until(lambda before=before: sum(map(len, server.history.values())) > before, "rows of this attempt")
        os.kill(pid, signal.SIGKILL)
        assert forks.wait().code == -signal.SIGKILL
    before = rows_in(tmp_path / "run")
    hold = Hold(tmp_path / "hold", at=100)
    pid = forks.start(*long, cwd=tmp_path, env=client(server.url) | hold.environment)
    until(hold.holding, "training to go on")
    assert rows_in(tmp_path / "run") > before
    os.kill(pid, signal.SIGINT)
    assert forks.wait().code == 130
    assert sync(forks, tmp_path, server.url).code == 0
    check_every_row_once(  # times are the clock of another attempt
        server, tmp_path / "run", but=("time", "tokens_per_second"), interrupted=True
    )
    assert len(server.runs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuses", "says nothing", "is unavailable"])
def test_nobody_answers_at_the_start(
    forks: Forks, server: WandbServer, command: list[str], tmp_path: Path, kind: str
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        if kind == "says nothing":
            closed.listen()
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        if kind == "is unavailable":
            server.away.set()
            url = server.url
        began = time.monotonic()
        ended = forks.run(*command, cwd=tmp_path, env=client(url))
        assert time.monotonic() - began < 60 + 120  # the patience that is stated, and a run
        server.away.clear()
    assert ended.code == 0, ended.err
    assert (ended.out + ended.err).count("python -m apt_launch.sync ") == 1
    assert "Traceback" not in ended.out + ended.err
    assert len(recorded(tmp_path / "run")) == 24
    for sent in (24, 0):
        told = sync(forks, tmp_path, server.url)
        assert (told.code, told.out) == (0, f"run: {sent} rows sent, {24 - sent} were there\n"), told.err
        check_every_row_once(server, tmp_path / "run")


def lose_wandb(forks: Forks, server: WandbServer, *command: str, cwd: Path) -> None:
    """Start a run, and take W&B away once it knows the run and a few rows are written."""
    hold = Hold(cwd / "hold", at=8)
    forks.start(*command, cwd=cwd, env=client(server.url) | hold.environment)
    until(lambda: server.runs and hold.holding(), "W&B to know the run")
    server.away.set()
    hold.let_go()


@pytest.mark.slow
def test_an_outage_in_the_middle_that_ends_costs_nothing(
    forks: Forks, server: WandbServer, command: list[str], tmp_path: Path
) -> None:
    lose_wandb(forks, server, *command, "trainer.max_epochs=20", "schedule=none", cwd=tmp_path)
    begun = rows_in(tmp_path / "run")
    until(lambda: rows_in(tmp_path / "run") > begun + 20, "training to go on")
    server.away.clear()
    ended = forks.wait()
    assert ended.code == 0, ended.err
    check_every_row_once(server, tmp_path / "run")


@pytest.mark.slow
def test_an_outage_that_lasts_keeps_the_run_no_longer_than_stated_and_sync_delivers_the_rest(
    forks: Forks, server: WandbServer, command: list[str], tmp_path: Path
) -> None:
    lose_wandb(forks, server, *command, "trainer.max_epochs=20", "schedule=none", cwd=tmp_path)
    ended = forks.wait()
    assert ended.code == 0, ended.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    trained = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["time"]
    assert summary["seconds"] - trained < 60 + 120  # PATIENCE, and what a run needs beside training
    assert (ended.out + ended.err).count("python -m apt_launch.sync ") == 1
    assert sum(map(len, server.history.values())) < 80
    refused = sync(forks, tmp_path, server.url)
    assert refused.code == 1
    assert "Nothing is lost" in refused.err
    server.away.clear()
    for _ in range(2):
        told = sync(forks, tmp_path, server.url)
        assert told.code == 0, told.err
        check_every_row_once(server, tmp_path / "run")
    assert "0 rows sent, 80 were there" in told.out


@pytest.mark.slow
@pytest.mark.parametrize("when", ["when it is ready", "while rows arrive"])
def test_the_death_of_wandbs_own_process_does_not_hurt_the_run(
    forks: Forks, server: WandbServer, command: list[str], tmp_path: Path, when: str
) -> None:
    hold = Hold(tmp_path / "hold", at=40)
    endless = ("trainer.max_epochs=40000", "schedule=none")
    pid = forks.start(*command, *endless, cwd=tmp_path, env=client(server.url) | hold.environment)
    log = tmp_path / "run" / "train.log"
    until(lambda: log.exists(), "the run to begin")

    def cores() -> list[psutil.Process]:
        return [child for child in psutil.Process(pid).children(recursive=True) if "wandb" in child.name()]

    happened = {
        "when it is ready": lambda: "W&B: http" in log.read_text(),
        "while rows arrive": lambda: sum(map(len, server.history.values())),
    }
    until(happened[when], f"W&B, {when}")
    for core in cores():
        core.kill()
    hold.let_go()
    until(lambda: "W&B" in log.read_text(), "a word about it")
    going_on = rows_in(tmp_path / "run") + 20
    until(lambda: rows_in(tmp_path / "run") > going_on, "training to go on")
    os.kill(pid, signal.SIGINT)
    ended = forks.wait()
    assert ended.code == 130, ended.err
    assert ended.out.count("W&B failed ") == 1
    assert "Traceback" not in ended.out + ended.err
    assert sync(forks, tmp_path, server.url).code == 0
    check_every_row_once(server, tmp_path / "run", interrupted=True)


def test_an_offline_run_that_was_interrupted_is_delivered_whole(
    forks: Forks, server: WandbServer, command: list[str], tmp_path: Path
) -> None:
    offline = [override for override in command if not override.startswith("logger.mode")]
    hold = Hold(tmp_path / "hold", at=24)
    pid = forks.start(*offline, "trainer.max_epochs=10", "schedule=none", cwd=tmp_path, env=hold.environment)
    until(hold.holding, "the run to hold")
    os.kill(pid, signal.SIGINT)
    assert forks.wait().code == 130
    assert sync(forks, tmp_path, server.url).code == 0
    check_every_row_once(server, tmp_path / "run", interrupted=True)
    assert forks.run(*offline, "trainer.max_epochs=10", "schedule=none", cwd=tmp_path).code == 0
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert sync(forks, tmp_path, server.url).code == 0
    check_every_row_once(server, tmp_path / "run")


def test_sync_says_what_it_cannot_deliver(forks: Forks, command: list[str], tmp_path: Path) -> None:
    nothing = forks.run("run", cwd=tmp_path, module="apt_launch.sync")
    assert nothing.code == 2
    assert "there is no run here" in nothing.err
    assert forks.run(*command, "logger=none", cwd=tmp_path).code == 2  # online is no mode of it
    quiet = [override for override in command if not override.startswith("logger")]
    assert forks.run(*quiet, "logger=csv", cwd=tmp_path).code == 0
    told = forks.run("run", cwd=tmp_path, module="apt_launch.sync")
    assert told.code == 2
    assert "was not logged to W&B" in told.err
