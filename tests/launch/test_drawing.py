"""What only draws fails no command, and looks the same whatever matplotlib is set to."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apt_launch.drawing import Drawing, new_figure
from tests.conftest import SMALL
from tests.forks import HANGS, REPOSITORY, environment

SWEEP = REPOSITORY / "tests" / "fixtures" / "earlier_sweeps" / "finished"
PNG = b"\x89PNG\r\n\x1a\n"


def call(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Call a command where matplotlib is set to draw in a notebook, by TeX, and has no cache of fonts yet."""
    (cwd / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: black\n")
    (cwd / "no_fonts").mkdir()
    env = environment() | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MPLCONFIGDIR": str(cwd / "no_fonts"),
    }
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANGS, check=False)


@pytest.mark.parametrize(
    ("module", "arguments", "picture"),
    [
        ("apt_launch", [*SMALL, "trainer.max_epochs=1", "schedule=none", "hydra.run.dir=run"], "run/schedule.png"),
        ("apt_launch.preview", ["--out", "out"], "out/preview.png"),
        ("apt_launch.sweep", ["report", "sweep"], "sweep/report/losses.png"),
    ],
)
def test_a_users_settings_of_matplotlib_change_nothing_and_it_says_nothing(
    module: str, arguments: list[str], picture: str, tmp_path: Path
) -> None:
    shutil.copytree(SWEEP, tmp_path / "sweep")
    ended = call(module, *arguments, cwd=tmp_path)
    output = ended.stdout + ended.stderr
    assert ended.returncode == 0, output
    assert (tmp_path / picture).read_bytes().startswith(PNG)
    for word in ("font", "Traceback", "could not be drawn", "matplotlib"):
        assert word not in output


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "picture.png"
    path.mkdir()
    with Drawing(path):
        new_figure(1, 1).savefig(path)
    assert f"{path} could not be drawn (IsADirectoryError" in caplog.text


def test_settings_of_before_are_there_again(tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"text.usetex": True, "font.size": 31}):
        with Drawing(tmp_path / "picture.png", {"font.size": 9}):
            assert (mpl.rcParams["text.usetex"], mpl.rcParams["font.size"]) == (False, 9)
        assert (mpl.rcParams["text.usetex"], mpl.rcParams["font.size"]) == (True, 31)
