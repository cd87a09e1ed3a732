"""Training processes are killed at random times, again and again; what comes out is what an uninterrupted run gives.

``APT_KILLS`` is the number of kills (``make soak``: 200), ``APT_KILLS_SEED`` the seed of their times.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_launch.record import read_rows
from apt_model.training.checkpoint import Checkpoints, load, read_manifest
from tests.conftest import SMALL, rows_in
from tests.forks import Forks

KILLS = int(os.environ.get("APT_KILLS", "5"))
SEED = int(os.environ.get("APT_KILLS_SEED", "0"))

INTERRUPTED = (
    "trainer.accumulate=2",
    "trainer.max_epochs=24",
    "trainer.max_batches_per_epoch=12",
    "trainer.log_every=1",
    "trainer.checkpoint_every_minutes=0.0005",
    "trainer.resume=auto",
)
"""Checkpoints every 30 ms of training, so that many kills meet one being written."""


def compared(folder: Path) -> dict[str, Any]:
    """Return what an exact resume may not change."""
    newest = Checkpoints(folder / "checkpoints").all()[-1]
    state = load(newest)
    state["progress"].pop("seconds")
    rows = read_rows(folder / "metrics.jsonl")
    return {
        "step": newest.name,
        "weights": read_manifest(newest)["files"]["model.safetensors"]["sha256"],
        "state": state,
        "rows": [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows],
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def place_of_kill(run: Path, rows_before: int) -> str:
    if any((run / "checkpoints").glob(".step-*")):
        return "while saving"
    return "while training" if rows_in(run) > rows_before else "while starting"


def killed_until_done(forks: Forks, command: list[str], folder: Path, times: random.Random, most: int) -> Counter[str]:
    """Run the command and kill it, until it is done or was killed ``most`` times; then let it end."""
    places: Counter[str] = Counter()
    while True:
        rows_before = rows_in(folder / "run")
        pid = forks.start(*command, "hydra.run.dir=run", cwd=folder)
        if sum(places.values()) < most:
            farther, moment = times.randrange(-20, 60), times.uniform(0, 0.1)
            child = forks.child
            assert child is not None
            while rows_in(folder / "run") < rows_before + farther and child.poll() is None:
                time.sleep(0.002)
            time.sleep(moment)  # anywhere within updates, and anywhere before the first of them
            with contextlib.suppress(ProcessLookupError):  # it was done
                os.kill(pid, signal.SIGKILL)
        ended = forks.wait()
        if ended.code == 0:
            return places
        assert ended.code == -signal.SIGKILL, ended.out + ended.err
        places[place_of_kill(folder / "run", rows_before)] += 1


@pytest.mark.slow
def test_runs_that_are_killed_at_random_times_end_as_if_nothing_had_happened(
    forks: Forks, text_file: Path, tmp_path: Path
) -> None:
    times = random.Random(SEED)
    places: Counter[str] = Counter()
    runs = 0
    while sum(places.values()) < KILLS:
        command = [*SMALL, *INTERRUPTED, "data=text", f"data.path={text_file}", f"seed={runs}"]
        folders = {name: tmp_path / f"{runs}-{name}" for name in ("whole", "killed")}
        for path in folders.values():
            path.mkdir()
        whole = forks.run(*command, "hydra.run.dir=run", cwd=folders["whole"])
        assert whole.code == 0, whole.err
        places += killed_until_done(forks, command, folders["killed"], times, KILLS - sum(places.values()))
        expected, found = (compared(folders[name] / "run") for name in ("whole", "killed"))
        for name in expected:
            assert equal(expected[name], found[name]), f"run {runs} differs in {name} after {dict(places)}"
        runs += 1
    told = {"kills": sum(places.values()), **places, "runs": runs, "identical": runs}
    print(json.dumps(told))
    if KILLS >= 20:
        assert places["while saving"] >= 1
