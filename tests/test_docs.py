"""Every command and snippet of the README and the documentation is run, page by page, and does what the page says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from apt_launch import sweep
from apt_launch.catalogue import parameters, targets
from apt_launch.config import RunConfig
from apt_model.schedule import Curriculum, Program
from tests.conftest import REPOSITORY, SMALL
from tests.forks import Ended, Forks, forking
from tests.slurm.conftest import shared_cluster  # noqa: F401 - a fixture

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
HOME = "/home/me"
"""What stands in the pages for the folder that commands are run in."""

COMPOSED = {
    "torch.distributed.run": "several processes; tests/training and tests/slurm train with them",
    "hydra/sweeper=optuna": "a search of 20 runs; tests/launch/test_sweep.py has one",
    "data=hf": "the network; tests/data/test_huggingface.py reads local files",
    "hydra/launcher=slurm": "a cluster; the tutorial's sweep is sent to a real one",
    "hydra/launcher=night": "a cluster, and one with such a partition",
}
"""What stands in commands that are composed and checked instead of run, and why."""

SPELLED = {
    "apt_launch.sync": "W&B; tests/reliability/test_delivery.py delivers to a server",
    "wandb": "W&B",
    "pip": "the network",
    "make": "minutes, or the network",
    "tests.bench": "minutes",
    "DIR": "a sweep; the tutorial has one",
}
"""What stands in commands of which it is only checked that they exist, and why."""


class Block(NamedTuple):
    """What stands between fences."""

    kind: str  # what the fence says: python, yaml, text; nothing: commands
    title: str  # of a file that the reader is to write
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(*found)
        for found in re.findall(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    ]


class Reader:
    """Does what a page says, from top to bottom, in one folder."""

    def __init__(self, forks: Forks, folder: Path, slurm: Callable[[], dict[str, str]]) -> None:
        self.forks = forks
        self.folder = folder
        self.slurm = slurm

    def read(self, page: Path) -> None:
        for block, following in pairwise([*blocks(page), Block("", "", "")]):
            if block.title:
                path = self.folder / block.title
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.kind == "python":
                self.execute(block.text)
            elif block.kind == "":
                error = following.text if following.kind == "text" and "error: " in following.text else None
                for line in block.text.replace("\\\n", "").splitlines():
                    self.call(line, error)
            else:
                assert block.kind in ("yaml", "text"), f"a block of {block.kind!r} is not checked"

    def execute(self, snippet: str) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries
            exec(compile(snippet, "snippet", "exec"), {"__name__": "snippet"})
        said = iter(printed.getvalue().splitlines())
        for told in re.findall(r"print\(.*\)  # (.*)", snippet):
            assert told in said, f"{told!r} was not printed: {printed.getvalue()}"

    def call(self, line: str, error: str | None) -> None:
        """Run a command; ``error`` is what the page says it will say."""
        words = shlex.split(line, comments=True)
        if not words:
            return
        if words[:2] != ["python", "-m"] or any(word.startswith(tuple(SPELLED)) for word in words):
            check_spelling(words)
        elif error is not None:
            self.meet(error, words[2], words[3:])
        elif "hydra.sweep.dir=" not in line and any(word in COMPOSED for word in words):
            self.compose(words[words.index("apt_launch") + 1 :])
        else:
            ended = self.run(words[2], shortened(words[2], words[3:]), self.cluster_of(words))
            assert ended.code == 0, f"{line}\n{ended.out}\n{ended.err}"

    def cluster_of(self, words: list[str]) -> dict[str, str]:
        """Return the environment in which the command finds the cluster that it is about, if it is about one."""
        plans = [path for word in words[3:] if (path := self.folder / word / "plan.yaml").is_file()]
        sent = any("\nlauncher: slurm\n" in path.read_text() for path in plans)
        return self.slurm() if sent or "hydra/launcher=slurm" in words else {}

    def run(self, module: str, arguments: list[str], env: dict[str, str]) -> Ended:
        return self.forks.run(*arguments, cwd=self.folder, module=module, env=env)

    def meet(self, error: str, module: str, arguments: list[str]) -> None:
        ended = self.run(module, arguments, {"COLUMNS": "80"})
        said = re.sub(rf"{re.escape(str(self.folder))}\b", HOME, ended.err + ended.out)
        assert ended.code in (1, 2), said
        assert "Traceback" not in said
        lines = [line.rstrip() for line in said.splitlines()]
        for line in error.splitlines():
            assert line in lines, f"{line}\nis not what was said:\n{said}"

    def compose(self, arguments: list[str]) -> None:
        """Compose the first job of what ``arguments`` ask for; every key has to be there."""
        flags = [a for a in arguments if a.startswith("--") and a not in ("--multirun", "--dry-run")]
        folders = [arguments[i + 1] for i, a in enumerate(arguments) if a == "--config-dir"]
        overrides = [a for a in arguments if not a.startswith("--") and a not in folders]
        singles = [_one_value(override) for override in OverridesParser.create().parse_overrides(overrides)]
        ended = self.run("apt_launch", [*flags, *folders, *singles, "--cfg", "all"], {})
        assert ended.code == 0, ended.err


def check_spelling(words: list[str]) -> None:
    """Check that what a command names is there."""
    match words:
        case ["python", "-m", "apt_launch.sweep", *arguments]:
            sweep._parser().parse_args(arguments)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, module
        case ["make", target, *_]:
            assert re.search(rf"^{target}:.*## ", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE), target
        case ["pip", "install", *wanted]:
            for extra in re.findall(r"\[(\w+)\]", " ".join(wanted)):
                assert re.search(rf"^{extra} = \[", (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE), extra
        case ["pytest", *arguments]:
            for path in (argument for argument in arguments if argument.startswith("tests")):
                assert (REPOSITORY / path).exists(), path
        case ["wandb", "sweep", path]:
            assert (REPOSITORY / path).exists(), path
        case ["git" | "cd" | "ls" | "source" | "python3" | "head" | "cat", *_]:
            pass
        case _:
            raise AssertionError(f"nobody knows how to check {shlex.join(words)!r}")


def shortened(module: str, arguments: list[str]) -> list[str]:
    """Return a command that does the same with a very small model, and sends no sweep that has no folder of its own."""
    if module != "apt_launch" or "--cfg" in arguments or "--help" in arguments:
        return arguments
    given = {argument.split("=", 1)[0] for argument in arguments}
    small = [override for override in SMALL if override.split("=", 1)[0] not in given]
    if "--multirun" in arguments and "hydra.sweep.dir" not in given:
        return [*arguments, *small, *([] if "--dry-run" in arguments else ["--dry-run"])]
    return [*arguments, *small]


def _one_value(override: Override) -> str:
    """Return what one job of a sweep would be asked for."""
    if not override.is_sweep_override():
        return str(override.input_line)
    if override.is_discrete_sweep():
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return f"{override.get_key_element()}={override.value().start}"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with forking() as forks:
        yield forks


@pytest.fixture
def reader(
    forks: Forks, tmp_path: Path, request: pytest.FixtureRequest, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Reader:
    """A reader who has what pages take for granted: texts, a tokenizer, an older profile."""
    from apt_model.data.tokenizer import train_tokenizer

    (tmp_path / "my_texts").mkdir()
    for name in ("a.txt", "b.txt", "c.md", "d.md"):
        (tmp_path / "my_texts" / name).write_bytes(text_file.read_bytes())
    rows = "".join(f'{{"text": "{line}"}}\n' for line in text_file.read_text().splitlines())
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "tokenizer.json").write_text(train_tokenizer([text_file.read_text()], 300).content, encoding="utf-8")
    (tmp_path / "old_profile.yaml").write_text("model: {d_model: 64}\n")

    monkeypatch.chdir(tmp_path)

    def slurm() -> dict[str, str]:
        return {"SLURM_CONF": request.getfixturevalue("shared_cluster").environment()["SLURM_CONF"]}

    return Reader(forks, tmp_path, slurm)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_a_page_does_what_it_says(page: Path, reader: Reader) -> None:
    reader.read(page)


CURRICULA = [block.text for page in PAGES for block in blocks(page) if block.kind == "yaml" and not block.title]


@pytest.mark.parametrize("shown", CURRICULA)
def test_a_curriculum_shown_is_one(shown: str, composed: Callable[..., RunConfig]) -> None:
    config = composed("schedule=none", "trainer.lr_schedule=null")
    curriculum = Curriculum.read(yaml.safe_load(shown))
    if any(spec.anchors() for spec in curriculum.all_anneals.values()):
        curriculum = curriculum.model_copy(update={"enable_moe_at_epoch": 2})
    Program(curriculum, config.horizon).check_targets(targets(config.values), parameters(config.values))


INLINE = sorted(
    {
        command
        for page in PAGES
        for command in re.findall(r"`((?:python -m (?:tests|docs)\.|pytest |make )[^`]*)`", page.read_text(encoding="utf-8"))
    }
)


@pytest.mark.parametrize("command", INLINE)
def test_a_command_in_a_sentence_names_what_is_there(command: str) -> None:
    check_spelling(shlex.split(command))
