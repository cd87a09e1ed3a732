"""``python -m docs.generated`` writes the reference pages, which are kept in the repository, from the code.

Keys come from ``conf/`` and the schema, options from ``--help``. A key's meaning is the comment beside it, in
YAML or in the class that reads it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from apt_launch.config.menu import COMMANDS, CONF
from apt_launch.config.schema import GROUPS, OWN, LaunchConfig, LocalLauncherConfig, SlurmLauncherConfig, TopLevel
from apt_model.schedule.anneal import Anneal, Segment
from apt_model.schedule.spec import Event, When

GRAMMAR = (Anneal, Segment, Event, When)
"""What stands below keys of ``schedule``, and in ``trainer.lr_schedule``."""


class Written(NamedTuple):
    """A key as a YAML file has it."""

    value: str  # as it is written
    meaning: str  # the comment beside it


# --- what YAML says ----------------------------------------------------------------------------------------------------


def written(path: Path) -> dict[str, Written]:
    """Return every key of a YAML file, dotted, with its value and the comment beside it; mappings have their keys, too."""
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text)
    return dict(_keys(root, text.splitlines(), "")) if isinstance(root, yaml.MappingNode) else {}


def _keys(node: yaml.MappingNode, lines: list[str], prefix: str) -> Iterator[tuple[str, Written]]:
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        nested = isinstance(value, yaml.MappingNode) and not value.flow_style
        end = name.end_mark if nested else value.end_mark
        comment = re.search(r"(?:^|\s)#\s*(.*)", lines[end.line][end.column :])
        start = value.start_mark
        shown = "" if nested else lines[start.line][start.column : end.column if start.line == end.line else None]
        yield key, Written(shown.strip(), comment.group(1).strip() if comment else "")
        if nested:
            yield from _keys(value, lines, f"{key}.")


def introduction(path: Path) -> str:
    """Return the comment at the top of a YAML file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [
        line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    ]
    return " ".join(line for line in comment if not line.startswith("@"))


def comments(model: type[BaseModel]) -> dict[str, str]:
    """Return the comment beside each field of a class, by the field's name in YAML."""
    source = inspect.getsource(model)
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            beside = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()  # type: ignore[operator]
            field = model.model_fields[node.target.id]
            found[field.alias or node.target.id] = beside.partition("#")[2].strip()
    return found


# --- what the schema says ----------------------------------------------------------------------------------------------


def domain(annotation: Any, bounds: list[Any] | None = None) -> str:
    """Return in words which values a type takes."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        bounds = [*(bounds or []), *annotation.__metadata__]
        return domain(annotation.__origin__, bounds)
    flat = [m for bound in bounds or [] for m in (bound.metadata if isinstance(bound, FieldInfo) else [bound])]
    if origin in (Union, UnionType):
        kinds = dict.fromkeys(domain(kind, flat) for kind in inner if kind is not type(None))
        return " or ".join(kinds) + ("; or null" if type(None) in inner else "")
    if origin is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in inner)
    if origin is list:
        sizes = [m.min_length for m in flat if hasattr(m, "min_length") and hasattr(m, "max_length")]
        return f"list of {domain(inner[0])}" + (f" ({sizes[0]} of them)" if sizes else "")
    if origin is dict:
        return f"mapping to {domain(inner[1])}"
    if annotation in GRAMMAR:
        return f"[{annotation.__name__.lower()}](#{annotation.__name__.lower()})"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    if any(type(m).__name__ == "BeforeValidator" for m in flat):
        return "length" if any(m.func.__name__ in ("length", "span") for m in flat if hasattr(m, "func")) else "time"
    kind = {int: "integer", float: "number", bool: "`true` or `false`", str: "text"}.get(annotation, "anything")
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [f"{word} {getattr(m, sign):g}" for m in flat for sign, word in signs.items() if hasattr(m, sign)]
    if limits == ["above 0"] and annotation is int:
        limits = ["at least 1"]
    limits = [bound for bound in limits if not bound.endswith(f"{2.0**63:g}")]
    return f"{kind}, {' and '.join(limits)}" if limits else kind


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | default | value | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{key}` | {f'`{default}`' if default else ''} | {value} | {text} |" for key, default, value, text in rows
    ]
    return "\n".join(lines) + "\n"


class Option(NamedTuple):
    """One choice of a group."""

    name: str
    target: str | None
    keys: dict[str, Written]
    schema: type[BaseModel]


def options(group: str) -> list[Option]:
    """Return the options of a group, its default first."""
    found = []
    chosen = next(
        entry[group] for entry in yaml.safe_load((CONF / "config.yaml").read_text())["defaults"] if group in entry
    )
    for path in sorted((CONF / group).glob("*.yaml"), key=lambda path: (path.stem != chosen, path.stem)):
        keys = written(path)
        below = yaml.safe_load(path.read_text(encoding="utf-8"))
        for base in below.get("defaults", []):
            if base != "_self_":
                keys = written(path.parent / f"{base}.yaml") | {k: v for k, v in keys.items() if k != "defaults"}
        target = below["_target_"]
        del keys["_target_"]
        schema = GROUPS[group].get(target) or OWN[group]
        found.append(Option(path.stem, None if target == "???" else target, keys, schema))
    return found


def meaning(group: str, option: Option, key: str) -> str:
    """Return what a group's key means: the comment beside it, in this option or in the first that has one."""
    meanings = (one.keys[key].meaning for one in (option, *options(group)) if key in one.keys)
    return next(filter(None, meanings), "")


