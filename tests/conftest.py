"""What several tests share: composing a config in this process, training a very small model, calling the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings

from apt_launch.config.load import composed as compose
from apt_launch.config.run_config import RunConfig
from apt_launch.record import read_rows
from tests.forks import ADDRESS, HANGS, REPOSITORY, address, attempts, leave_alone, run_module

if "HF_HOME" not in os.environ:  # what datasets copies there, and it asks nobody
    _HOME = tempfile.TemporaryDirectory()
    os.environ |= {"HF_HOME": _HOME.name, "HF_HUB_OFFLINE": "1"}

# threads that wait for each other sleep meanwhile, and models this small need but one: several tests run at once
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

# a shell that starts tests in the background has them, and whatever they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("patient", deadline=None)  # how fast an example is, is not what is tested
settings.load_profile("patient")

SMALL = (
    "model.d_model=16",
    "model.num_heads=2",
    "model.num_layers=2",
    "model.d_ff=32",
    "model.seq_len=16",
    "moe.num_experts=4",
    "align.rank=4",
    "trainer.batch_size=2",
    "trainer.max_batches_per_epoch=4",
    "trainer.max_epochs=6",
    "trainer.validation_batches=2",
    "trainer.log_every=3",
    "trainer.device=cpu",
    "logger.mode=disabled",
)
"""Overrides that leave a model of a few thousand parameters and 24 updates, still through the whole curriculum."""


LONGEST = (
    *("slurm", "launch/test_sweep", "training/test_compile", "reliability/test_delivery", "test_docs"),
    *("training/test_data_parallel", "reliability/test_bad_input", "reliability/test_security", "launch/test_sizes"),
    *("training/test_trainer", "integrations", "launch/test_cli", "launch/test_watch", "launch/test_notebook"),
    *("reliability", "launch/test_tokenize", "launch/test_generate", "launch/test_report", "launch/test_wandb_agent"),
    *(
        "config/test_guard",
        "launch/test_commands",
        "launch/test_completion",
        "launch/test_drawing",
        "launch/test_preview",
    ),
    *("launch/test_once", "launch/test_mistakes", "launch/test_output", "launch/test_console", "launch/test_tracking"),
    *("training/test_checkpoint", "training/test_memory", "training/test_distributed", "config/test_yaml_file"),
    *("training/test_own_model", "sweep/test_any_program", "config/test_own", "layouts", "launch/test_export"),
    *(
        "launch/test_finished_runs",
        "layers/test_in_place",
        "training/test_subject",
        "training/test_prefix",
        "data/test_own",
    ),
)
"""What takes longest: it begins first where several processes run tests, and is marked slow."""

SHARED_OUT = {"slurm/test_sweeps": 3, "launch/test_sweep": 2, "training/test_compile": 2, "test_docs": 2}
"""Files whose tests several processes may share, and how many. Those of any other file stay together, with its fixtures."""


def pytest_configure(config: pytest.Config) -> None:
    """Have one process fork the commands that all processes of pytest-xdist's test; they inherit its address."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        os.environ[ADDRESS] = address()


@pytest.hookimpl(wrapper=True)  # before -m chooses, and before pytest-xdist reads its groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Mark what is slow; say which tests stay together in one process, and put the longest first, under pytest-xdist."""
    several = hasattr(config, "workerinput")  # in a process of pytest-xdist's
    ranks: dict[pytest.Item, int] = {}
    for number, item in enumerate(items):
        name = item.path.relative_to(REPOSITORY / "tests").with_suffix("").as_posix()
        ranks[item] = next((rank for rank, prefix in enumerate(LONGEST) if name.startswith(prefix)), len(LONGEST))
        if ranks[item] < len(LONGEST):
            item.add_marker(pytest.mark.slow)
        if several:
            item.add_marker(pytest.mark.xdist_group(f"{name}-{number % SHARED_OUT.get(name, 1)}"))
    if several:
        items.sort(key=ranks.__getitem__)
    yield


HEAVY = 200
"""Modules: as many as a library has that takes seconds to load."""

_loaded = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Look for garbage no more in libraries that are loaded: Hugging Face's trainer does each time that it begins."""
    global _loaded
    if len(sys.modules) > _loaded + HEAVY:
        leave_alone()
        _loaded = len(sys.modules)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of some text, {i * i} squared\n" for i in range(200)), encoding="utf-8")
    return path


@pytest.fixture
def composed() -> Iterator[Callable[..., RunConfig]]:
    """Compose ``conf/`` with overrides and check it, as the command does."""

    yield lambda *overrides: compose(list(overrides))
    GlobalHydra.instance().clear()


@pytest.fixture
def small(composed: Callable[..., RunConfig], text_file: Path) -> Callable[..., RunConfig]:
    """Compose a very small run on ``text_file``."""

    def small(*overrides: str) -> RunConfig:
        return composed(*SMALL, "data=text", f"data.path={text_file}", *overrides)

    return small


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call ``python -m apt_launch`` in an empty folder."""

    def cli(*arguments: str, module: str = "apt_launch") -> subprocess.CompletedProcess[str]:
        return run_module(module, *arguments, cwd=tmp_path)

    return cli


def until(happened: Callable[[], object], what: str, timeout: float = HANGS) -> None:
    """Wait for what another process will do; ``timeout`` seconds only end what hangs."""
    for _ in attempts(timeout):
        if happened():
            return
    raise AssertionError(f"waited {timeout:g} s for {what}")


def rows_in(run: Path) -> int:
    """Return how many rows a run has logged so far."""
    path = run / "metrics.jsonl"
    return len(read_rows(path)) if path.exists() else 0


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """Read an offline run back with the official client."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANGS)
    return [json.loads(line) for line in result.stdout.splitlines()]


def wandb_rows(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the logged rows without what the client adds."""
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
