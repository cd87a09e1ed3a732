"""Which module may import which: no circles, only what a room's row allows, and heavy libraries only where they are used."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import HANGS

ROOT = Path(__file__).parent.parent

BASE = ("apt_model.errors", "apt_model.files", "apt_model.limits", "apt_model.ignored")
GROUND = tuple(
    f"apt_launch.{name}"
    for name in (
        *("version", "allow", "record", "rows", "values", "secrets", "lease"),
        *("commands", "command_line", "drawing", "escapes", "interpolations", "sparkline"),
    )
)
MODEL = (
    *("apt_model.schedule", "apt_model.layers", "apt_model.gpt", "apt_model.data", "apt_model.training"),
    "apt_model.layouts",
)
PLAN = (*BASE, *GROUND, "apt_launch.sweep", "apt_launch.sweep.options")
CONTROL = (*PLAN, "apt_launch.sweep.plan", "apt_launch.sweep.jobs")

ROOMS: dict[str, tuple[str, ...] | None] = {
    "apt_model": (),
    "apt_model.errors": (),
    "apt_model.limits": (),
    "apt_model.ignored": (),
    "apt_model.files": ("apt_model.errors",),
    "apt_model.schedule": BASE,
    "apt_model.layers": (*BASE, "apt_model.schedule"),
    "apt_model.gpt": (*BASE, "apt_model.schedule", "apt_model.layers"),
    "apt_model.generation": (*BASE, "apt_model.layers", "apt_model.gpt"),
    "apt_model.data": BASE,
    "apt_model.layouts": (*BASE, "apt_model.gpt", "apt_model.data"),
    "apt_model.training": (*BASE, "apt_model.schedule", "apt_model.layers", "apt_model.gpt", "apt_model.data"),
    "apt_model.integrations": (*BASE, *MODEL),
    **dict.fromkeys(GROUND, (*BASE, *GROUND)),
    "apt_launch.sweep.options": BASE,
    "apt_launch.sweep": (*BASE, *GROUND, "apt_launch.sweep.options"),
    "apt_launch.sweep.plan": PLAN,
    "apt_launch.sweep.jobs": PLAN,
    "apt_launch.sweep.programs": (*BASE, *GROUND, "apt_launch.sweep", "apt_launch.sweep.options"),
    "apt_launch.sweep.backends": CONTROL,
    "apt_launch.sweep.control": (*CONTROL, "apt_launch.sweep.backends", "apt_launch.sweep.programs"),
    "apt_launch.sweep.report": (*CONTROL, "apt_launch.sweep.control"),
    "apt_launch.sweep.watch": (*CONTROL, "apt_launch.sweep.control", "apt_launch.sweep.report"),
    **dict.fromkeys(
        (
            *("apt_launch.sweep.cli", "apt_launch.sweep.plugins", "apt_launch.sweep.__main__"),
            "apt_launch.sweep.namespace",
        ),
        (
            *(*CONTROL, "apt_launch.sweep.control", "apt_launch.sweep.backends", "apt_launch.sweep.report"),
            *("apt_launch.sweep.watch", "apt_launch.sweep.cli", "apt_launch.sweep.plugins"),
            "apt_launch.sweep.programs",
        ),
    ),
    "apt_launch.tracking": (*BASE, *GROUND),
    "apt_launch.config": (*BASE, *GROUND, *MODEL, "apt_launch.sweep.options"),
    "apt_launch.runs": (*BASE, *GROUND, *MODEL, "apt_launch.config", "apt_launch.tracking"),
    "apt_launch.preview": (*BASE, *GROUND, *MODEL, "apt_launch.config", "apt_launch.sweep.plan"),
    "apt_launch.cli": (*BASE, *GROUND, "apt_model.schedule", "apt_launch.config"),
    "apt_launch.preview.__main__": None,
    "apt_launch": None,
}
"""Rooms, by the package or module that they are, and the rooms that each may import beside itself; None: all, as a command may.