def _rows(group: str, option: Option) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, given in option.keys.items():
        if "." in key:  # what an anneal holds is described once, below
            continue
        field = next(f for name, f in option.schema.model_fields.items() if key in (f.alias, name))
        default = given.value
        if not default:
            inner = {k.split(".", 1)[1]: v.value for k, v in option.keys.items() if k.startswith(f"{key}.")}
            default = "{" + ", ".join(f"{name}: {value}" for name, value in inner.items()) + "}"
        text = meaning(group, option, key)
        rows.append((f"{group}.{key}", default, domain(field.annotation, list(field.metadata)), text))
    return rows


def _plain(path: str, schema: type[BaseModel] | None, prefix: str, only: str = "") -> str:
    rows = []
    for key, given in written(CONF / path).items():
        name = key.removeprefix(only)
        if not key.startswith(only) or name.startswith("_") or (schema is None and "." in key):
            continue
        field = _field(schema, name) if schema else None
        value = domain(field.annotation, list(field.metadata)) if field else "mapping" if name == "params" else "list"
        rows.append((f"{prefix}{name}", given.value, value, given.meaning))
    return _table(rows)


def _field(schema: type[BaseModel], name: str) -> FieldInfo | None:
    """Return the field of a dotted name."""
    first, _, rest = name.partition(".")
    field = schema.model_fields.get(first)
    if not rest or field is None:
        return field
    inner = field.annotation
    return _field(inner, rest) if isinstance(inner, type) and issubclass(inner, BaseModel) else None


# --- pages -------------------------------------------------------------------------------------------------------------


@functools.cache
def config_page() -> str:
    """Return the reference of every key."""
    parts = [
        "# Config keys\n",
        "Made from `conf/` and `apt_launch/config/schema.py` by `python -m docs.generated`. A key is given on the command "
        "line as `key=value`; where `conf/` does not list it, as `+key=value`. Defaults are those of the option; `???` has to be "
        "given. What would run: `python -m apt_launch --cfg job --resolve`.\n",
        "## No group\n",
        _table([*_top_rows()]),
        "## launch\n",
        "Resources of a job of a sweep. No part of a run's identity.\n",
        _plain("config.yaml", LaunchConfig, "launch.", only="launch."),
    ]
    for group in GROUPS:
        parts.append(f"## {group}\n")
        first: Option | None = None
        for option in options(group):
            names = f"`{group}={option.name}`" + (f": `{option.target}`." if option.target else ".")
            text = introduction(CONF / group / f"{option.name}.yaml")
            if first is not None and option.keys.keys() == first.keys.keys():
                parts.append(f"### {group}={option.name}\n\n{names} {text}\n\n{_differences(group, option, first)}\n")
                continue
            parts.append(f"### {group}={option.name}\n\n{names} {text}\n\n{_table(_rows(group, option))}")
            first = first or option
        for path in sorted((CONF / group).glob("*/*.yaml")):
            parts.append(_nested(path))
    for model in GRAMMAR:
        text = {
            Anneal: "A value that moves; [with pictures](../schedule.md#shapes). Below `schedule.anneals`, by name, "
            "`schedule.route_temp` and its like, and `trainer.lr_schedule`.",
            Segment: "A part of `segments`.",
            Event: "Below `schedule.events`, by name.",
            When: "A latch: what `when` of an event holds.",
        }[model]
        parts.append(f"## {model.__name__.lower()}\n\n{text}\n\n{_table(list(_grammar_rows(model)))}")
    parts.append(_profiles())
    parts.append("## hydra/launcher\n")
    for name, schema in (("local", LocalLauncherConfig), ("slurm", SlurmLauncherConfig)):
        path = f"hydra/launcher/{name}.yaml"
        parts.append(
            f"### hydra/launcher={name}\n\n{introduction(CONF / path)}\n\n{_plain(path, schema, 'hydra.launcher.')}"
        )
    path = "hydra/sweeper/plan.yaml"
    parts.append(
        f"## hydra/sweeper\n\n### hydra/sweeper=plan\n\n{introduction(CONF / path)}\n\n{_plain(path, None, 'hydra.sweeper.')}"
    )
    return "\n".join(parts)


