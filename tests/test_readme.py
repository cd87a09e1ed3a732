"""Every command and snippet of the README does what it says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from apt_launch.__main__ import with_profile_file
from apt_launch.config import CONF
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m apt_launch (.*)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_profile.yaml").write_text("model: {d_model: 64}\n")
    monkeypatch.chdir(tmp_path)
    overrides = [part for part in shlex.split(command, comments=True) if not part.startswith("--") and "=" in part]
    singles = [override.split(",")[0] for override in overrides]  # one job of a sweep
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("config", overrides=with_profile_file(singles))


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_a_snippet_prints_what_its_comment_says(snippet: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {})
    assert printed.getvalue().strip() == "\n".join(re.findall(r"print\(.*\)  # (.*)", snippet))


def test_the_curriculum_shown_is_one(composed: Callable[..., object]) -> None:
    import yaml

    from apt_model.schedule import Curriculum

    shown = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert shown is not None
    assert Curriculum.read(yaml.safe_load(shown.group(1))).route_temp.end == 0.8
