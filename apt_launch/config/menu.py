"""What ``conf/`` offers: groups, their options, keys with their values. Read from the YAML itself, without Hydra."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

_PACKAGE = Path(__file__).parent.parent
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The folder ``conf``: inside the package when installed, beside it in a checkout. It holds ``sweeps``, too."""

COMMANDS: Final = {
    "apt_launch.preview": "a curriculum before it runs: timeline, curves, sizes, cost",
    "apt_launch.sweep": "a sweep after its launch, from any terminal",
    "apt_launch.watch": "a run while it trains, in the terminal",
    "apt_launch.generate": "text from a run's checkpoint",
    "apt_launch.evaluate": "loss, perplexity and bits a byte of a run's checkpoint",
    "apt_launch.compare": "runs side by side, at equal tokens",
    "apt_launch.average": "the mean of the weights of a run's checkpoints",
    "apt_launch.export": "a run's weights as transformers and vLLM load them",
    "apt_launch.tokenize": "memory-mapped shards of a large corpus",
    "apt_launch.sync": "deliver to W&B what a run kept offline",
}
"""Commands beside ``python -m apt_launch``: modules, or packages with a ``__main__``."""

ADDED: Final = {
    "sweeps": "a sweep that is kept, with --multirun",
    "sweeps/study": "one of the ways that +sweeps=study compares",
}
"""Groups that no run has unless they are added, by ``+``, and what they are for."""

DEFAULT = re.compile(r"  - (?:override )?(?P<group>[\w/]+): (?P<option>\w+)(?: # (?P<comment>.*))?")
HIDDEN = re.compile(r"(^|\.)_\w+_$|^hydra\.(callbacks|help|job|job_logging)\.")
"""Keys that nobody sets."""

ENTRY = re.compile(r"(?P<indent> *)(?P<key>[\w/]+):(?: (?P<value>[^#\n]*[^#\s]))?(?: +# (?P<comment>.*))?")


@dataclass(frozen=True)
class Group:
    """A group: what it is for, the names of its files, and which is chosen where nothing is said (None: none of them)."""

    purpose: str
    options: tuple[str, ...]
    default: str | None


def groups() -> dict[str, Group]:
    """Return the groups by name: first those that a run has, in the order of ``conf/config.yaml``; then those to add by ``+``."""
    found = {}
    for match in map(DEFAULT.fullmatch, _lines(CONF / "config.yaml")):
        if match:
            name, option, comment = match["group"], match["option"], match["comment"] or ""
            found[name] = Group(comment, _options(name), None if option == "null" else option)
    return found | {name: Group(comment, _options(name), None) for name, comment in ADDED.items()}


def _options(group: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


@dataclass(frozen=True)
class Key:
    """A key's value in YAML, and what else it may be, where its comment says so."""

    value: str
    choices: tuple[str, ...] = ()


def keys(chosen: Mapping[str, str] | None = None) -> dict[str, Key]:
    """Return every key that can be set, dotted; ``chosen``: options by group, where they are not the default."""
    chosen = {**_set_by_profile((chosen or {}).get("profile")), **(chosen or {})}
    found = _keys_of(CONF / "config.yaml")
    for name, group in groups().items():
        path = CONF / name / f"{chosen.get(name, group.default)}.yaml"
        if path.exists() and name.partition("/")[0] not in ("sweeps", "profile"):
            found |= {
                f"{_package(path) or name.replace('/', '.')}.{key}": entry for key, entry in _keys_of(path).items()
            }
    found = {key: entry for key, entry in found.items() if not HIDDEN.search(key)}
    by_leaf = {key.rpartition(".")[2]: entry.choices for key, entry in found.items() if entry.choices}
    return {
        key: Key(entry.value, entry.choices or by_leaf.get(key.rpartition(".")[2], ())) if key.count(".") > 1 else entry
        for key, entry in found.items()
    }


def _package(path: Path) -> str | None:
    """Return below which key a file's keys stand, where that is not the name of its group."""
    return _lines(path)[0].partition("# @package ")[2] or None


def options_below(key: str) -> list[str]:
    """Return the options of groups within groups that list the dotted ``key``, as ``trainer/lr=wsd``."""
    found = [(name, option) for name, group in groups().items() if "/" in name for option in group.options]
    files = [(f"{name}={option}", CONF / name / f"{option}.yaml") for name, option in found]
    return [
        shown
        for shown, path in files
        if (package := _package(path)) and key in {f"{package}.{below}" for below in _keys_of(path)}
    ]


def _set_by_profile(profile: str | None) -> dict[str, str]:
    """Return the options that a profile chooses, by group."""
    path = CONF / "profile" / f"{profile}.yaml"
    found = map(re.compile(r"  - override /([\w/]+): (\w+)").fullmatch, _lines(path) if path.exists() else ())
    return {match[1]: match[2] for match in found if match}


def _keys_of(path: Path) -> dict[str, Key]:
    """Return the keys of one file, with those of a file beside it that it builds on."""
    found: dict[str, Key] = {}
    above: list[tuple[int, str]] = []  # open sections: indent, key
    for line in _lines(path):
        if line == "  - default":
            found |= _keys_of(path.with_name("default.yaml"))
        match = ENTRY.fullmatch(line)
        if match is None or match["key"] == "defaults":
            continue
        while above and above[-1][0] >= len(match["indent"]):
            above.pop()
        above.append((len(match["indent"]), match["key"]))
        if match["value"] is not None:
            key = ".".join(key for _, key in above)
            found[key] = Key(match["value"], _choices(match["value"], match["comment"] or ""))
    return found


def _choices(value: str, comment: str) -> tuple[str, ...]:
    """Return the words that a comment lists: ``sdpa, eager``, also after a colon and with remarks in brackets."""
    if value in ("true", "false"):
        return ("true", "false")
    listed = re.sub(r"\s*\([^)]*\)", "", comment).rpartition(": ")[2].split(", ")
    return tuple(listed) if value in listed and all(re.fullmatch(r"[\w:]+", word) for word in listed) else ()


def _lines(path: Path) -> Sequence[str]:
    return path.read_text(encoding="utf-8").splitlines()


def entry_point(command: str) -> str:
    """Return the module that ``python -m command`` runs; it has ``parser()``."""
    spec = find_spec(command)
    return f"{command}.__main__" if spec is not None and spec.submodule_search_locations else command


def version() -> str:
    """Return what runs here, in one line; torch is not loaded."""
    import platform
    from importlib import metadata

    from apt_launch.version import __version__

    def of(package: str) -> Any:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    others = ", ".join(f"{package} {of(package)}" for package in ("torch", "hydra-core"))
    return f"apt-launch {__version__} ({others}, Python {platform.python_version()})"