What stands in no inner room of ``apt_launch.sweep`` is the protocol, ``application.py``.
"""

WITHOUT = {
    "torch": (*BASE, "apt_model.schedule", *GROUND, "apt_launch.sweep"),
    **dict.fromkeys(("hydra", "omegaconf", "submitit", "wandb", "rich", "matplotlib"), ("apt_model",)),
}
"""Libraries, and the packages and modules that do not import them."""

ONLY_IN = {
    "lightning": ("apt_model.integrations.lightning",),
    "transformers": ("apt_model.integrations.transformers", "apt_model.layouts.gguf"),
    "accelerate": ("apt_model.integrations.transformers",),
    "tokenizers": ("apt_model.data.tokenizer",),
    "datasets": ("apt_model.data.huggingface",),
}


def sources() -> dict[str, Path]:
    """All modules of both packages, by name."""
    found = {}
    for path in sorted([*ROOT.glob("apt_model/**/*.py"), *ROOT.glob("apt_launch/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def imports(module: str) -> Iterator[str]:
    """All that ``module`` imports anywhere, within functions and for the type checker, too."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module}: imports are absolute here"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in SOURCES else node.module


def room(module: str) -> str:
    return max((name for name in ROOMS if f"{module}.".startswith(f"{name}.")), key=len)


def test_no_module_is_imported_by_what_it_imports() -> None:
    graph = {module: {name for name in imports(module) if name in SOURCES} - {module} for module in SOURCES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle, each imports the one before it: {', '.join(error.args[1])}")


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    mine = room(module)
    allowed = ROOMS[mine]
    for name in imports(module):
        library = name.split(".")[0]
        if name in SOURCES and allowed is not None:
            assert room(name) in (mine, *allowed), f"{module} ({mine}) imports {name} ({room(name)})"
        elif library in WITHOUT:
            assert not any(f"{module}.".startswith(f"{other}.") for other in WITHOUT[library]), f"{module}: {name}"
        elif library in ONLY_IN:
            assert module in ONLY_IN[library], f"{module} imports {name}"


def loaded(code: str) -> set[str]:
    """Run ``code`` in a fresh interpreter and return the libraries that it has loaded."""
    watched = ("torch", "hydra", "wandb", "pydantic", "numpy", "matplotlib", "submitit", "rich", *ONLY_IN)
    program = f"{code}\nimport sys; print(*[m for m in {watched} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS, check=True)
    return set(result.stdout.split("\n")[-2].split())


def test_the_curriculum_loads_no_torch() -> None:
    assert loaded("import apt_model.schedule, apt_model.errors") == {"pydantic"}


def test_training_and_layers_load_no_launcher() -> None:
    code = "import apt_model.gpt, apt_model.training.trainer, apt_model.data.batches"
    assert not loaded(code) & {"hydra", "wandb", "matplotlib", "submitit", "rich", *ONLY_IN}


def test_composing_loads_neither_torch_nor_pydantic_nor_wandb() -> None:
    code = "import sys; sys.argv[1:] = ['--cfg', 'job', '--resolve']; from apt_launch.__main__ import main; main()"
    assert loaded(code) == {"hydra"}


def test_checking_a_config_loads_no_torch() -> None:
    code = (
        "from hydra import compose, initialize_config_dir\n"
        "from apt_launch.config.load import CONF, load\n"
        "with initialize_config_dir(str(CONF), version_base='1.3'):\n"
        "    config = load(compose('config', overrides=['schedule=gpt5_moe']))\n"
        "    load(compose('config', overrides=['trainer=lightning']))\n"
        "    load(compose('config', overrides=['trainer=hf']))\n"
        "from pathlib import Path\n"
        "from apt_launch.runs.folder import RunFolder\n"
        "RunFolder(Path('nowhere')).check_free(config)\n"
    )
    assert not loaded(code) & {"torch", *ONLY_IN}


def test_the_half_of_sweeps_loads_nothing_of_the_trainer() -> None:
    theirs = [
        name
        for name in SOURCES
        if name.startswith("apt_launch.sweep.") and SOURCES[name].parent.name != "hydra_plugins"
    ]
    code = (
        f"import {', '.join(name for name in theirs if not name.endswith('__main__'))}\n"
        "import sys; print(*[name for name in sys.modules if name.startswith(('apt_model.', 'apt_launch.'))])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=True)
    others = {name for name in result.stdout.split() if not name.startswith("apt_launch.sweep")}
    assert others <= {*BASE, *GROUND}
    assert "torch" not in loaded(code)
