"""Hostile configs do nothing, secrets go nowhere."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from apt_launch.secrets import check_secrets, redacted
from apt_launch.values import from_yaml, to_yaml
from apt_model.errors import CheckpointError
from apt_model.training.checkpoint import load
from tests.conftest import SMALL, until
from tests.forks import Forks

CANARY = "c4n4ry-0123456789abcdef-c4n4ry"

HOSTILE = {
    "file removal": ("pathlib.Path.unlink", {}),
    "file removal, os": ("os.remove", {"path": "victim"}),
    "folder removal": ("shutil.rmtree", {"path": "victims"}),
    "open for writing": ("builtins.open", {"file": "victim", "mode": "w"}),
    "io.open": ("io.open", {"file": "victim", "mode": "w"}),
    "shell": ("os.system", {"command": "rm victim"}),
    "subprocess": ("subprocess.Popen", {"args": ["rm", "victim"]}),
    "spawn": ("distutils.spawn.spawn", {"cmd": ["rm", "victim"]}),
    "posix spawn": ("os.posix_spawn", {"path": "/bin/rm", "argv": ["rm", "victim"], "env": {}}),
    "pty": ("pty.spawn", {"argv": ["rm", "victim"]}),
    "torch.load": ("torch.load", {"f": "pickle", "weights_only": False}),
    "torch.hub": ("torch.hub.load", {"repo_or_dir": ".", "model": "m", "source": "local"}),
    "joblib": ("joblib.load", {"filename": "pickle"}),
    "pickle": ("pickle.loads", {"data": "x"}),
    "numpy": ("numpy.load", {"file": "pickle", "allow_pickle": True}),
    "pytest.main": ("pytest.main", {"args": ["hostile.py"]}),
    "submitit's loader": ("submitit.core.utils.DelayedSubmission.load", {"filepath": "pickle"}),
    "runpy": ("runpy.run_path", {"path_name": "hostile.py"}),
    "import": ("importlib.import_module", {"name": "hostile"}),
    "eval": ("builtins.eval", {"source": "open('victim', 'w')"}),
    "exec": ("builtins.exec", {"source": "open('victim', 'w')"}),
    "code": ("code.interact", {}),
    "hydra's own": ("hydra.utils.instantiate", {"config": {"_target_": "os.remove", "path": "victim"}}),
    "get_method": ("hydra.utils.get_method", {"path": "os.remove"}),
    "an alias in an allowed module": ("apt_model.gpt.torch.load", {"f": "pickle", "weights_only": False}),
    "an alias in torch": ("torch.optim.adamw.torch.load", {"f": "pickle"}),
    "an alias in ours": ("apt_launch.runs.session.os.system", {"command": "rm victim"}),
    "a method of ours": ("apt_model.files.write_atomic", {"path": "victim", "text": ""}),
    "a neighbour of what is allowed": ("torch.optim.SGD", {"lr": 1.0}),
    "another group's": ("apt_launch.tracking.wandb.WandbTracker", {}),
    "functools": ("functools.partial", {"_args_": ["os.remove"]}),
    "operator": ("operator.methodcaller", {"name": "unlink"}),
    "a plugin's alias": ("hydra_plugins.apt_launch.Path", {}),
    "a plugin's module": ("hydra_plugins.apt_launch.register", {}),
}


@pytest.fixture
def place(tmp_path: Path, text_file: Path) -> Path:
    """A folder with what must not be touched."""
    (tmp_path / "victim").write_text("alive")
    (tmp_path / "victims").mkdir()
    (tmp_path / "hostile.py").write_text("open('victim', 'w').close()\ndef test_x(): open('victim', 'w').close()\n")
    (tmp_path / "hubconf.py").write_text("open('victim', 'w').close()\ndef m(): pass\n")
    torch.save(Hostile(), tmp_path / "pickle")
    return tmp_path


class Hostile:
    def __reduce__(self):
        return (open, ("victim", "w"))


def unharmed(place: Path) -> bool:
    return (place / "victim").read_text() == "alive" and (place / "victims").is_dir()


def as_override(key: str, values: dict[str, object]) -> str:
    def text(value: object) -> str:
        if isinstance(value, dict):
            return "{" + ",".join(f"{k}: {text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ",".join(map(text, value)) + "]"
        return json.dumps(value)

    return f"{key}={text(values)}"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_target_is_refused_wherever_it_stands(forks: Forks, place: Path, text_file: Path, name: str) -> None:
    target, arguments = HOSTILE[name]
    node = {"_target_": target, **arguments}
    nested = {"deeper": [{"here": node}]}
    places = [
        as_override("optimizer._target_", {"x": 0}).split("=")[0] + f"={target}",
        as_override("+model.extra", node),
        as_override("+trainer.callbacks", {"x": node}),
        as_override("+hydra.callbacks.evil", node),
        as_override("++hydra.callbacks.check_before_start", {**node, "_partial_": True}),
        as_override("+hydra.launcher.extra", nested),
        as_override("+hydra.sweeper.extra", nested),
        f"hydra.launcher._target_={target}",
        f"hydra.sweeper._target_={target}",
    ]
    first = list(HOSTILE).index(name)  # each in two of the places; every place meets several
    for override in places if os.environ.get("APT_EVERYWHERE") else [places[(first + 4 * i) % 9] for i in range(2)]:
        for multirun in ([], ["--multirun"]) if "hydra" in override else ([],):
            ended = forks.run(*multirun, override, *SMALL, "data=text", f"data.path={text_file}", cwd=place)
            assert ended.code == 2, (override, ended)
            assert "Traceback" not in ended.err
            assert unharmed(place), override
    assert {path.name for path in place.iterdir()} == {
        *("victim", "victims", "hostile.py", "hubconf.py", "pickle", "text.txt"),
    }


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("hydra.job_logging.handlers.file.class=os.system", "hydra.job_logging.handlers.file.class"),
        ("+hydra.job_logging.handlers.evil={'()': os.system, command: rm victim}", "hydra.job_logging.handlers.evil"),
        (
            "+hydra.hydra_logging.formatters.evil={'()': subprocess.Popen, args: [rm, victim]}",
            "hydra_logging.formatters",
        ),
        ("hydra.job_logging.handlers.file.filename=victim", "is no file in the run's folder"),
        ("hydra.job_logging.handlers.file.filename=/tmp/elsewhere.log", "is no file in the run's folder"),
        ("hydra.job_logging.handlers.file.filename='${hydra.runtime.output_dir}/../victim'", "is no file in the run's"),
        ("+hydra.job_logging.handlers.console.stream='ext://hostile.x'", "may not be reached"),
        ("+hydra.job_logging.handlers.console.more='cfg://handlers'", "may not be reached"),
        ("hydra.output_subdir=../../elsewhere", "hydra.output_subdir"),
        ("hydra.job.name=../../elsewhere", "hydra.job.name"),
        ("+hydra.job.env_set.LD_PRELOAD=./hostile.so", "hydra.job.env_set.LD_PRELOAD"),
        ("+hydra.job.env_set.PYTHONPATH=.", "hydra.job.env_set.PYTHONPATH"),
    ],
)
def test_what_hydra_itself_would_do_is_judged_first(forks: Forks, place: Path, override: str, told: str) -> None:
    ended = forks.run(override, *SMALL, cwd=place)
    assert (ended.code, told in ended.err) == (2, True), ended
    assert "Traceback" not in ended.err
    assert unharmed(place)
    assert not (place / "outputs").exists()


def test_a_config_folder_of_somebody_else_cannot_bring_callbacks(forks: Forks, place: Path) -> None:
    (place / "theirs" / "experiment").mkdir(parents=True)
    (place / "theirs" / "experiment" / "best.yaml").write_text(
        "# @package _global_\nseed: 1\nhydra:\n  callbacks:\n    evil:\n      _target_: os.remove\n      path: victim\n"
    )
    ended = forks.run("--config-dir", "theirs", "+experiment=best", cwd=place)
    assert ended.code == 2
    assert "hydra.callbacks.evil._target_: 'os.remove' may not be built here" in ended.err
    assert unharmed(place)


def test_hydras_basic_sweeper_and_harmless_logging_stay_allowed(forks: Forks, place: Path, text_file: Path) -> None:
    ended = forks.run(
        *("--multirun", "hydra/sweeper=basic", "hydra/launcher=basic", "seed=0,1", *SMALL, "trainer.max_epochs=1"),
        *("data=text", f"data.path={text_file}", "schedule=none", "hydra.job_logging.handlers.console.class="),
        cwd=place,
    )
    assert ended.code == 2  # an empty class is none
    ended = forks.run(
        *("hydra.job_logging.handlers.console.class=logging.StreamHandler", *SMALL, "trainer.max_epochs=1"),
        *("data=text", f"data.path={text_file}", "schedule=none"),
        cwd=place,
    )
    assert ended.code == 0, ended.err


def test_targets_in_a_frozen_config_and_in_a_checkpoint_are_refused(forks: Forks, place: Path, text_file: Path) -> None:
    command = [*SMALL, "data=text", f"data.path={text_file}", "trainer.max_epochs=1", "schedule=none"]
    done = forks.run("--multirun", "seed=0", *command, "hydra.sweep.dir=sweep", cwd=place)
    assert done.code == 0, done.out + done.err
    (job,) = (place / "sweep").glob("0-*")
    config = from_yaml((job / "config.yaml").read_text())
    config["optimizer"] = {"_target_": "os.remove", "path": str(place / "victim")}
    (job / "config.yaml").write_text(to_yaml(config))
    shutil.rmtree(job / "checkpoints")
    state = json.loads((job / "state.json").read_text())
    (job / "state.json").write_text(json.dumps(state | {"state": "failed"}))
    forks.run("resume", "sweep", cwd=place, module="apt_launch.sweep")
    until(lambda: json.loads((job / "state.json").read_text())["state"] == "failed", "the job to be refused")
    assert unharmed(place)

    assert forks.run(*command, "hydra.run.dir=run", cwd=place).code == 0
    (checkpoint,) = (place / "run" / "checkpoints").glob("step-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["about"]["config"]["optimizer._target_"] = "os.remove"
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    ended = forks.run(*command, "hydra.run.dir=run", "trainer.resume=auto", cwd=place)
    assert ended.code == 2
    assert unharmed(place)


def test_no_pickle_is_read_that_the_manifest_does_not_name(forks: Forks, place: Path, text_file: Path) -> None:
    command = [*SMALL, "data=text", f"data.path={text_file}", "trainer.max_epochs=1", "schedule=none"]
    assert forks.run(*command, "hydra.run.dir=run", cwd=place).code == 0
    (checkpoint,) = (place / "run" / "checkpoints").glob("step-*")
    shutil.copy(place / "pickle", checkpoint / "state.pt")
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        load(checkpoint)
    ended = forks.run(*command, "hydra.run.dir=run", "trainer.resume=auto", cwd=place)
    assert ended.code == 2
    assert "differs from its checksum" in ended.err
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["state.pt"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is no checkpoint: manifest\.json cannot be read"):
        load(checkpoint)
    assert unharmed(place)


# --- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        f"+logger.api_key={CANARY}",
        f"+data.hf_token={CANARY}",
        f"+hydra.launcher.additional_parameters.password={CANARY}",
        f"++hydra.job.env_set.WANDB_API_KEY={CANARY}",
        f"hydra.launcher.setup=['export WANDB_API_KEY={CANARY}']",
        f"hydra.launcher.setup=['export HF_TOKEN=\"{CANARY}\"']",
        f"logger.name={CANARY}",  # the value of a variable of the environment
        "logger.name=${oc.env:MY_SERVICE_TOKEN}",
        f"logger.project=s3://user:{CANARY}@bucket",
        "logger.project=hf_abcdefghijklmnopqrstuvwxyz012345",
        "logger.project=ghp_abcdefghijklmnopqrstuvwxyz012345",
    ],
)
def test_a_secret_in_a_config_is_refused_and_written_nowhere(forks: Forks, tmp_path: Path, override: str) -> None:
    slurm = ["hydra/launcher=slurm"] if "hydra.launcher" in override else []
    for multirun in ([], ["--multirun", "seed=0,1"]):
        ended = forks.run(*multirun, override, *slurm, *SMALL, cwd=tmp_path, env={"MY_SERVICE_TOKEN": CANARY})
        assert ended.code == 2, ended
        assert "secret" in ended.err or "environment's MY_SERVICE_TOKEN" in ended.err
        assert CANARY not in ended.out + ended.err
        assert list(tmp_path.iterdir()) == []


def test_setup_lines_may_read_a_secret_from_where_it_is_kept() -> None:
    check_secrets({"setup": ["export WANDB_API_KEY=$(cat ~/.wandb)", "export HF_TOKEN=$MY_TOKEN", "module load cuda"]})


def test_a_secret_of_the_environment_is_found_nowhere_and_folders_are_private(
    forks: Forks, tmp_path: Path, text_file: Path
) -> None:
    command = [*SMALL, "data=text", f"data.path={text_file}", "trainer.max_epochs=1", "schedule=none"]
    command = [override for override in command if not override.startswith("logger.mode")]
    secrets = {"MY_SERVICE_TOKEN": CANARY, "WANDB_API_KEY": CANARY.ljust(40, "x"), "AWS_SECRET_ACCESS_KEY": CANARY}
    assert forks.run(*command, "hydra.run.dir=run", cwd=tmp_path, env=secrets).code == 0
    swept = forks.run("--multirun", "seed=0,1", *command, "hydra.sweep.dir=sweep", cwd=tmp_path, env=secrets)
    assert swept.code == 0, swept.err
    files = [path for folder in ("run", "sweep") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {"config.yaml", "provenance.json", "train.log", "plan.yaml", "log.txt"} <= {path.name for path in files}
    assert any(path.suffix == ".pkl" for path in files)
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    for path in [tmp_path / "run", tmp_path / "sweep", *(path for path in files if not path.is_symlink())]:
        assert stat.S_IMODE(os.lstat(path).st_mode) & 0o077 == 0, path


def test_a_diff_loses_the_lines_with_secrets_and_keeps_the_others() -> None:
    diff = f"+lr = 0.1\n+API_KEY = '{CANARY}'\n-  token: hunter2hunter2\n+key = os.environ['API_KEY']\n+tokens = 12345678\n"
    kept = redacted(diff).split("\n")
    assert kept[0] == "+lr = 0.1"
    assert CANARY not in redacted(diff)
    assert "hunter2" not in redacted(diff)
    assert kept[3:5] == ["+key = os.environ['API_KEY']", "+tokens = 12345678"]
