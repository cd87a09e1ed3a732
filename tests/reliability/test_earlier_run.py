"""A run's folder that version 0.1.0 made, before modules had rooms: resumed, delivered and generated from.

tests/fixtures/earlier_run has the whole record of 24 updates, and of the checkpoints the one after update 12.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from apt_launch.config.menu import CONF
from apt_launch.record import read_rows
from apt_launch.values import from_yaml
from tests.forks import Forks
from tests.wandb_server import WandbServer, serving

FIXTURE = Path(__file__).parent.parent / "fixtures" / "earlier_run"
OLD_NAMES = (
    "hydra.callbacks.check_before_start._target_=apt_launch.config.CheckBeforeStart",
    "hydra.job_logging.handlers.console.class=apt_launch.console.Stdout",
)


@pytest.fixture
def earlier(tmp_path: Path, text_file: Path) -> Path:
    shutil.copytree(FIXTURE, tmp_path / "earlier")
    return tmp_path / "earlier"


def test_a_run_of_an_earlier_version_continues_is_delivered_and_generates(forks: Forks, earlier: Path) -> None:
    before = read_rows(earlier / "metrics.jsonl")
    with serving(WandbServer()) as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "x" * 40}
        ended = forks.run("earlier", cwd=earlier.parent, module="apt_launch.sync", env=env)
        assert ended.code == 0, ended.err
        ((run, rows),) = server.history.items()
        assert "e10267b9-07f0652f" in str(run)
        assert [row["step"] for row in rows] == list(range(24))

    overrides = from_yaml(f"all:\n{(earlier / '.hydra' / 'overrides.yaml').read_text()}")["all"]
    meant = ["align.trains=all", "voter.draws=independent"]  # by configs without these keys
    again = [*overrides, *OLD_NAMES, *meant, "hydra.run.dir=earlier", "trainer.resume=auto"]
    ended = forks.run(*again, cwd=earlier.parent)
    assert ended.code == 0, ended.err
    # it is another identity by this key alone: validation had the capacity of training then
    assert "resumed with other values than before: moe.eval_capacity_factor" in ended.out + ended.err
    assert "resuming " in ended.out
    after = read_rows(earlier / "metrics.jsonl")
    kept = [row for row in before if row["step"] < 12]
    assert after[: len(kept)] == kept
    # norms by part are of later versions
    named = [{name for name in row if not name.startswith("train/grad_norm/")} for row in after]
    assert named == [set(row) for row in before]
    for row, expected in zip(after[len(kept) :], before[len(kept) :], strict=True):
        for name, value in expected.items():
            if name in ("train/loss", "val/loss"):  # other processors round otherwise
                assert row[name] == pytest.approx(value, rel=1e-3), (row["step"], name)
            elif name in ("step", "epoch", "tokens", "lr") or name.startswith("schedule/"):
                assert row[name] == value, (row["step"], name)

    ended = forks.run("earlier", "--prompt", "line", cwd=earlier.parent, module="apt_launch.generate")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("line")
    assert "step-00000024 (moe + align + voter)" in ended.err


def test_the_names_of_earlier_versions_mean_what_they_are_called_now() -> None:
    from hydra.utils import get_object

    import apt_launch.config
    from apt_launch.runs.before_start import CheckBeforeStart
    from apt_launch.runs.console import Stdout

    assert get_object("apt_launch.config.CheckBeforeStart") is CheckBeforeStart
    assert get_object("apt_launch.console.Stdout") is Stdout
    assert from_yaml((CONF / "config.yaml").read_text())["hydra"]["callbacks"]["check_before_start"] == {
        "_target_": f"{CheckBeforeStart.__module__}.CheckBeforeStart"
    }
    with pytest.raises(AttributeError, match="Nothing"):
        _ = apt_launch.config.Nothing
