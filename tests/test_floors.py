"""A floor imports only from lower ones (see the tables in README and the docstrings of the packages)."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import apt_launch
import apt_model
from tests.forks import HANGS

FLOORS = {
    0: ("apt_model.schedule", "apt_model.errors", "apt_model.files"),
    1: ("apt_model.layers", "apt_model.gpt", "apt_model.generation"),
    2: ("apt_model.training", "apt_model.data", "apt_model.integrations"),
    3: ("apt_launch",),
}
LIBRARIES_FROM = {"torch": 1, "hydra": 3, "omegaconf": 3, "submitit": 3, "wandb": 3, "rich": 3, "matplotlib": 3}
ONLY_IN = {
    "lightning": "apt_model.integrations.lightning",
    "transformers": "apt_model.integrations.transformers",
    "accelerate": "apt_model.integrations.transformers",
    "tokenizers": "apt_model.data.tokenizer",
    "datasets": "apt_model.data.huggingface",
}


def modules() -> list[str]:
    found = []
    for package in (apt_model, apt_launch):
        found += [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    return found


def floor(module: str) -> int:
    for number, roots in FLOORS.items():
        if any(module == root or module.startswith(f"{root}.") for root in roots):
            return number
    raise AssertionError(f"{module} has no floor")


def imports(module: str) -> set[str]:
    root = Path(apt_model.__file__).parent.parent
    path = root / (module.replace(".", "/") + ".py")
    path = path if path.exists() else root / module.replace(".", "/") / "__init__.py"
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_its_floor_and_below(module: str) -> None:
    for name in imports(module):
        if name.startswith(("apt_model.", "apt_launch")):
            assert floor(name) <= floor(module), f"{module} imports {name}"
        elif name.split(".")[0] in LIBRARIES_FROM:
            assert LIBRARIES_FROM[name.split(".")[0]] <= floor(module), f"{module} imports {name}"
        elif name.split(".")[0] in ONLY_IN:
            assert ONLY_IN[name.split(".")[0]] == module, f"{module} imports {name}"


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
