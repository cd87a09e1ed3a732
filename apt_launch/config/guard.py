"""What a config may not do: have Hydra build or open what it should not, or carry a secret into files.

A config comes from many hands: presets, profiles of colleagues, folders given by ``--config-dir``. Hydra builds callbacks,
launchers, sweepers and log handlers from its own node before any code of ours sees a value, so that node is judged where
configs are composed. What the groups may build is :data:`apt_launch.config.instantiate.ALLOWED`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf

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

SECRET_NAME: Final = re.compile(
    r"(^|[_.\-])(password|passwd|passphrase|secrets?|(auth|access|bearer|hf)?_?token|api_?key|access_?key|private_?key|"
    r"secret_?key|credentials?)($|[_.\-=])",
    re.IGNORECASE,
)
SECRET_VALUE: Final = re.compile(
    r"\b(sk-[\w-]{20,}|hf_\w{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}|"
    r"AKIA[0-9A-Z]{16}|wandb_v1_\w{20,}|AIza[\w-]{30,}|ey[\w-]{15,}\.ey[\w-]{15,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|://[^/\s:@]+:[^/\s@]+@"
)
ASSIGNMENT: Final = re.compile(r"([\w.-]+)[\"']?\s*[=:]\s*[\"']?(?![\"'\s$]|os\.|None|null)[^\"'\s]{6,}")
SHORTEST_SECRET: Final = 8


def keep_private() -> None:
    """Let only this user read what the process writes from now on: configs, logs, job scripts, W&B's files."""
    os.umask(0o077)


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
    problems = [*_target_problems(node), *_secret_problems(node, "hydra")]
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


# --- secrets -----------------------------------------------------------------------------------------------------------


def check_secrets(values: Mapping[str, Any]) -> None:
    """Make sure that no value is a secret: a config ends in the run's folder, in W&B and in job scripts.

    Raises:
        ConfigError: with every problem found, and without the secrets.
    """
    problems = list(_secret_problems(values, ""))
    if problems:
        raise ConfigError(*problems)


def _secrets_of_the_environment() -> dict[str, str]:
    """Return the variables that are named like secrets, and long enough to be found elsewhere by their value."""
    return {
        name: value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET
    }


def _secret_problems(values: Any, path: str) -> list[str]:
    known = _secrets_of_the_environment()
    problems = []
    for key, value in _leaves(values, path):
        reason = _reason(key, value, known)
        if reason:
            problems.append(
                f"{key}: {reason}. A config is written to the run's folder, to W&B and to job scripts. Set secrets in the "
                "environment of the process that needs them."
            )
    return problems


def _reason(key: str, value: Any, known: Mapping[str, str]) -> str | None:
    if value is None or value == "" or str(value) == "???":
        return None
    if SECRET_NAME.search(key.rsplit(".", 1)[-1]) and isinstance(value, str):
        return "by its name it holds a secret"
    if not isinstance(value, str):
        return None
    if SECRET_VALUE.search(value) or _assigns_a_secret(value):
        return "its value looks like a secret"
    named = re.search(r"\$\{oc\.env:([^},]+)", value)
    if named and SECRET_NAME.search(named.group(1).strip()):
        return f"it takes the secret {named.group(1).strip()} from the environment"
    name = next((name for name, secret in known.items() if secret in value), None)
    return f"it has the value of the environment's {name}" if name else None


def _assigns_a_secret(text: str) -> bool:
    return any(SECRET_NAME.search(match.group(1)) for match in ASSIGNMENT.finditer(text))


def _leaves(values: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from _leaves(value, f"{path}.{number}" if path else str(number))
    else:
        yield path, values


def redacted(text: str) -> str:
    """Return ``text`` without the lines that look like they hold a secret."""
    known = _secrets_of_the_environment().values()

    def clean(line: str) -> str:
        hidden = SECRET_VALUE.search(line) or _assigns_a_secret(line) or any(secret in line for secret in known)
        return "[a line that looks like it holds a secret]" if hidden else line

    return "\n".join(map(clean, text.split("\n")))
