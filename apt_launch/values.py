"""A config's plain values: nested and flat, and as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from apt_model.errors import ConfigError
from apt_model.files import read_regular

MOST_VALUES: Final = 1 << 24
"""Values of one file, each counted wherever YAML's aliases repeat it; more of them are an attack."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one: dotted key to value; lists and empty mappings stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{full}.")
        else:
            flat[full] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`flatten`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ; ``before`` and ``now`` are flat."""
    missing = object()
    keys = sorted({*before, *now})
    return [key for key in keys if before.get(key, missing) != now.get(key, missing)]


def to_yaml(content: Mapping[str, Any]) -> str:
    """Return ``content`` as YAML, keys in their order."""
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def from_yaml(text: str) -> dict[str, Any]:
    """Return what ``text`` holds.

    Raises:
        ValueError: it is no YAML, no mapping, or repeats itself without an end.
    """
    import yaml

    try:
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
        if _count(content, {}) > MOST_VALUES:
            raise ValueError("its aliases stand for more values than any config has")
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply, or holds itself") from None
    return content


def _count(value: Any, known: dict[int, int]) -> int:
    """Return how many values there are in ``value``, each wherever it stands; ``known`` has those of its parts."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]


def read_frozen(path: Path) -> dict[str, Any]:
    """Return the values of a run's ``config.yaml``.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        return from_yaml(read_regular(path).decode("utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{path}: the config of the run cannot be read: {error}") from None
