"""What a config may not do: have Hydra build or open what it should not, or carry a secret into files.

A config comes from many hands: presets, profiles of colleagues, folders given by ``--config-dir``. Hydra builds callbacks,
launchers, sweepers and log handlers from its own node before any code of ours sees a value, so that node is judged where
configs are composed. What the groups may build is :data:`apt_launch.config.instantiate.ALLOWED`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf

from apt_launch.sweep.secrets import secret_problems
from apt_model.errors import ConfigError

HYDRA_TARGETS: Final = frozenset(
    {
        "apt_launch.runs.before_start.CheckBeforeStart",
        "apt_launch.config.CheckBeforeStart",  # as earlier versions call it
        "hydra_plugins.apt_launch.PlanSweeper",
        "hydra_plugins.apt_launch.LocalLauncher",
        "hydra_plugins.apt_launch.SlurmLauncher",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    }
)
"""What Hydra's own node may build, beside plugins that are installed."""

PLUGINS: Final = "hydra_plugins."
"""The package of installed plugins, whose classes a launcher or a sweeper may be."""

OPTUNA: Final = re.compile(r"optuna\.samplers\.[A-Z]\w*Sampler|optuna\.pruners\.[A-Z]\w*Pruner")
"""What the sweeper of Optuna may be given."""

LOGGING: Final = frozenset(
    {
        "apt_launch.runs.console.Stdout",
        "apt_launch.console.Stdout",  # as earlier versions call it
        "colorlog.ColoredFormatter",
        "logging.FileHandler",
        "logging.Formatter",
        "logging.NullHandler",
        "logging.StreamHandler",
        "logging.handlers.RotatingFileHandler",
        "logging.handlers.TimedRotatingFileHandler",
        "rich.logging.RichHandler",
    }
)
"""Classes of handlers and formatters."""

STREAMS: Final = ("ext://sys.stdout", "ext://sys.stderr")
LOG_FILE: Final = re.compile(r"\$\{hydra\.(runtime\.output_dir|run\.dir|sweep\.dir)\}/(\$\{hydra\.job\.name\}|[\w.-])+")
LOADERS: Final = re.compile(r"(LD|DYLD|PYTHON|GIT|BASH)_?\w*|ENV|PATH|SHELLOPTS")
"""Environment variables that make other programs load code."""


def install() -> None:
    """Judge every config that Hydra composes in this process from now on."""
    import hydra._internal.hydra as hydra
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    class GuardedLoader(ConfigLoaderImpl):
        def load_configuration(self, *arguments: Any, **options: Any) -> DictConfig:
            composed = super().load_configuration(*arguments, **options)
            check_hydra(composed)
            return composed

    hydra.ConfigLoaderImpl = GuardedLoader  # type: ignore[attr-defined]


def check_hydra(composed: DictConfig) -> None:
    """Judge the node ``hydra`` of a composed config, before Hydra acts on it.

    Raises:
        ConfigError: with every problem found.
    """
    node: Any = OmegaConf.to_container(composed["hydra"], resolve=False)
    problems = [*_target_problems(node), *secret_problems(node, "hydra")]
    for name in ("hydra_logging", "job_logging"):
        problems += _logging_problems(node.get(name) or {}, f"hydra.{name}")
    for key in (node.get("job") or {}).get("env_set") or {}:
        if LOADERS.fullmatch(str(key)):
            problems.append(f"hydra.job.env_set.{key}: a config may not set it: programs load code by it.")
    for key, path in (
        ("hydra.output_subdir", node.get("output_subdir")),
        ("hydra.sweep.subdir", (node.get("sweep") or {}).get("subdir")),
        ("hydra.job.name", (node.get("job") or {}).get("name")),
    ):
        if path is not None and (str(path).startswith(("/", "~")) or ".." in str(path).split("/")):
            problems.append(f"{key}: {path!r} would lead out of the run's folder. Give a plain name.")
    if problems:
        raise ConfigError(*problems)


def _target_problems(node: Mapping[str, Any]) -> Iterator[str]:
    for path, target in _targets(node):
        role = path.split(".", 1)[0]
        if target in HYDRA_TARGETS or (role == "sweeper" and OPTUNA.fullmatch(str(target))):
            continue
        if role in ("launcher", "sweeper") and str(target).startswith(PLUGINS) and _is_class(str(target)):
            continue
        yield f"hydra.{path}: {target!r} may not be built here."


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            below = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield below, value
            else:
                yield from _targets(value, below)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _targets(value, f"{path}.{number}")


def _is_class(target: str) -> bool:
    """Say whether ``target`` is a class of a plugin itself, and not an alias of something else."""
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception:
        return False
    return isinstance(found, type) and f"{found.__module__}.".startswith(PLUGINS)


def _logging_problems(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            below = f"{path}.{key}"
            if key in ("class", "()", "factory"):
                if value not in LOGGING:
                    yield f"{below}: {value!r} may not be built here. Choose one of {', '.join(sorted(LOGGING))}."
            elif key == "filename":
                if not LOG_FILE.fullmatch(str(value)) or ".." in str(value):
                    yield f"{below}: {value!r} is no file in the run's folder. Write ${{hydra.runtime.output_dir}}/NAME."
            else:
                yield from _logging_problems(value, below)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _logging_problems(value, f"{path}.{number}")
    elif isinstance(node, str) and node.startswith(("ext://", "cfg://")) and node not in STREAMS:
        yield f"{path}: {node!r} may not be reached from here. Choose one of {', '.join(STREAMS)}."
