"""A config's plain values: nested and flat, and as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from apt_model.errors import ConfigError
from apt_model.files import read_regular

MOST_VALUES: Final = 1 << 24
"""Values of one file, each counted wherever YAML's aliases repeat it; more of them are an attack."""

DEEPEST: Final = 50
"""Levels of a file."""

PLAIN_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
)


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
        if "&" in text:  # without an anchor nothing repeats itself
            check_yaml(text, "YAML", MOST_VALUES)
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(content, dict):
            raise ValueError("not a mapping")
    except (yaml.YAMLError, ConfigError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply, or holds itself") from None
    return content


def check_yaml(text: str, place: str, most: int, longest: int | None = None) -> None:
    """Make sure that ``text`` makes no more than ``most`` values, and has plain ones only; nothing is built.

    Each alias counts as all that it stands for.

    Args:
        longest: characters of a value with an interpolation in it; None: it is not read as one.

    Raises:
        ConfigError: it makes more, is deeper than :data:`DEEPEST`, has a tag, or an interpolation that is too long.
        yaml.YAMLError: it is no YAML.
    """
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    count = 0

    def where(event: yaml.Event) -> str:
        return f"{place}, line {event.start_mark.line + 1}, column {event.start_mark.column + 1}"

    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in PLAIN_TAGS and tag != "!":
            raise ConfigError(f"{where(event)}: the tag {tag!r} has no place in a config. Write the value without it.")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(f"{where(event)}: the alias *{event.anchor} names nothing that ends before it.")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            if longest is not None and len(event.value) > longest and "${" in event.value:
                raise ConfigError(
                    f"{where(event)}: a value with an interpolation is longer than {longest} characters. Write it out."
                )
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            sizes.pop(event.anchor, None)
            count += 1
            if len(open_nodes) > DEEPEST:
                raise ConfigError(f"{where(event)}: more than {DEEPEST} levels. Write it flatter.")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > most:
            raise ConfigError(
                f"{where(event)}: more than {most} values, each alias counted as what it stands for. Write out what is "
                "needed."
            )


def read_frozen(path: Path) -> dict[str, Any]:
    """Return the values of a run's ``config.yaml``.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        return from_yaml(read_regular(path).decode("utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"{path}: the config of the run cannot be read: {error}") from None
