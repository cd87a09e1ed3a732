"""Every command and snippet of the README and the documentation is run, page by page, and does what the page says."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from pydantic import Field

from apt_launch.config.catalogue import metrics, parameters, targets
from apt_launch.config.load import CONF, RunConfig
from apt_launch.config.schema import GROUPS, Positive
from apt_launch.record import read_rows
from apt_launch.sweep import cli as sweep
from apt_model.schedule import Anneal, Curriculum, Program
from docs import generated, pictures
from tests.conftest import SMALL
from tests.forks import COMPILER, HANGS, REPOSITORY, Ended, Forks, environment
from tests.slurm.conftest import shared_cluster  # noqa: F401 - a fixture
from tests.sweep.programs import of_users
from tests.training.test_compile import BACKEND

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted({*DOCS.rglob("*.md")} - {DOCS / path for path in generated.PAGES})]
HOME = "/home/me"
"""What stands in the pages for the folder that commands are run in."""

COMPOSED = {
    "torch.distributed.run": "several processes; tests/training and tests/slurm train with them",
    "hydra/sweeper=optuna": "a search of 20 runs; tests/launch/test_sweep.py has one",
    "data=hf": "the network; tests/data/test_huggingface.py reads local files",
    "hydra/launcher=slurm": "a cluster; the tutorial's sweep is sent to a real one",
    "hydra/launcher=night": "a cluster, and one with such a partition",
}
"""What stands in commands that are composed instead of run, and why: what they need."""

SPELLED = {
    "apt_launch.sync": "W&B; tests/reliability/test_delivery.py delivers to a server",
    "wandb": "W&B",
    "pip": "the network",
    "make": "minutes, or the network",
    "tests.bench": "minutes",
    "DIR": "a sweep; the tutorial has one",
}
"""What stands in commands of which it is only checked that they exist, and why: what they need."""


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
            if block.title:  # also a program: what it says is seen when it is started
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
        line = re.sub(r"^source <\((.*)\)$|^(.*) \| source$", r"\1\2", line)  # a script that the shell is to read
        words = shlex.split(line, comments=True)
        if not words:
            return
        if words[0] == "python" and (words[1].endswith(".py") or words[1:4] == ["-m", "apt_launch.sweep", "run"]):
            env = of_users(**(self.slurm() if "hydra/launcher=apt_slurm" in words else {}))
            ended = subprocess.run(
                [sys.executable, *words[1:]], cwd=self.folder, env=env, capture_output=True, text=True, timeout=HANGS
            )
            assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
        elif words[:2] != ["python", "-m"] or any(word.startswith(tuple(SPELLED)) for word in words):
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
        if "trainer.compile=true" in arguments:
            env = env | {COMPILER: BACKEND}
        return self.forks.run(*arguments, cwd=self.folder, module=module, env=env)

    def meet(self, error: str, module: str, arguments: list[str]) -> None:
        """See that a command is refused, in the words of the page, which may leave lines out."""
        named = any(argument.startswith("hydra.run.dir=") for argument in arguments)
        ended = self.run(module, shortened(module, arguments) if named else arguments, {"COLUMNS": "80"})
        said = re.sub(rf"{re.escape(str(self.folder))}\b", HOME, ended.err + ended.out)
        assert ended.code in (1, 2), said
        assert "Traceback" not in said
        lines = [line.rstrip() for line in said.splitlines()]
        for line in error.replace("\n...\n", "\n").splitlines():
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
            sweep.parser().parse_args(arguments)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, module
        case ["make", target, *_]:
            assert re.search(rf"^{target}:.*## ", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE), target
        case ["pip", "install", *wanted]:
            for extra in re.findall(r"\[(\w+)\]", " ".join(wanted)):
                assert re.search(rf"^{extra} = \[", (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE), (
                    extra
                )
        case ["pytest", *arguments]:
            for path in (argument for argument in arguments if argument.startswith("tests")):
                assert (REPOSITORY / path).exists(), path
        case ["wandb", "sweep", path]:
            assert (REPOSITORY / path).exists(), path
        case _:
            raise AssertionError(f"nobody knows how to check {shlex.join(words)!r}")


def shortened(module: str, arguments: list[str]) -> list[str]:
    """Return a command that does the same with a very small model, and sends no sweep that has no folder of its own."""
    if module != "apt_launch" or {"--cfg", "--help", "-sc"} & set(arguments):
        return arguments
    sizes = {override.split("=", 1)[0] for override in SMALL if override.startswith("model.")}
    if "--allow" in arguments or any(argument.startswith("model=") for argument in arguments):
        small = [override for override in SMALL if not override.startswith("model.")]  # another model, of its own size
    else:
        small, arguments = list(SMALL), [argument for argument in arguments if argument.split("=", 1)[0] not in sizes]
    given = {argument.split("=", 1)[0] for argument in arguments}
    small = [override for override in small if override.split("=", 1)[0] not in given]
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
    forks = Forks()
    yield forks
    forks.close()


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
        for command in re.findall(
            r"`((?:python -m (?:tests|docs)\.|pytest |make )[^`]*)`", page.read_text(encoding="utf-8")
        )
    }
)


@pytest.mark.parametrize("command", INLINE)
def test_a_command_in_a_sentence_names_what_is_there(command: str) -> None:
    check_spelling(shlex.split(command))


# --- the site ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages as ``make docs`` builds them; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    told = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**environment(), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert (told.returncode, told.stdout + told.stderr) == (0, "")
    return folder


def test_the_site_brings_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        brought = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*?(?:href|src)=\"?([^\"\s>]+)", page.read_text())
        assert not [address for address in brought if re.match(r"(https?:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()[^;)]*//", style.read_text()), style


@pytest.mark.parametrize("path", generated.PAGES)
def test_a_reference_page_is_what_the_code_says(path: str) -> None:
    kept = (DOCS / path).read_text(encoding="utf-8")
    assert kept == generated.PAGES[path](), f"docs/{path} is out of date. Renew it by: python -m docs.generated"


def test_every_key_of_every_option_stands_in_the_reference_with_a_meaning() -> None:
    page = generated.config_page()
    rows = {row[0].strip("` "): row[-1].strip() for row in _rows(page)}
    assert [key for key, told in rows.items() if not told] == []
    grammar = {(key.alias or name) for model in generated.GRAMMAR for name, key in model.model_fields.items()}
    wanted = set()
    for group in GROUPS:
        for option in generated.options(group):
            assert f"### {group}={option.name}\n" in page
            for key in option.keys:
                name, _, inner = key.partition(".")
                wanted.add(f"{group}.{name}")
                assert not inner or inner in grammar, key
            schema = {field.alias or name for name, field in option.schema.model_fields.items()} - {"_target_"}
            assert schema == {key for key in option.keys if "." not in key}
    for path, prefix in (("hydra/launcher/local", "hydra.launcher"), ("hydra/launcher/slurm", "hydra.launcher")):
        wanted |= {f"{prefix}.{key}" for key in generated.written(CONF / f"{path}.yaml") if not key.startswith("_")}
    wanted |= {key for key in generated.written(CONF / "config.yaml") if key == "seed" or key.startswith("launch.")}
    assert wanted <= rows.keys(), wanted - rows.keys()


def _rows(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    return [line.strip("|").split("|") for line in lines]


def test_what_yaml_says_is_read_with_the_comment_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("# Of all.\na: 1 # first\nb: # both\n  c: '#x' # second\n  d: [1, 2]\ne: {f: 1} # in one\n")
    assert generated.introduction(path) == "Of all."
    assert generated.written(path) == {
        "a": ("1", "first"),
        "b": ("", "both"),
        "b.c": ("'#x'", "second"),
        "b.d": ("[1, 2]", ""),
        "e": ("{f: 1}", "in one"),
    }


@pytest.mark.parametrize(
    ("annotation", "told"),
    [
        (Positive, "integer, at least 1"),
        (Positive | None, "integer, at least 1; or null"),
        (Annotated[float, Field(ge=0, lt=1)], "number, at least 0 and below 1"),
        (Literal["a", "b"], "one of `a`, `b`"),
        (list[str], "list of text"),
    ],
)
def test_a_type_is_described_in_words(annotation: Any, told: str) -> None:
    assert generated.domain(annotation) == told


def test_pictures_are_what_the_code_draws() -> None:
    for name, anneal in pictures.shown().items():
        path = pictures.DOCS / "pictures" / f"{name}.svg"
        assert path.read_text(encoding="utf-8") == pictures.picture(name, anneal), "run: python -m docs.pictures"


def test_every_shape_is_drawn() -> None:
    drawn = {anneal.type for anneal in pictures.shown().values()}
    assert drawn == set(get_args(Anneal.model_fields["type"].annotation))


def test_every_metric_is_documented(small: Callable[..., RunConfig], reader: Reader) -> None:
    page = (REPOSITORY / "docs/reference/metrics.md").read_text(encoding="utf-8")
    told = {name for row in _rows(page) for name in re.findall(r"`([^`]+)`", row[0] + row[1])}
    layers = re.compile(r"(?<=moe/)layer_\d\d/|(?<=val/)layer_\d\d/|(?<=val/)source/.*/")
    assert {layers.sub("", name) for name in metrics(small().values)} <= told
    reader.call("python -m apt_launch hydra.run.dir=run", None)
    logged = {layers.sub("", name) for row in read_rows(reader.folder / "run" / "metrics.jsonl") for name in row}
    assert logged <= told, logged - told


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md"])
def test_the_code_that_the_design_names_is_there(page: str) -> None:
    named = re.findall(r"`(apt_\w+/[\w/]+\.py)(?:: (\w+))?`", (REPOSITORY / page).read_text(encoding="utf-8"))
    named = [(path, name) for path, name in named if not path.endswith(("/NAME.py", "/scale.py"))]  # yet to be made
    assert len(named) > 10
    for path, name in named:
        source = (REPOSITORY / path).read_text(encoding="utf-8")
        assert not name or re.search(rf"^ *def {name}\(", source, flags=re.MULTILINE), (path, name)


def test_messages_of_running_jobs_are_still_said() -> None:
    page = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(
        r"`([^`]+)`", " ".join(re.findall(r"^\| (.*?) \|", page.split("## While a run trains")[1], re.M))
    )
    said = "".join(
        path.read_text(encoding="utf-8")
        for name in ("apt_model", "apt_launch")
        for path in (REPOSITORY / name).rglob("*.py")
    )
    for message in quoted:
        assert re.split(r" ?[A-Z]{4,}", message)[0] in said, message
