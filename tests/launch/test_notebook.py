"""``apt_launch.run`` in Python and in notebooks: what it returns, what it raises, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import apt_launch
from apt_launch.config.menu import CONF
from apt_launch.config.run_config import RunConfig
from apt_launch.notebook import Run
from apt_launch.runs.alone import alone_in_process
from apt_launch.runs.stop import StopRequest
from apt_launch.runs.train import train
from apt_model.errors import SIGNALS, ConfigError
from tests.conftest import SMALL, until
from tests.forks import REPOSITORY, environment
from tests.hold import Hold, install

Train = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train a very small run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides: apt_launch.run([*SMALL, "data=text", f"data.path={text_file}", *overrides])


def state_of_the_process() -> tuple[object, ...]:
    umask = os.umask(0o022)
    os.umask(umask)
    loggers = [logging.getLogger(name) for name in ("", "apt_launch", "apt_model")]
    return (
        umask,
        threading.excepthook,
        logging.raiseExceptions,
        [signal.getsignal(number) for number in SIGNALS],
        [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers],
        GlobalHydra.instance().hydra,
    )


def test_a_run_has_its_folder_its_summary_and_its_rows(run: Train, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of_the_process()
    done = run("hydra.run.dir=a")
    assert done.folder == Path("a").absolute()
    assert done.summary["state"] == "done"
    assert next(row["step"] for row in done.rows if row.get("schedule/moe_enabled")) == 8
    steps, losses = done.curve("val/loss")
    assert steps == [3, 7, 11, 15, 19, 23]
    assert losses == list(done.summary["val/loss"].values())
    assert repr(done) == f"<run done, val/loss {losses[0]:.4f} to {losses[-1]:.4f}: a>"
    shown = done._repr_html_()
    assert f"<td>{losses[-1]:.4f}</td>" in shown
    assert "data:image/png;base64,iVBOR" in shown
    assert "epoch 2, step 8: moe enabled" in capsys.readouterr().out
    assert "moe enabled" in (done.folder / "train.log").read_text()
    assert state_of_the_process() == before
    with pytest.raises(ConfigError, match=r"a already holds a run\. Go on with it by trainer\.resume=auto"):
        run("hydra.run.dir=a")


def test_a_run_says_until_when_a_module_was_enabled(run: Train, capsys: pytest.CaptureFixture[str]) -> None:
    events = ["+schedule.events.rest={disable: moe, at: 75%}", "+schedule.events.nap={disable: align, at: 4ep}"]
    done = run(*events, "+schedule.events.back={enable: align, at: 22st}")
    assert done.summary["switched_on"]["moe"] == {"epoch": 2, "step": 8}
    assert done.summary["enabled"] == {
        "moe": [{"from": {"epoch": 2, "step": 8}, "to": {"epoch": 4, "step": 18}}],
        "align": [
            {"from": {"epoch": 3, "step": 12}, "to": {"epoch": 4, "step": 16}},
            {"from": {"epoch": 5, "step": 22}, "to": None},
        ],
        "voter": [{"from": {"epoch": 5, "step": 20}, "to": None}],
    }
    lines = [" ".join(re.findall(r"[\w(),]+", line)) for line in capsys.readouterr().out.splitlines()]
    assert "moe epoch 2, step 8 epoch 4, step 18" in lines
    assert "align (the last of 2 times) epoch 5, step 22 end" in lines
    assert "voter epoch 5, step 20 end" in lines


def test_two_runs_in_one_process_are_two_runs_for_wandb_and_the_same_to_the_last_digit(run: Train) -> None:
    first, second = run("logger.mode=offline"), run("logger.mode=offline")
    assert first.folder != second.folder
    assert first.curve("train/loss") == second.curve("train/loss")
    for done in (first, second):
        assert len(list(done.folder.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_it_works_under_a_running_loop_and_in_a_thread(run: Train) -> None:
    async def cell() -> Run:
        return run("schedule=none", "trainer.max_epochs=1")

    assert asyncio.run(cell()).summary["state"] == "done"
    found: list[Run] = []
    thread = threading.Thread(target=lambda: found.append(run("schedule=none", "trainer.max_epochs=1")))
    thread.start()
    thread.join()
    assert found[0].summary["state"] == "done"


def test_the_stop_button_writes_a_checkpoint_and_the_run_continues(
    run: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of_the_process()
    hold = Hold(tmp_path / "hold", at=10)
    for name, value in hold.environment.items():
        monkeypatch.setenv(name, value)
    hook = install()

    def stop() -> None:
        until(hold.holding, "the run to hold")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(
        KeyboardInterrupt, match=r"Go on with: apt_launch\.run\(\[\.\.\., 'hydra\.run\.dir=a', 'trainer"
    ):
        run("hydra.run.dir=a")
    thread.join()
    hook.remove()
    assert state_of_the_process() == before
    assert (Run(tmp_path / "a").summary["state"], Run(tmp_path / "a").summary["steps"]) == ("interrupted", 10)
    done = run("hydra.run.dir=a", "trainer.resume=auto")
    assert (done.summary["state"], done.summary["steps"]) == ("done", 24)


def test_pressed_twice_the_stop_button_leaves_at_once_and_the_process_runs() -> None:
    stop = StopRequest(own_process=False)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.max_epochs=3"], r"schedule\.enable_voter_at_epoch = 5 would never happen"),
        (["schedule.rout_temp.end=1"], r"Did you mean 'schedule\.route_temp\.end'"),
        (["seed=0,1"], "Ambiguous value for argument 'seed=0,1'"),
        (["--multirun"], r"--multirun: apt_launch\.run makes one run and takes no flags"),
        ("seed=1", r"Give a list: apt_launch\.run\(\['seed=1'\]\)"),
    ],
)
def test_a_mistake_is_a_config_error_and_leaves_nothing(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        apt_launch.run(overrides)
    assert list(tmp_path.iterdir()) == []


def test_what_the_caller_composes_with_hydra_stays_as_it_was(run: Train) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run("schedule=none", "trainer.max_epochs=1")
        assert compose("config", overrides=["seed=7"]).seed == 7


def test_to_import_it_loads_nothing_heavy() -> None:
    code = "import sys, apt_launch; apt_launch.run; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert not {"torch", "hydra", "omegaconf", "pydantic", "rich"} & set(loaded.stdout.split())


def test_the_notebook_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((REPOSITORY / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict[str, object] = {}
    train = apt_launch.run

    def shorter(overrides: list[str]) -> Run:
        given = {override.split("=")[0] for override in (*overrides, "logger.mode")}
        return train([*overrides, *(override for override in SMALL if override.split("=")[0] not in given)])

    monkeypatch.setattr(apt_launch, "run", shorter)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] or "apt_launch.run" not in "".join(cell["source"]), "it is kept with what it shows"
            exec("".join(cell["source"]), names)
    assert isinstance(names["run"], Run)
    assert names["run"].summary["state"] == "done"


def test_a_second_run_at_the_same_time_is_refused_with_the_remedy_and_leaves_the_first_as_it_is(run: Train) -> None:
    alone = run("hydra.run.dir=alone")
    both, ended = threading.Barrier(2), {}

    def train(name: str) -> None:
        both.wait()
        try:
            ended[name] = run(f"hydra.run.dir={name}")
        except ConfigError as error:
            ended[name] = error

    threads = [threading.Thread(target=train, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (refused,) = (name for name, what in ended.items() if isinstance(what, ConfigError))
    (done,) = (what for what in ended.values() if isinstance(what, Run))
    assert "another run is under way in this process" in str(ended[refused])
    assert "python -m apt_launch --multirun" in str(ended[refused])
    assert not Path(refused).exists()
    assert [equal_parts(row) for row in done.rows] == [equal_parts(row) for row in alone.rows]
    assert run(f"hydra.run.dir={refused}").summary["state"] == "done"


def test_a_run_of_another_entry_is_refused_while_one_is_under_way(
    composed: Callable[..., RunConfig], run: Train, text_file: Path
) -> None:
    config = composed(*SMALL, "data=text", f"data.path={text_file}", "logger=none")
    with alone_in_process():
        with pytest.raises(ConfigError, match="another run is under way in this process"):
            train(config, Path("a"))
        with pytest.raises(ConfigError, match="another run is under way in this process"):
            run("hydra.run.dir=b")
    assert not Path("a").exists()
    assert not Path("b").exists()


def equal_parts(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("time", "tokens_per_second")}
