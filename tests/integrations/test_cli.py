"""The command with another trainer: the same folder, the same rows, the same exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from apt_launch.record import read_rows
from tests.conftest import SMALL, until
from tests.forks import Fork, environment, run_module
from tests.hold import Hold

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

LIBRARIES = ("apt_model.integrations.lightning", "apt_model.integrations.transformers")

pytestmark = pytest.mark.slow


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Call ``python -m apt_launch`` in an empty folder, where the libraries are loaded already."""
    return lambda *arguments: run_module("apt_launch", *arguments, cwd=tmp_path, loaded=LIBRARIES)


WITHOUT = """
import runpy, sys

library, module, *arguments = sys.argv[1:]
for name in [name for name in sys.modules if name.partition(".")[0] == library]:
    del sys.modules[name]
sys.modules[library] = None
sys.modules.pop(f"{module}.__main__", None)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def without(library: str, module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``module`` in an interpreter in which ``library`` cannot be imported."""
    (cwd / "without.py").write_text(WITHOUT)
    return run_module("without", library, module, *arguments, cwd=cwd)


@pytest.mark.parametrize("other", ["lightning", "hf"])
def test_a_run_leaves_the_same_folder_and_rows(cli: Cli, text_file: Path, tmp_path: Path, other: str) -> None:
    rows, files, told = {}, {}, {}
    for name in ("default", other):
        small = [*SMALL, "data=text", f"data.path={text_file}", f"hydra.run.dir={name}", f"trainer={name}"]
        result = cli("schedule=gpt5_moe", "trainer.accumulate=2", *small)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        told[name] = result.stdout
        found = read_rows(tmp_path / name / "metrics.jsonl")
        rows[name] = [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in found]
        files[name] = {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")}
    assert [list(row) for row in rows[other]] == [list(row) for row in rows["default"]]
    for mine, its in zip(rows["default"], rows[other], strict=True):
        assert its == pytest.approx(mine, abs=1e-4)
    assert files[other] == files["default"]
    assert json.loads((tmp_path / other / "summary.json").read_text())["steps"] == 12
    lines = [[line for line in told[name].splitlines() if line.startswith("epoch")] for name in told]
    assert len(lines[0]) == len(lines[1]) == 9  # 6 validations, 3 modules: the library says nothing itself


@pytest.mark.gpu
@pytest.mark.parametrize("trainer", ["default", "lightning", "hf"])
def test_a_run_on_a_gpu_comes_to_its_end(cli: Cli, text_file: Path, tmp_path: Path, trainer: str) -> None:
    small = [*SMALL, "data=text", f"data.path={text_file}", "hydra.run.dir=run", "trainer.device=cuda"]
    result = cli("schedule=gpt5_moe", f"trainer={trainer}", *small)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 24
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["device"] == "cuda"


@pytest.mark.parametrize(
    ("other", "library"), [("lightning", "lightning"), ("hf", "transformers"), ("hf", "accelerate")]
)
def test_a_missing_extra_is_reported_with_the_command_that_brings_it(tmp_path: Path, other: str, library: str) -> None:
    result = without(library, "apt_launch", f"trainer={other}", "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 2
    assert f"trainer: {library} cannot be found. Run: pip install 'apt-launch[{other}]'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()

    module = f"apt_model.integrations.{'lightning' if other == 'lightning' else 'transformers'}"
    direct = without(library, module, cwd=tmp_path)
    assert f"ConfigError: trainer: {other if other == 'lightning' else 'transformers and accelerate'}" in direct.stderr


@pytest.mark.parametrize(
    ("library", "overrides", "told"),
    [
        (
            "datasets",
            ["data=hf", "data.path=json"],
            "data: datasets cannot be found. Run: pip install 'apt-launch[hf]'",
        ),
        ("tokenizers", ["data.tokenizer=x"], "data.tokenizer: tokenizers cannot be found. Run: pip install "),
    ],
)
def test_a_missing_library_for_data_is_reported(tmp_path: Path, library: str, overrides: list[str], told: str) -> None:
    result = without(library, "apt_launch", *overrides, "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 2
    assert told in result.stderr


def test_a_resume_is_refused_before_anything_is_made(cli: Cli, tmp_path: Path) -> None:
    for other in ("lightning", "hf"):
        result = cli(f"trainer={other}", "trainer.resume=auto", "hydra.run.dir=run")
        assert result.returncode == 2
        assert (
            f"trainer.resume: trainer={other} cannot go on from a checkpoint. Choose trainer=default" in result.stderr
        )
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("other", ["lightning", "hf"])
def test_a_signal_ends_the_run_with_a_checkpoint_and_the_default_trainer_continues(
    cli: Cli, text_file: Path, tmp_path: Path, other: str, number: signal.Signals
) -> None:
    long = ["trainer.max_epochs=6", "trainer.max_batches_per_epoch=8", "trainer.log_every=1"]
    small = [*SMALL, *long, "data=text", f"data.path={text_file}", "hydra.run.dir=run"]
    hold = Hold(tmp_path / "hold", at=12)
    process = Fork(
        ["apt_launch", *small, f"trainer={other}"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(**hold.environment),
        loaded=LIBRARIES,
    )
    until(hold.holding, "the run to hold, an epoch and a half later")
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "finishing this update" in errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["state"] == "interrupted"
    assert summary["steps"] == 12
    assert (tmp_path / "run" / "checkpoints" / f"step-{summary['steps']:08d}").is_dir()

    result = cli(*small, "trainer=default", "trainer.resume=auto")
    assert result.returncode == 0, result.stderr
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(48))