def _nested(path: Path) -> str:
    """Return what an option of a group within a group sets: an anneal, below the key that it names."""
    name = f"{path.parent.relative_to(CONF).as_posix()}={path.stem}"
    key = path.read_text(encoding="utf-8").partition("# @package ")[2].partition("\n")[0]
    meanings = comments(Anneal)
    rows = [
        (
            f"{key}.{inner}",
            given.value,
            domain(field.annotation, list(field.metadata)),
            given.meaning or meanings[inner],
        )
        for inner, given in written(path).items()
        if (field := _field(Anneal, inner)) is not None
    ]
    return f"### {name}\n\n`{name}`, below `{key}`. {introduction(path)}\n\n{_table(rows)}"


def _top_rows() -> Iterator[tuple[str, str, str, str]]:
    keys = written(CONF / "config.yaml")
    for key in TopLevel.model_fields:
        if key != "launch":
            field = TopLevel.model_fields[key]
            yield key, keys[key].value, domain(field.annotation, list(field.metadata)), keys[key].meaning
    for key in ("hydra.run.dir", "hydra.sweep.dir"):
        yield key, keys[key].value, "path", keys[key].meaning


def _differences(group: str, option: Option, first: Option) -> str:
    """Return in which defaults an option with the same keys differs."""
    mine, its = ({key: default for key, default, *_ in _rows(group, one)} for one in (option, first))
    differ = [f"`{key}={value}`" for key, value in mine.items() if value != its[key]]
    return f"Keys of `{group}={first.name}`, " + (f"with {', '.join(differ)}." if differ else "with the same defaults.")


def _grammar_rows(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    meanings = comments(model)
    for name, field in model.model_fields.items():
        key = field.alias or name
        default = "" if field.is_required() else _shown(field.default)
        yield key, default, domain(field.annotation, list(field.metadata)), meanings[key]


def _shown(default: Any) -> str:
    return str(default) if not isinstance(default, None | bool | int | float) else json.dumps(default)


def _profiles() -> str:
    parts = ["## profile\n"]
    for path in sorted((CONF / "profile").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        body = "\n".join(line for line in text.splitlines() if not line.startswith("#")).strip()
        parts.append(f"### profile={path.stem}\n\n{introduction(path)}\n\n```yaml\n{body}\n```\n")
    return "\n".join(parts)


def commands_page() -> str:
    """Return what ``--help`` of each command says."""
    parts = ["# Commands\n", "What `--help` says; written here by `python -m docs.generated`.\n"]
    parts.append(f"## python -m apt_launch\n\n```text\n{help_of('__main__')}\n```\n")
    for name in (module.removeprefix("apt_launch.") for module in COMMANDS):
        said = help_of(name)
        parts.append(f"## python -m apt_launch.{name}\n\n```text\n{said}\n```\n")
        for inner in re.findall(r"^    ([a-z]+)\s{2,}", said, flags=re.MULTILINE) if name == "sweep" else []:
            parts.append(f"### {name} {inner}\n\n```text\n{help_of(name, inner)}\n```\n")
    return "\n".join(parts)


def help_of(name: str, *more: str) -> str:
    """Return what a command prints with ``--help``, 100 columns wide and without colours."""
    module = importlib.import_module(f"apt_launch.{name}")
    if hasattr(module, "__path__"):  # a package
        module = importlib.import_module(f"apt_launch.{name}.__main__")
    said = io.StringIO()
    before = sys.argv, os.environ.copy()
    try:
        sys.argv = [f"python -m apt_launch.{name}", *more, "--help"]
        os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            module.main()
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
    return said.getvalue().strip()


PAGES: Mapping[str, Callable[[], str]] = {"reference/config.md": config_page, "reference/commands.md": commands_page}
"""The pages, by their paths below ``docs``."""


def write() -> None:
    """Write the pages anew."""
    for path, page in PAGES.items():
        (Path(__file__).parent / path).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write()
