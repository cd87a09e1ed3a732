"""Every command and snippet of the README and the documentation does what it says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from apt_launch import generate
from apt_launch.__main__ import with_profile_file
from apt_launch.catalogue import parameters, targets
from apt_launch.config import CONF, RunConfig
from apt_model.schedule import Curriculum, Program
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = README + "".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md")))
COMMANDS = re.findall(
    r"^python -m (?:torch\.distributed\.run .*-m )?apt_launch(?:\.preview)? (.*)$", PAGES, flags=re.MULTILINE
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_profile.yaml").write_text("model: {d_model: 64}\n")
    monkeypatch.chdir(tmp_path)
    overrides = [part for part in shlex.split(command, comments=True) if not part.startswith("--") and "=" in part]
    singles = [_one_value(override) for override in OverridesParser.create().parse_overrides(overrides)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose("config", overrides=with_profile_file(singles))


@pytest.mark.parametrize("command", re.findall(r"^python -m apt_launch\.generate (.*)$", PAGES, flags=re.MULTILINE))
def test_a_command_that_makes_text_is_understood(command: str) -> None:
    assert generate.parser().parse_args(shlex.split(command, comments=True)).prompt


def _one_value(override: Override) -> str:
    """Return what one job of a sweep would be asked for."""
    if not override.is_sweep_override():
        return str(override.input_line)
    if override.is_discrete_sweep():
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return f"{override.get_key_element()}={override.value().start}"


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", PAGES, flags=re.DOTALL))
def test_a_snippet_prints_what_its_comment_says(snippet: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), {})
    assert printed.getvalue().strip() == "\n".join(re.findall(r"print\(.*\)  # (.*)", snippet))


@pytest.mark.parametrize("shown", re.findall(r"```yaml\n(.*?)```", PAGES, flags=re.DOTALL))
def test_a_curriculum_shown_is_one(shown: str, composed: Callable[..., RunConfig]) -> None:
    config = composed("schedule=none", "trainer.lr_schedule=null")
    curriculum = Curriculum.read(yaml.safe_load(shown))
    if any(spec.anchors() for spec in curriculum.all_anneals.values()):
        curriculum = curriculum.model_copy(update={"enable_moe_at_epoch": 2})
    Program(curriculum, config.horizon).check_targets(targets(config.values), parameters(config.values))
